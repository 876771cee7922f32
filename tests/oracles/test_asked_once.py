"""What evaluations ask: nobody twice, whichever of two texts stands first, and what was answered is on disk at once."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sea_jax.evaluation import compare
from sea_jax.oracles import preferences
from sea_jax.oracles.asked_once import asked_once
from sea_jax.oracles.ledger import Ledger
from sea_jax.types import Preference


class Asked:
    """A taste that remembers what it was asked: the more of the letter a, the better; silent about "?"."""

    def __init__(self) -> None:
        self.pairs: list[tuple[str, str, str]] = []

    def __call__(
        self, prompts: Sequence[str], first: Sequence[str], second: Sequence[str]
    ) -> Iterator[tuple[int, float]]:
        for row, (prompt, a, b) in enumerate(zip(prompts, first, second, strict=True)):
            self.pairs.append((prompt, a, b))
            if "!" in (a, b):
                raise KeyboardInterrupt
            if "?" not in (a, b):
                yield row, 0.5 + (a.count("a") - b.count("a")) / 10


def said(preference: Preference, prompts: Sequence[str], first: Sequence[str], second: Sequence[str]) -> list[float]:
    """P(first wins), -1 where there is no answer."""
    found = np.full(len(prompts), -1.0)
    for rows, known in preferences.answers(preference, prompts, first, second, np.zeros(len(prompts), bool)):
        found[rows] = known
    return found.round(6).tolist()


def test_the_same_texts_are_asked_once_in_whichever_order_and_after_a_restart(tmp_path: Path) -> None:
    taste = Asked()
    with Ledger(tmp_path / "evaluations.jsonl") as ledger:
        ask = asked_once(taste, "oracle", ledger, ())
        assert said(ask, ["p", "p", "q", "p"], ["aa", "a?a", "a", "aa"], ["b", "?", "b", "b"]) == [0.7, -1, 0.6, 0.7]
        assert taste.pairs == [("p", "aa", "b"), ("p", "a?a", "?"), ("q", "a", "b")]
        assert said(ask, ["p", "q", "p"], ["b", "b", "?"], ["aa", "c", "a?a"]) == [0.3, 0.5, -1]
        assert taste.pairs[3:] == [("q", "b", "c")]
        judge = asked_once(taste, "judge", ledger, ())
        assert said(judge, ["q"], ["b"], ["c"]) == [0.5]
        assert len(taste.pairs) == 5
        assert ledger.counted() == 0
    with Ledger(tmp_path / "evaluations.jsonl") as ledger, Ledger(tmp_path / "other.jsonl") as other:
        for ask in (asked_once(taste, "oracle", ledger, ()), asked_once(taste, "oracle", other, (ledger,))):
            assert said(ask, ["p", "q", "q"], ["aa", "b", "a"], ["b", "c", "b"]) == [0.7, 0.5, 0.6]
    assert len(taste.pairs) == 5
    lines = [json.loads(line) for line in (tmp_path / "evaluations.jsonl").read_text().splitlines()]
    assert [(line["event"], line.get("counted")) for line in lines[:6]] == [
        *[("ask", None)] * 3,
        *[("label", False)] * 2,
        ("abstention", None),
    ]


def test_an_answer_is_on_disk_before_the_next_is_awaited(tmp_path: Path) -> None:
    taste = Asked()
    with Ledger(tmp_path / "evaluations.jsonl") as ledger, pytest.raises(KeyboardInterrupt):
        said(asked_once(taste, "oracle", ledger, ()), ["p", "p", "p"], ["a", "aa", "!"], ["b", "b", "b"])
    assert len(taste.pairs) == 3
    with Ledger(tmp_path / "evaluations.jsonl") as ledger:
        assert said(asked_once(taste, "oracle", ledger, ()), ["p", "p"], ["a", "aa"], ["b", "b"]) == [0.6, 0.7]
    assert len(taste.pairs) == 3


def test_who_says_nothing_at_all_is_asked_again(tmp_path: Path) -> None:
    taste = Asked()
    with Ledger(tmp_path / "evaluations.jsonl") as ledger:
        ask = asked_once(taste, "oracle", ledger, ())
        for _ in range(2):
            with pytest.raises(
                ValueError, match="the oracle was asked about 1 pairs of an evaluation and answered none"
            ):
                compare(ask, ["p"], ["?"], ["b"], np.zeros(1, bool))
    assert len(taste.pairs) == 2


@pytest.mark.parametrize("pointwise", [True, False])
def test_what_a_taste_says_of_itself_is_kept(pointwise: bool, tmp_path: Path) -> None:
    shown: list[Any] = []

    def taste(prompts: Sequence[str], first: Sequence[str], second: Sequence[str]) -> np.ndarray:
        shown.append((list(first), list(second)))
        return np.full(len(prompts), 0.9)

    taste.pointwise = pointwise  # type: ignore[attr-defined]
    with Ledger(tmp_path / "evaluations.jsonl") as ledger:
        ask = asked_once(taste, "oracle", ledger, ())
        _, probability = compare(ask, ["p"], ["response"], ["opponent"], np.ones(1, bool))
    assert shown == [(["response"], ["opponent"]) if pointwise else (["opponent"], ["response"])]
    assert probability[0] == pytest.approx(0.9 if pointwise else 0.1)
