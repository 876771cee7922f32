"""What a store holds, as tables and as other programs read it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from label_page import export, summary
from label_page.records import read_records
from label_page.store import Ask, Rules, Store


@pytest.fixture
def workdir(tmp_path) -> Path:
    """Three pairs, of which two people answered two and one the third, and a check that both answered."""
    store = Store(tmp_path / "people", Rules(redundancy=2, lease_s=60.0, undo_s=0.0, slightly=0.75, check_every=4))
    for name in ("anna", "ben"):
        store.join(store.invitations([name])[name], "", name)
    store.post([Ask(f"run/{i}", f"prompt {i}", f"left {i}", f"right {i}", False) for i in range(3)])
    store.post_checks([(Ask("check/a", "check", "good", "bad", False), 1.0)])
    for person, verdicts in {
        "anna": ["left", "slightly_left", "tie", "left"],
        "ben": ["left", "right", "skip", "right"],
    }.items():
        for verdict in verdicts:
            pair = store.next_pair(person)
            assert pair is not None
            store.answer(person, pair.number, pair.ticket, verdict, "too long" if verdict == "skip" else "")
    store.take(["run/0", "run/1", "run/2"])
    store.close()
    return tmp_path


def test_a_label_is_the_mean_of_what_was_said_and_people_can_be_left_out(workdir):
    assert [record.label() for record in read_records(workdir) if record.known is None] == [1.0, 0.375, 0.5]
    assert [record.label() for record in read_records(workdir, ["anna"]) if record.known is None] == [1.0, 0.0, None]
    with pytest.raises(ValueError, match="--without=carla: there answered anna, ben"):
        read_records(workdir, ["carla"])


def test_the_summary_says_who_labelled_how_and_what_a_person_changes(workdir):
    command = [sys.executable, "-m", "label_page.summary", f"--workdir={workdir}"]
    said = subprocess.run([*command, "--without=ben"], capture_output=True, text=True, check=True).stdout
    assert "| anna | 3 | 1.00 | 1 | 0 | 0 | 0.0 | 1 of 1 |" in said
    assert "ben" not in said
    assert "Of 3 labels 0 have nobody behind them any more, and 1 change, 1 of these to another side." in said
    records = read_records(workdir)
    assert "| ben | 2 | 0.50 | 0 | 0 | 1 | 0.0 | 0 of 1 |" in summary.people_table(records)
    assert "| anna, ben | 3 | 1 | 0.33 |" in summary.agreement_table(records)  # the check is one of the three
    refused = subprocess.run(
        [sys.executable, "-m", "label_page.summary", f"--workdir={workdir / 'no'}"], capture_output=True, text=True
    )
    assert refused.returncode == 1
    assert refused.stderr.startswith("error: ")


def test_exports_hold_what_each_person_said(workdir):
    path = workdir / "labels"
    assert export.export(workdir, "jsonl", path) == 3
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(line["name"], line["person"], line["verdict"], line["label"]) for line in lines[2:4]] == [
        ("run/1", "anna", "slightly_left", 0.75),
        ("run/1", "ben", "right", 0.0),
    ]
    assert lines[-1]["reason"] == "too long"
    export.export(workdir, "argilla", path, ["ben"])
    (first, *_) = json.loads(path.read_text())
    assert first["fields"] == {"prompt": "prompt 0", "left": "left 0", "right": "right 0"}
    assert [response["value"] for response in first["responses"]["preference"]] == ["left"]
    export.export(workdir, "label_studio", path)
    last = json.loads(path.read_text())[-1]
    assert last["data"]["prompt"] == "prompt 2"
    assert [(one["result"][0]["value"]["choices"], one["was_cancelled"]) for one in last["annotations"]] == [
        (["tie"], False),
        (["skip"], True),
    ]
