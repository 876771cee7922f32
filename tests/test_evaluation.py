"""Win rates: who is asked, what a tie counts, and which of N responses is kept."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sea_jax import ensemble, evaluation
from sea_jax.ensemble import EnsembleSettings
from sea_jax.oracles import preferences
from sea_jax.types import Array, Candidates, Params, Prompts


def test_ties_count_half_and_the_same_text_is_never_sent() -> None:
    asked: list[tuple[str, str, str]] = []

    def preference(prompts: Sequence[str], first: Sequence[str], second: Sequence[str]) -> np.ndarray:
        asked.extend(zip(prompts, first, second, strict=True))
        return np.array([0.9, 0.5, 0.2])

    interval, probability = evaluation.compare(
        preference, ["p", "q", "r", "s"], ["a", "b", "c", "d"], ["x", "b", "y", "z"], np.zeros(4, bool)
    )
    assert asked == [("p", "a", "x"), ("r", "c", "y"), ("s", "d", "z")]
    assert probability.tolist() == [0.9, 0.5, 0.5, 0.2]
    assert interval.mean == (1 + 0.5 + 0.5 + 0) / 4
    assert interval.low < 0.5 < interval.high


@pytest.mark.parametrize("answer", [np.array([[0.5]]), np.array(0.7), np.array([3.0]), np.array([np.nan])])
def test_an_answer_that_is_no_probability_is_refused(answer: np.ndarray) -> None:
    with pytest.raises(ValueError, match="the oracle"):
        evaluation.compare(lambda *_: answer, ["p"], ["a"], ["b"], np.zeros(1, bool))


def test_a_judge_that_likes_what_stands_first_finds_nobody_better() -> None:
    count = 1000
    swapped = preferences.drawn_order(jax.random.split(jax.random.key(0), count))
    texts = [[f"{letter}{i}" for i in range(count)] for letter in "pab"]
    prompts, responses, opponents = texts
    interval, probability = evaluation.compare(
        lambda prompts, first, second: np.full(len(prompts), 0.6), prompts, responses, opponents, swapped
    )
    assert interval.low < 0.5 < interval.high
    assert set(probability) == {0.6, 0.4}


def test_a_prompt_without_an_answer_is_not_counted() -> None:
    interval, probability = evaluation.compare(
        lambda prompts, first, second: [1.0, None, 0.2],
        ["p", "q", "r"],
        ["a", "b", "c"],
        ["x", "y", "z"],
        np.zeros(3, bool),
    )
    assert (interval.mean, interval.count) == (0.5, 2)
    assert np.isnan(probability).tolist() == [False, True, False]


def test_the_judge_is_named_where_it_says_nothing() -> None:
    with pytest.raises(ValueError, match="the judge was asked about 1 pairs of an evaluation and answered none"):
        evaluation.compare(lambda *_: [None], ["p"], ["a"], ["b"], np.zeros(1, bool), "judge")


def test_when_nothing_has_changed_nobody_is_asked() -> None:
    def preference(*_: Sequence[str]) -> np.ndarray:
        raise AssertionError

    interval, _ = evaluation.compare(preference, ["p"], ["a"], ["a"], np.ones(1, bool))
    assert interval.mean == 0.5


def numbered(trained: Params, prompts: Prompts, key: Array, version: int) -> Candidates:
    """Candidate m of prompt b is the token 10 b + m, of length m + 1; its feature is its token."""
    tokens = 10 * jnp.asarray(prompts.tokens)[:, :1, None] + jnp.arange(3)[None, :, None]
    lengths = jnp.broadcast_to(jnp.arange(1, 4), tokens.shape[:2])
    return Candidates(tokens, lengths, jnp.zeros(tokens.shape), tokens.astype(jnp.float32))


def as_text(candidates: Candidates) -> list[list[str]]:
    return [[str(int(token)) for token in row] for row in candidates.tokens[..., 0]]


def of_even_length(candidates: Candidates) -> np.ndarray:
    return np.asarray(candidates.lengths) % 2 == 0


HELD_OUT = [
    ({"id": ["a", "b"], "tokens": jnp.array([[1], [2]]), "valid": jnp.ones((2, 1), bool)}, np.array([True, True])),
    ({"id": ["c", "c"], "tokens": jnp.array([[3], [3]]), "valid": jnp.ones((2, 1), bool)}, np.array([True, False])),
]


def test_greedy_returns_each_held_out_prompt_once_in_order() -> None:
    responses = evaluation.greedy(numbered, as_text, of_even_length, {}, 0, HELD_OUT)
    assert responses.texts == ["10", "20", "30"]
    assert responses.lengths.tolist() == [1, 1, 1]
    assert not responses.finished.any()


def test_best_of_n_keeps_what_the_ensembles_mean_ranks_highest() -> None:
    reward_model = ensemble.init(EnsembleSettings(num_heads=3, hidden_size=4), 1, jax.random.key(0))
    rewards = np.asarray(ensemble.rewards(reward_model, jnp.arange(10.0, 40.0)[None, :, None]).mean(0))[0]
    responses = evaluation.best_of_n(
        numbered,
        as_text,
        of_even_length,
        lambda batch, candidates, texts: candidates.features,
        {},
        0,
        reward_model,
        HELD_OUT,
        jax.random.key(1),
    )
    best = [int(rewards[start - 10 : start - 7].argmax()) for start in (10, 20, 30)]
    assert responses.texts == [str(start + offset) for start, offset in zip((10, 20, 30), best, strict=True)]
    assert responses.lengths.tolist() == [offset + 1 for offset in best]
    assert responses.finished.tolist() == [offset % 2 == 1 for offset in best]
