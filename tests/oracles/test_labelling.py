import dataclasses
import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from sea_jax.oracles import labelling, preferences
from sea_jax.oracles.labelling import Question
from sea_jax.oracles.ledger import Ledger, LedgerError
from sea_jax.types import Judgement


def question(number: int, erm_label: float | None = None) -> Question:
    return Question(
        key=f"4-{number}",
        step=4,
        prompt_id=f"post-{number}",
        prompt=f"prompt {number}",
        first=f"first {number}",
        second=f"second {number}",
        erm_label=erm_label,
        finished=(True, number % 2 == 0),
    )


class Spy:
    """An oracle of probability 0.75 and label 1 that remembers what it was asked, as what, and what stood on disk then."""

    def __init__(self, path: Path):
        self.path = path
        self.asked: list[tuple[list[str], list[str], list[str]]] = []
        self.asks: list[list[str]] = []
        self.on_disk: list[list[dict[str, Any]]] = []

    def __call__(self, prompts, first, second, swapped, keys, asks) -> Iterator[Judgement]:
        self.asked.append((list(prompts), list(first), list(second)))
        self.asks.append(asks)
        self.on_disk.append(written(self.path))
        assert keys.shape == swapped.shape == (len(prompts),)
        yield Judgement(np.arange(len(prompts)), np.full(len(prompts), 0.75), np.ones(len(prompts)))


def written(path: Path) -> list[dict[str, Any]]:
    """What stands on disk."""
    return [json.loads(row) for row in path.read_text().splitlines()]


@pytest.fixture
def path(tmp_path):
    return tmp_path / "queries.jsonl"


@pytest.fixture
def keys():
    return jax.random.split(jax.random.key(0), 4)


def test_the_ask_is_on_disk_when_the_oracle_is_asked_and_the_label_when_it_is_out(path, keys):
    spy = Spy(path)
    with Ledger(path) as ledger:
        assert labelling.label([question(0), question(1), question(2, 0.5)], spy, ledger, keys[:3]) == [1.0, 1.0, 0.5]
        lines = written(path)
    assert spy.asked == [(["prompt 0", "prompt 1"], ["first 0", "first 1"], ["second 0", "second 1"])]
    assert spy.on_disk == [lines[:2]]
    swapped = preferences.drawn_order(keys[:3]).tolist()
    fields = {"key": "4-1", "step": 4, "prompt_id": "post-1", "first": "first 1", "second": "second 1"}
    assert lines[1] == {
        "event": "ask",
        **fields,
        "digest": lines[1]["digest"],
        "labeller": "oracle",
        "swapped": swapped[1],
    }
    assert lines[3] == {"event": "label", "key": "4-1", "probability": 0.75, "label": 1.0, "counted": True}
    erm = {"labeller": "erm", "probability": 0.5, "label": 0.5, "counted": False}
    assert lines[4].items() >= (erm | {"event": "label", "key": "4-2", "first": "first 2"}).items()
    assert len(lines) == 5


def test_a_batch_of_asks_and_a_batch_of_labels_are_synced_once_each(path, keys, monkeypatch):
    synced = []
    with Ledger(path) as ledger:
        monkeypatch.setattr(os, "fsync", lambda descriptor: synced.append(len(written(path))))
        labelling.label([question(0), question(1, 0.5), question(2)], Spy(path), ledger, keys[:3])
    assert synced == [2, 5]


def test_an_ask_is_named_after_its_run_and_bears_the_same_name_when_it_is_sent_again(tmp_path, keys):
    def failing(prompts, first, second, swapped, keys, asks):
        sent.append(asks)
        raise ConnectionRefusedError("nobody there")
        yield

    sent: list[list[str]] = []
    first, second = tmp_path / "first" / "queries.jsonl", tmp_path / "second" / "queries.jsonl"
    first.parent.mkdir()
    second.parent.mkdir()
    for _ in range(2):
        message = rf"the oracle did not answer: nobody there.*2 pairs, stands in {first}.*again under the same keys"
        with Ledger(first) as ledger, pytest.raises(OSError, match=message):
            labelling.label([question(0), question(1, 0.5), question(2)], failing, ledger, keys[:3])
    asked = first.read_bytes()
    assert [line["event"] for line in written(first)] == ["ask", "ask"]
    spy = Spy(first)
    with Ledger(first) as ledger:
        assert ledger.lines() == []
        labelling.label([question(0), question(1, 0.5), question(2)], spy, ledger, keys[:3])
        run_id = ledger.run_id
    assert sent == spy.asks * 2 == [[f"{run_id}/4-0", f"{run_id}/4-2"]] * 2
    with Ledger(second) as ledger:
        labelling.label([question(0), question(1, 0.5), question(2)], Spy(second), ledger, keys[:3])
        assert ledger.run_id != run_id
    assert first.read_bytes() == second.read_bytes()  # as if nothing had failed
    assert first.read_bytes().startswith(asked)


def test_nothing_is_asked_twice(path, keys):
    spy = Spy(path)
    with Ledger(path) as ledger:
        labelling.label([question(0), question(2)], spy, ledger, keys[:2])
    content = path.read_bytes()
    with Ledger(path) as ledger:
        assert labelling.label([question(0), question(1), question(2)], spy, ledger, keys[:3]) == [1.0, 1.0, 1.0]
        assert spy.asked[1:] == [(["prompt 1"], ["first 1"], ["second 1"])]
        labelling.label([question(0), question(1), question(2)], spy, ledger, keys[:3])
        assert len(spy.asked) == 2
        assert spy.on_disk[1][-1].items() >= {"event": "ask", "key": "4-1"}.items()
        assert ledger.counted() == 3
    assert path.read_bytes().startswith(content)


def test_a_known_label_wins_over_a_new_opinion(path, keys):
    with Ledger(path) as ledger:
        labelling.label([question(0, erm_label=0.25)], Spy(path), ledger, keys[:1])
        assert labelling.label([question(0, erm_label=0.5)], Spy(path), ledger, keys[:1]) == [0.25]


def test_labels_of_the_erm_are_recorded_but_neither_asked_nor_counted(path, keys):
    spy = Spy(path)
    with Ledger(path) as ledger:
        labels = labelling.label([question(0, 0.25), question(1), question(2, 0.0)], spy, ledger, keys[:3])
        assert labels == [0.25, 1.0, 0.0]
        assert spy.asked == [(["prompt 1"], ["first 1"], ["second 1"])]
        assert ledger.counted() == 1
        assert [(entry["labeller"], entry["counted"]) for entry in ledger.lines()] == [
            ("erm", False),
            ("oracle", True),
            ("erm", False),
        ]
        assert ledger.lines()[0]["label"] == ledger.lines()[0]["probability"] == 0.25


def test_a_label_is_the_same_number_before_and_after_a_restart(path, keys):
    third = preferences.labelled(lambda prompts, first, second: np.full(len(prompts), 1 / 3), preferences.soft)
    with Ledger(path) as ledger:
        fresh = labelling.label([question(0)], third, ledger, keys[:1])
    with Ledger(path) as ledger:
        assert labelling.label([question(0)], third, ledger, keys[:1]) == fresh
    (swapped,) = preferences.drawn_order(keys[:1])
    assert fresh == [float(np.float32(2 / 3 if swapped else 1 / 3))]


def test_noise_does_not_depend_on_what_else_is_asked(tmp_path, keys):
    def preference(prompts, first, second):
        return np.full(len(prompts), 0.5)

    drawn = preferences.flipped(preferences.labelled(preference, preferences.bradley_terry), 0.3)
    many = jax.random.split(jax.random.key(1), 32)
    questions = [question(i) for i in range(32)]
    with Ledger(tmp_path / "together.jsonl") as ledger:
        together = labelling.label(questions, drawn, ledger, many)
    assert set(together) == {0.0, 1.0}
    with Ledger(tmp_path / "in_parts.jsonl") as ledger:
        even, odd = range(0, 32, 2), range(1, 32, 2)
        labelling.label([questions[i] for i in odd], drawn, ledger, many[1::2])
        mixed = [dataclasses.replace(q, erm_label=0.5) if i == 6 else q for i, q in enumerate(questions)]
        again = labelling.label(mixed, drawn, ledger, many)
    assert again[6] == 0.5
    assert [again[i] for i in (*even, *odd) if i != 6] == [together[i] for i in (*even, *odd) if i != 6]


def test_an_oracle_that_takes_it_is_told_which_responses_ended_by_themselves(path, keys):
    told: list[Any] = []

    def judge(prompts, first, second, finished=None):
        told.extend(zip(prompts, first, finished, strict=True))
        return np.full(len(prompts), 0.5)

    oracle = preferences.flipped(preferences.labelled(judge, preferences.soft), 0.5)
    with Ledger(path) as ledger:
        labelling.label([question(0), question(1), question(2, 0.5), question(3)], oracle, ledger, keys)
    assert len(told) == 3
    for prompt, first, finished in told:
        number, shown_first = int(prompt.split()[1]), first.startswith("first")
        as_asked = (True, number % 2 == 0)
        assert finished == (as_asked if shown_first else as_asked[::-1])


def one_by_one(path, rows, seen):
    """An oracle that answers about some rows, one after the other, and remembers what stood on disk before each."""

    def oracle(prompts, first, second, swapped, keys, asks):
        for row in rows:
            seen.append([line["key"] for line in written(path) if line["event"] == "label"])
            yield Judgement(np.array([row]), np.array([0.75]), np.ones(1))

    return oracle


def test_an_answer_is_on_disk_before_the_next_is_awaited_and_what_is_not_answered_stands_there_too(path, keys):
    seen: list[list[str]] = []
    questions = [question(0), question(1), question(2, 0.5), question(3)]
    with Ledger(path) as ledger:
        labels = labelling.label(questions, one_by_one(path, [2, 0], seen), ledger, keys)
        assert ledger.counted() == 2
    assert labels[:1] + labels[2:] == [1.0, 0.5, 1.0]
    assert math.isnan(labels[1])
    assert seen == [[], ["4-2", "4-3"]]  # with the first answer, also what the ERM said
    assert written(path)[-1] == {"event": "abstention", "key": "4-1"}
    content, spy = path.read_bytes(), Spy(path)
    with Ledger(path) as ledger:  # the same step again, after a restart: nobody is asked about what was passed over
        again = labelling.label(questions, spy, ledger, keys)
    assert spy.asked == []
    assert math.isnan(again[1])
    assert again[0] == again[3] == 1.0
    assert path.read_bytes() == content


def test_the_ledger_says_who_answered_where_that_is_somebody_and_nobody_where_none_will(path, keys):
    def people(prompts, first, second, swapped, keys, asks):
        yield Judgement(np.array([1, 0]), np.array([1.0, np.nan]), np.array([1.0, np.nan]), [["anna", "ben"], []])

    with Ledger(path) as ledger:
        labels = labelling.label([question(0), question(1)], people, ledger, keys[:2])
    assert math.isnan(labels[0])
    assert labels[1] == 1.0
    assert written(path)[2:] == [
        {"event": "label", "key": "4-1", "probability": 1.0, "label": 1.0, "counted": True, "people": ["anna", "ben"]},
        {"event": "abstention", "key": "4-0"},
    ]


def test_answers_that_came_before_a_failure_are_kept(path, keys):
    def failing(prompts, first, second, swapped, keys, asks):
        yield Judgement(np.array([1]), np.array([0.25]), np.zeros(1))
        raise ConnectionResetError("gone")

    with Ledger(path) as ledger, pytest.raises(OSError, match=r"the oracle did not answer: gone.*2 pairs"):
        labelling.label([question(0), question(1)], failing, ledger, keys[:2])
    spy = Spy(path)
    with Ledger(path) as ledger:
        assert ledger.counted() == 1
        assert labelling.label([question(0), question(1)], spy, ledger, keys[:2]) == [1.0, 0.0]
    assert [asked[0] for asked in spy.asked] == [["prompt 0"]]


@pytest.mark.parametrize("field", ["prompt_id", "first", "second"])
def test_another_pair_under_a_known_key_is_refused(path, keys, field):
    spy = Spy(path)
    with Ledger(path) as ledger:
        labelling.label([question(0)], spy, ledger, keys[:1])
        changed: dict[str, Any] = {field: "something else"}
        other = dataclasses.replace(question(0), **changed)
        with pytest.raises(LedgerError, match=rf"{path}: the line with key 4-0 is about another pair"):
            labelling.label([question(1), other], spy, ledger, keys[:2])
        ledger.ask([question(2).entry()])
        other = dataclasses.replace(question(2), **changed)
        with pytest.raises(LedgerError, match=rf"{path}: the line with key 4-2 is about another pair"):
            labelling.label([question(1), other], spy, ledger, keys[:2])
    assert len(spy.asked) == 1  # nothing was paid for on the way to the error
    assert len(written(path)) == 3


def test_nobody_is_asked_and_no_label_leaves_when_the_disk_is_full(path, keys, monkeypatch):
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    spy = Spy(path)
    with Ledger(path) as ledger:
        with monkeypatch.context() as context:
            context.setattr(os, "fsync", full)
            with pytest.raises(OSError, match="No space left"):
                labelling.label([question(0)], spy, ledger, keys[:1])
        assert spy.asked == []
        ledger.ask([question(0).entry()])
        with monkeypatch.context() as context:
            context.setattr(os, "fsync", full)
            with pytest.raises(OSError, match="No space left"):
                labelling.label([question(0)], spy, ledger, keys[:1])
        assert ledger.find("4-0") is None
        assert ledger.counted() == 0
        assert labelling.label([question(0)], spy, ledger, keys[:1]) == [1.0]
    assert spy.asks[0] == spy.asks[1]
