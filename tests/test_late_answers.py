"""Runs whose oracle answers some pairs at once, some steps later, and some never."""

import json
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest

from configs import tiny_random
from sea_jax import open_pairs, train
from sea_jax.oracles import labelling, oracle
from sea_jax.oracles.ledger import Ledger
from sea_jax.types import Judgement, LateOracle, Prompts
from tests.oracles.test_labelling import question
from tests.support.cut import train_and_cut


class Slow:
    """Of each batch, it answers the first pair at once, the others at the second look, and of the last one says at the
    twelfth that it never will."""

    max_staleness = 8

    def __init__(self) -> None:
        self.open: dict[str, int] = {}  # ask -> looks until it is answered
        self.values: dict[str, float] = {}
        self.withdrawn: set[str] = set()
        self.asked: Counter[str] = Counter()

    def __call__(
        self, prompts: Any, first: Any, second: Any, swapped: Any, keys: Any, asks: Any
    ) -> Iterator[Judgement]:
        self.asked.update(asks)
        for row, ask in enumerate(asks):
            self.values[ask] = float(tiny_random.prefers_many_es([""], [first[row]], [second[row]])[0])
            self.open[ask] = 2 if row < len(asks) - 1 else 12
            if row == len(asks) - 1 > 0:
                self.values[ask] = math.nan
        yield self._answers(asks[:1], range(1))

    def collect(self, asks: Sequence[str]) -> Judgement:
        for ask in asks:
            self.open[ask] -= 1
        return self._answers(asks, [row for row, ask in enumerate(asks) if self.open[ask] <= 0])

    def withdraw(self, asks: Sequence[str]) -> None:
        self.withdrawn |= {*asks}
        for ask in asks:
            self.open[ask] = 0

    def _answers(self, asks: Sequence[str], rows: Sequence[int]) -> Judgement:
        values = np.array([self.values[asks[row]] for row in rows])
        return Judgement(np.array(rows, int), values, values.round())


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def numbers(workdir: Path) -> list[dict[str, Any]]:
    """The metrics without times."""
    return [
        {name: value for name, value in line.items() if "time" not in name} for line in lines(workdir / "metrics.jsonl")
    ]


def config() -> ml_collections.ConfigDict:
    own = tiny_random.get_config()
    own.eval.every_queries, own.eval.best_of_n, own.checkpoint.every_steps = 1000, 0, 3
    own.exploration.gamma = 1.0
    return own


@pytest.mark.slow
def test_late_answers_are_learnt_from_and_a_run_that_is_cut_takes_the_same_at_the_same_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = Slow()
    monkeypatch.setattr(oracle, "oracle", lambda *_: slow)
    monkeypatch.setattr(labelling, "POLL_S", 0.0)
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    train.train(config(), whole)
    assert isinstance(slow, LateOracle)
    ledger = lines(whole / "queries.jsonl")
    asks = {line["key"]: line for line in ledger if line["event"] == "ask"}
    labels = {line["key"]: line for line in ledger if line["event"] == "label" and line["counted"]}
    never = {line["key"]: line for line in ledger if line["event"] == "abstention"}
    left_open = {line["key"] for line in ledger if line["event"] == "open"}
    assert len(labels) == 24
    assert asks.keys() == labels.keys() | never.keys()  # nothing is left at the end
    assert max(slow.asked.values()) == 1
    late = {key: line["taken"] - asks[key]["step"] for key, line in labels.items() if "taken" in line}
    assert late.keys() | never.keys() == left_open
    assert {*late.values()} == {2}
    assert slow.withdrawn
    assert {name.split("/")[1] for name in slow.withdrawn} < never.keys()
    metrics = numbers(whole)
    assert sum(line.get("late/pairs", 0) for line in metrics) == len(late)
    assert metrics[-1]["misc/query_step"] == 24
    late_passes = sum(line.get("late/pairs", 0) > 0 for line in metrics)
    planned = sum("plan/loss" in line for line in metrics)
    asking = sum("train/loss" in line for line in metrics)
    assert metrics[-1]["misc/gradient_steps"] == asking + planned + late_passes

    slow.__init__()  # type: ignore[misc]
    for step in (4, 7):  # behind the checkpoints of steps 3 and 6
        train_and_cut(config(), cut, step)
    train.train(config(), cut)
    assert lines(cut / "queries.jsonl") == ledger
    assert numbers(cut) == metrics
    assert max(slow.asked.values()) == 1


def test_a_label_that_comes_late_names_the_step_that_learns_from_it(tmp_path: Path) -> None:
    keys = jax.random.split(jax.random.key(0), 3)
    slow = Slow()
    with Ledger(tmp_path / "queries.jsonl") as ledger:
        labels = labelling.label([question(0), question(1), question(2)], slow, ledger, keys)
        assert [math.isnan(value) for value in labels] == [False, True, True]
        assert [ledger.left_open(f"4-{number}") for number in range(3)] == [False, True, True]
        late = ["4-1", "4-2"]
        assert labelling.label_late(late, slow, ledger, 5, [], lambda answered, never: True) == {}
        found = labelling.label_late(late, slow, ledger, 6, ["4-2"], lambda answered, never: answered + never == 2)
        assert found.keys() == {*late}
        assert math.isnan(found["4-2"])
    with Ledger(tmp_path / "queries.jsonl") as ledger:
        again = labelling.label([question(0), question(1), question(2)], slow, ledger, keys)
        np.testing.assert_array_equal(again, labels)  # as when the step was taken
        assert ledger.unanswered_in_a_row() == 1
        assert ledger.counted() == 2
        np.testing.assert_equal(labelling.label_late(late, slow, ledger, 6, [], lambda answered, never: True), found)
    assert max(slow.asked.values()) == 1


def test_open_pairs_keep_what_is_learnt_from_them() -> None:
    held = open_pairs.empty_open_pairs(3, prompt_length=4, response_length=2, num_features=1)
    assert held.taken() == []
    prompts = Prompts(jnp.array([[5, 6], [7, 8]]), jnp.array([[False, True], [True, True]]))
    pairs: dict[str, Any] = {
        "prompts": prompts,
        "tokens": jnp.arange(8).reshape(2, 2, 2),
        "lengths": jnp.array([[1, 2], [2, 2]]),
        "features": jnp.array([[[0.1], [0.2]], [[0.3], [0.4]]]),
    }
    held = open_pairs.add(held, np.array([True, True]), step=9, version=20, **pairs)
    held = open_pairs.free(held, [0])
    held = open_pairs.add(held, np.array([False, True]), step=8, version=18, **pairs)
    assert held.taken() == [0, 1]  # both are row 1, of steps 8 and 9
    assert held.version.tolist() == [18, 20, open_pairs.FREE]
    batch, features = open_pairs.batch_of(held, [1], [0.75], batch_size=2)
    assert batch.prompts.tokens.tolist() == [[0, 0, 7, 8]] * 2
    assert batch.prompts.valid.tolist() == [[False, False, True, True]] * 2
    assert batch.tokens[0].tolist() == [[4, 5], [6, 7]]
    assert batch.labels.tolist() == [0.75, 0.5]
    assert batch.weights.tolist() == [1.0, 0.0]
    np.testing.assert_allclose(features[0], [[0.3], [0.4]])
