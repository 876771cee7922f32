"""Somebody's code as an oracle: it fails, answers nonsense, is a coroutine."""

import asyncio
import functools
import inspect
import math
import time
from collections import Counter
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from sea_jax.oracles import labelling, preferences
from sea_jax.oracles.labelling import Question
from sea_jax.oracles.ledger import Ledger
from sea_jax.oracles.user_preference import Caller, NoAnswerError, persistent
from sea_jax.runtime import backoff


class RateLimitError(Exception):
    """What a client of an API raises: no OSError."""


@pytest.fixture(autouse=True)
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The seconds that were to be waited, which nobody waits here."""
    real, seen = backoff.wait_s, list[float]()

    def not_at_all(failures: int) -> float:
        seen.append(real(failures))
        return 0.0

    monkeypatch.setattr(backoff, "wait_s", not_at_all)
    return seen


def caller(preference: Any, retries: int = 2, concurrency: int = 2, timeout_s: float = 60.0) -> Any:
    return persistent(Caller(preference, "oracle.kind=mine:taste", retries, timeout_s, concurrency))


def ask(preference: Any, count: int = 4, **names: Any) -> Any:
    """All that is said of some pairs, as row -> probability; what was said before an error stands in its notes."""
    said = preference([f"x{i}" for i in range(count)], ["y"] * count, ["z"] * count, **names)
    if not hasattr(said, "__next__"):
        return dict(enumerate(said.tolist()))
    answers: dict[int, float] = {}
    try:
        answers.update(said)
    except OSError as error:
        error.answers = answers  # type: ignore[attr-defined]
        raise
    return answers


def test_a_rate_limit_is_waited_for_and_the_same_pairs_are_asked_about_again(waits: list[float]) -> None:
    calls: list[list[str]] = []

    def limited(prompts: Any, first: Any, second: Any, keys: Any = None) -> Any:
        calls.append([*prompts, *keys])
        if len(calls) in (1, 2):
            raise RateLimitError("429")
        return [0.25] * len(prompts)

    assert ask(caller(limited), 2, keys=["run/0", "run/1"]) == {0: 0.25, 1: 0.25}
    assert calls == [["x0", "x1", "run/0", "run/1"]] * 3
    assert waits == [1.0, 2.0]


def test_after_too_many_failures_one_line_names_the_oracle_the_error_and_the_place(waits: list[float]) -> None:
    def limited(prompts: Any, first: Any, second: Any) -> Any:
        raise RateLimitError("too many\nrequests")

    line = inspect.getsourcelines(limited)[1] + 1
    message = (
        rf"^config.oracle.kind=mine:taste failed with RateLimitError: too many requests \({__file__}, line {line}\), "
        r"3 times in a row$"
    )
    with pytest.raises(NoAnswerError, match=message):
        ask(caller(limited))
    assert waits == [1.0, 2.0]


def test_a_mistake_in_the_code_is_not_tried_again(waits: list[float]) -> None:
    def broken(prompts: Any, first: Any, second: Any) -> Any:
        return undefined  # type: ignore[name-defined] # noqa: F821

    with pytest.raises(NoAnswerError, match=r"mine:taste failed with NameError: name 'undefined' is not defined"):
        ask(caller(broken))
    assert waits == []


def test_code_that_yields_is_asked_again_only_about_what_it_has_not_answered(waits: list[float]) -> None:
    calls: list[list[str]] = []

    def each(prompts: Any, first: Any, second: Any, keys: Any = None) -> Any:
        calls.append([*prompts, *keys])
        for row in reversed(range(len(prompts))):
            if prompts[row] in ("x1", "x0") and len(calls) < 3:
                raise RateLimitError
            yield row, 0.1 * int(prompts[row][1:])

    assert ask(caller(each, retries=2), keys=list("abcd")) == pytest.approx({3: 0.3, 2: 0.2, 1: 0.1, 0: 0.0})
    assert calls == [["x0", "x1", "x2", "x3", *"abcd"], ["x0", "x1", "a", "b"], ["x0", "x1", "a", "b"]]
    assert waits == [1.0, 2.0]
    calls.clear()
    with pytest.raises(NoAnswerError) as failed:
        ask(caller(each, retries=0), keys=list("abcd"))
    assert failed.value.answers == pytest.approx({3: 0.3, 2: 0.2})  # type: ignore[attr-defined]


def test_failures_count_anew_behind_every_answer() -> None:
    calls = Counter[str]()

    def each(prompts: Any, first: Any, second: Any) -> Any:
        for row, prompt in enumerate(prompts):
            calls[prompt] += 1
            if calls[prompt] < 3:
                raise RateLimitError
            yield row, 1.0

    assert ask(caller(each, retries=2)) == dict.fromkeys(range(4), 1.0)


NONSENSE = [math.nan, -1, None, "A wins", {"A": 1}, 1.5, math.inf]


@pytest.mark.parametrize("nonsense", NONSENSE, ids=repr)
def test_one_answer_that_cannot_be_used_is_none_and_leaves_the_others_alone(nonsense: Any) -> None:
    said = [0.25, nonsense, 1]

    async def one(prompts: Any, first: Any, second: Any) -> Any:
        return [said[int(prompts[0][1:])]]

    for preference in (lambda *_: said, lambda *_: iter(enumerate(said)), one):
        answers = ask(caller(preference), 3)
        assert math.isnan(answers.pop(1))
        assert answers == {0: 0.25, 2: 1.0}
    texts = ["x", "y", "z"]
    (_, probability), *_ = preferences.answers(lambda *_: said, texts, texts, texts, np.zeros(3, bool))
    assert probability.tolist() == [0.25, 1.0]


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ([0.5], r"asked about 4 pairs and returned shape \(1,\)"),
        (None, r"returned shape \(\)"),
        (iter([0.5]), r"yielded 0\.5; it must yield \(row, probability\)"),
        (iter([(0.0, 0.5)]), r"yielded \(0\.0, 0\.5\); it must yield"),
        (iter([(4, 0.5)]), r"asked about 4 pairs and answered about pair 4 \(again\?\)"),
        (iter([(0, 0.5), (0, 0.5)]), r"answered about pair 0 \(again\?\)"),
    ],
)
def test_an_answer_of_another_form_is_a_mistake(said: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ask(caller(lambda prompts, first, second: said))


def test_code_that_cannot_be_called_is_refused_before_it_is() -> None:
    with pytest.raises(ValueError, match=r"^config.oracle.kind=mine:taste takes \(prompt, a\): too many positional"):
        caller(lambda prompt, a: 0.5)
    with pytest.raises(ValueError, match=r"missing a required argument: 'client'.*all other parameters need a default"):
        caller(lambda prompts, first, second, client: 0.5)


# ---- async def


def test_a_coroutine_function_is_awaited_for_one_pair_a_call_and_no_more_at_once_than_is_said() -> None:
    running, most, loops = 0, 0, set[int]()

    async def judge(prompts: Any, first: Any, second: Any, keys: Any = None) -> Any:
        nonlocal running, most
        running, most = running + 1, max(most, running + 1)
        loops.add(id(asyncio.get_running_loop()))
        await asyncio.sleep(0.01)
        running -= 1
        assert len(prompts) == len(first) == len(second) == len(keys) == 1
        return [0.1 * int(keys[0])]

    class Judge:
        async def __call__(self, prompts: Any, first: Any, second: Any, *, keys: Any = None) -> Any:
            return await judge(prompts, first, second, keys)

    for preference in (judge, Judge(), functools.partial(judge)):
        answers = ask(caller(preference, concurrency=3), 7, keys=[str(i) for i in range(7)])
        assert answers == pytest.approx({i: 0.1 * i for i in range(7)})
        assert (most, running) == (3, 0)
    assert len(loops) == 1  # clients keep their connections from one batch to the next


def test_a_call_that_fails_is_made_again_and_the_others_are_not() -> None:
    calls = Counter[str]()

    async def judge(prompts: Any, first: Any, second: Any) -> Any:
        calls[prompts[0]] += 1
        if prompts[0] == "x1" and calls["x1"] < 3:
            raise RateLimitError
        return [1.0]

    assert ask(caller(judge, concurrency=4)) == dict.fromkeys(range(4), 1.0)
    assert calls == {"x0": 1, "x1": 3, "x2": 1, "x3": 1}


def test_where_a_call_fails_for_good_what_is_on_its_way_is_kept_and_no_other_is_made() -> None:
    calls: list[str] = []

    async def judge(prompts: Any, first: Any, second: Any) -> Any:
        calls.append(prompts[0])
        if prompts[0] == "x1":
            raise RateLimitError
        await asyncio.sleep(0.05)
        return [1.0]

    with pytest.raises(NoAnswerError, match=r"mine:taste failed with RateLimitError .*, 1 times in a row") as failed:
        ask(caller(judge, retries=0, concurrency=2), 8)
    assert failed.value.answers == {0: 1.0}  # type: ignore[attr-defined]
    assert calls == ["x0", "x1"]


def test_a_call_that_hangs_is_given_up() -> None:
    async def judge(prompts: Any, first: Any, second: Any) -> Any:
        await asyncio.sleep(600)

    begin = time.monotonic()
    with pytest.raises(NoAnswerError, match=r"failed with TimeoutError.*2 times in a row"):
        ask(caller(judge, retries=1, timeout_s=0.02))
    assert time.monotonic() - begin < 60


def test_whatever_else_wants_to_be_awaited_is() -> None:
    async def whole(prompts: Any) -> Any:
        return [0.5] * len(prompts)

    async def each(prompts: Any, first: Any, second: Any) -> Any:
        for row in range(len(prompts)):
            yield row, 0.5

    for preference in (lambda prompts, first, second: whole(prompts), each):
        assert ask(caller(preference)) == dict.fromkeys(range(4), 0.5)


# ---- What is on disk


def test_what_was_answered_before_a_failure_is_on_disk_and_the_same_command_goes_on(tmp_path: Path) -> None:
    failing = True

    async def judge(prompts: Any, first: Any, second: Any) -> Any:
        if prompts[0] == "x1" and failing:
            raise RateLimitError("429")
        asked.append(prompts[0])
        return [0.5 if prompts[0] != "x2" else -1]

    questions = [Question(f"0-{i}", 0, f"post-{i}", f"x{i}", "y", "z", None) for i in range(3)]
    keys, asked = jax.random.split(jax.random.key(0), 3), list[str]()
    oracle = preferences.labelled(caller(judge, retries=0, concurrency=1), preferences.soft)
    with Ledger(tmp_path / "queries.jsonl") as ledger:
        with pytest.raises(
            OSError, match=r"^the oracle did not answer: config.oracle.kind=mine:taste failed with Rate"
        ):
            labelling.label(questions, oracle, ledger, keys)
        assert [line["key"] for line in ledger.lines()] == ["0-0"]
    failing = False
    with Ledger(tmp_path / "queries.jsonl") as ledger:
        labels = labelling.label(questions, oracle, ledger, keys)
        assert labels[:2] == [0.5, 0.5]
        assert math.isnan(labels[2])
        assert asked == ["x0", "x1", "x2"]
        assert ledger.unanswered_in_a_row() == 1
