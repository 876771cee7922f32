"""Who labels a duel. A preference is noise-free taste; an oracle turns it into labels, and wrappers add noise to any oracle."""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jaxtyping import Bool, Float64, Int, Key
from scipy.special import expit

from sea_jax.types import Array, Judgement, Oracle, Preference, Reward

Keys = Key[Array, " N"]  # one for each duel, so that its noise does not depend on its neighbours
Labels = Callable[[Float64[np.ndarray, " N"], Keys], Float64[np.ndarray, " N"]]  # P(first wins), keys -> labels


def by_reward(reward: Reward, scale: float) -> Preference:
    """Bradley-Terry preference of a scalar reward: P(first wins) = sigmoid(scale (r(first) - r(second))), Eq. 3.

    Args:
      reward: of prompts and responses.
      scale: inverse temperature.
    """

    def preference(prompts: Sequence[str], first: Sequence[str], second: Sequence[str]) -> np.ndarray:
        rewards = reward([*prompts, *prompts], [*first, *second])
        count = len(prompts)
        return expit(scale * (rewards[:count] - rewards[count:]))

    preference.pointwise = True  # type: ignore[attr-defined]
    return preference


def deterministic(probability: Float64[np.ndarray, " N"], keys: Keys) -> Float64[np.ndarray, " N"]:
    """Labels with the preferred response, 0 or 1; exact ties stay one half."""
    return (np.sign(probability - 0.5) + 1) / 2


def bradley_terry(probability: Float64[np.ndarray, " N"], keys: Keys) -> Float64[np.ndarray, " N"]:
    """Draws z ~ Ber(P(first wins)), 0 or 1."""
    uniform = np.asarray(jax.vmap(jax.random.uniform)(keys))
    return (uniform < probability).astype(np.float64)


def soft(probability: Float64[np.ndarray, " N"], keys: Keys) -> Float64[np.ndarray, " N"]:
    """Hands the probability itself on as the label."""
    return probability


LABELS: Mapping[str, Labels] = {"deterministic": deterministic, "bradley_terry": bradley_terry, "soft": soft}


ORDER = 0x6F726465  # folded into an ask's key, apart from what its noise is drawn from


def drawn_order(keys: Keys) -> Bool[np.ndarray, " N"]:
    """Draws which pairs are shown the other way round, from the keys of their asks."""
    return np.asarray(jax.vmap(lambda key: jax.random.bernoulli(jax.random.fold_in(key, ORDER)))(keys))


def answers(
    preference: Preference,
    prompts: Sequence[str],
    first: Sequence[str],
    second: Sequence[str],
    swapped: Bool[np.ndarray, " N"],
    **names: Any,
) -> Iterator[tuple[Int[np.ndarray, " n"], Float64[np.ndarray, " n"]]]:
    """Yields what a preference says, which may be anybody's code, as its answers come.

    Args:
      preference: Preference.
      prompts: N.
      first: N responses.
      second: N responses.
      swapped: pairs that are shown the other way round unless the preference is pointwise.
      names: handed on to the preference.

    Yields:
      Rows and P(first wins) of those that are answered, turned back.

    Raises:
      ValueError: it answers with another number of values, a row that it was not asked about or has answered before, or
        a number outside [0, 1].
    """
    if getattr(preference, "pointwise", False):
        swapped = np.zeros(len(prompts), bool)
    shown_first = [b if swap else a for a, b, swap in zip(first, second, swapped, strict=True)]
    shown_second = [a if swap else b for a, b, swap in zip(first, second, swapped, strict=True)]
    answered: set[int] = set()
    for rows, probability in _chunks(preference(prompts, shown_first, shown_second, **names), len(prompts)):
        for row in rows.tolist():
            if row not in range(len(prompts)) or row in answered:
                raise ValueError(
                    f"the oracle was asked about {len(prompts)} pairs and answered about pair {row} (again?)"
                )
            answered.add(row)
        known = ~np.isnan(probability)
        rows, probability = rows[known], probability[known]
        if not ((probability >= 0) & (probability <= 1)).all():
            raise ValueError(f"the oracle's probabilities must lie in [0, 1]; found {probability}")
        if len(rows):
            yield rows, np.where(swapped[rows], 1 - probability, probability)


def _chunks(said: Any, count: int) -> Iterator[tuple[Int[np.ndarray, " n"], Float64[np.ndarray, " n"]]]:
    """Rows and probabilities, NaN where there is no answer, of whatever form a preference answers in."""
    if isinstance(said, Iterator):
        for row, probability in said:
            yield np.array([row]), np.array([probability], np.float64)
        return
    probability = np.asarray(said, np.float64)  # None becomes NaN
    if probability.shape != (count,):
        raise ValueError(f"the oracle was asked about {count} pairs and returned shape {probability.shape}")
    yield np.arange(count), probability


def labelled(preference: Preference, labels: Labels) -> Oracle:
    """Makes an oracle of a preference and a way to label.

    Args:
      preference: if it has a parameter `keys`, it is given the names of the asks there.
      labels: one of LABELS.

    Raises:
      ValueError: the preference's `keys` has no default; or (by the oracle) the preference returns a wrong number of
        values, or one outside [0, 1].
    """
    wants_keys = _wants_keys(preference)

    def oracle(
        prompts: Sequence[str],
        first: Sequence[str],
        second: Sequence[str],
        swapped: Bool[np.ndarray, " N"],
        keys: Keys,
        asks: Sequence[str],
    ) -> Iterator[Judgement]:
        names: dict[str, Any] = {"keys": list(asks)} if wants_keys else {}
        for rows, probability in answers(preference, prompts, first, second, swapped, **names):
            yield Judgement(rows, probability, labels(probability, keys[rows]))

    return oracle


def _wants_keys(preference: Preference) -> bool:
    """Whether a preference takes the names of the asks."""
    try:
        keys = inspect.signature(preference).parameters.get("keys")
    except ValueError:  # some callables written in C tell nothing of their parameters
        return False
    if keys is not None and keys.default is inspect.Parameter.empty:
        raise ValueError(
            f"the oracle's function {getattr(preference, '__name__', preference)}: its parameter `keys` needs a default of "
            "None, since win rates are measured without"
        )
    return keys is not None


SEEN, CERTAIN = 64, 0.95  # pairs after which a share of certain ones is told


def told_if_certain(oracle: Oracle, scale: float) -> Oracle:
    """Says once in the log if nearly all probabilities are 0 or 1, so that there is nothing to draw.

    Args:
      oracle: asked as it is.
      scale: what its rewards are multiplied by.
    """
    seen, certain, told = 0, 0, False

    def watched(
        prompts: Sequence[str],
        first: Sequence[str],
        second: Sequence[str],
        swapped: Bool[np.ndarray, " N"],
        keys: Keys,
        asks: Sequence[str],
    ) -> Iterator[Judgement]:
        nonlocal seen, certain, told
        for judgement in oracle(prompts, first, second, swapped, keys, asks):
            seen += len(judgement.probability)
            certain += int((np.abs(judgement.probability - 0.5) > 0.499).sum())
            if not told and seen >= SEEN and certain >= CERTAIN * seen:
                told = True
                logging.warning(
                    "%d of the oracle's %d probabilities are 0 or 1 to three digits: its labels are as good as deterministic; "
                    "lower config.oracle.scale (%g) if they should not be",
                    *(certain, seen, scale),
                )
            yield judgement

    return watched


def flipped(oracle: Oracle, flip_probability: float) -> Oracle:
    """Wraps any oracle so that each label is exchanged (z -> 1 - z) with a given probability (SEA paper, App. G.4).

    The probabilities stay the noise-free ones; the labels are noisy.
    """

    def noisy(
        prompts: Sequence[str],
        first: Sequence[str],
        second: Sequence[str],
        swapped: Bool[np.ndarray, " N"],
        keys: Keys,
        asks: Sequence[str],
    ) -> Iterator[Judgement]:
        own, inner = jnp.unstack(jax.vmap(jax.random.split)(keys), axis=1)
        flip = np.asarray(jax.vmap(jax.random.uniform)(own)) < flip_probability
        for judgement in oracle(prompts, first, second, swapped, inner, asks):
            label = np.where(flip[judgement.rows], 1 - judgement.label, judgement.label)
            yield judgement._replace(label=label)

    return noisy
