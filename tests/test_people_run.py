"""A whole run whose oracle are two people at their browsers."""

import json
import socket
from pathlib import Path
from typing import Any

import pytest

from configs import tiny_random
from sea_jax import train
from tests.support import people
from tests.support.cut import train_and_cut


def asked(workdir: Path) -> dict[str, dict[str, Any]]:
    """What the ledger says of each pair."""
    found: dict[str, dict[str, Any]] = {}
    for line in (workdir / "queries.jsonl").read_text().splitlines():
        entry = json.loads(line)
        if "key" in entry:
            found.setdefault(entry["key"], {}).update(entry)
    return found


@pytest.mark.slow
def test_a_run_learns_from_what_two_people_click_and_goes_on_where_it_was_cut(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    config = tiny_random.get_config()
    config.max_queries = 12
    config.oracle.kind = "people"
    config.people.update({"names": ("anna", "ben"), "port": port, "undo_s": 0.2, "enough": 0.5})
    config.eval.update({"every_queries": 1000, "best_of_n": 0, "likelihood_prompts": 0})
    workdir = tmp_path / "run"
    with people.working(workdir, people.prefers_many_es, "anna", "ben") as said:
        train_and_cut(config, workdir, step=1)
        train.train(config, workdir)
    paid = [entry for entry in asked(workdir).values() if entry.get("counted")]
    assert len(paid) == 12
    for entry in paid:
        first, second = entry["first"].count("e"), entry["second"].count("e")
        assert entry["label"] == (1.0 if first > second else 0.0 if second > first else 0.5)
        assert entry["people"] in (["anna"], ["ben"])
    clicks = [number for clicked in said.values() for number, _ in clicked]
    assert len(clicks) == len(set(clicks)) >= 12  # nobody was asked what had been answered
    assert not json.loads((workdir / "config.json").read_text())["eval"]["oracle"]
    assert "judge" in (workdir / "report.md").read_text()
