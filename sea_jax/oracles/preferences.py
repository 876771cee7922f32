"""Who labels a duel. A preference is noise-free taste; an oracle turns it into labels, and wrappers add noise to any oracle."""

import functools
import inspect
import math
import operator
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
      names: handed on to the preference; of `finished`, N pairs about the two responses, each is shown as these are.

    Yields:
      Rows and P(first wins) of those that are answered, turned back.

    Raises:
      ValueError: it answers with another number of values, or about a row that it was not asked about or has answered before.
    """
    if getattr(preference, "pointwise", False):
        swapped = np.zeros(len(prompts), bool)
    shown_first = [b if swap else a for a, b, swap in zip(first, second, swapped, strict=True)]
    shown_second = [a if swap else b for a, b, swap in zip(first, second, swapped, strict=True)]
    if "finished" in names:
        names["finished"] = [
            (b, a) if swap else (a, b) for (a, b), swap in zip(names["finished"], swapped, strict=True)
        ]
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
        if len(rows):
            yield rows, np.where(swapped[rows], 1 - probability, probability)


def _chunks(said: Any, count: int) -> Iterator[tuple[Int[np.ndarray, " n"], Float64[np.ndarray, " n"]]]:
    """Rows and probabilities, NaN where there is no answer, of whatever form a preference answers in."""
    if isinstance(said, Iterator):
        for answer in said:
            row, value = row_and_value(answer)
            yield np.array([row]), np.array([usable(value)])
        return
    yield np.arange(count), usable_values(said, count)


def row_and_value(answer: Any) -> tuple[int, Any]:
    """Takes apart what a preference yields.

    Raises:
      ValueError: it is no pair of a row and something.
    """
    try:
        row, value = answer
        return operator.index(row), value
    except (TypeError, ValueError):
        raise ValueError(
            f"the oracle yielded {answer!r}; it must yield (row, probability), rows counted from 0"
        ) from None


def usable_values(said: Any, count: int) -> Float64[np.ndarray, " N"]:
    """Returns N = `count` answers as probabilities, NaN where there is none that can be used.

    Raises:
      ValueError: there is another number of them.
    """
    values = said if isinstance(said, np.ndarray | jax.Array) else np.array(said, object)  # texts stay texts
    if values.shape != (count,):
        raise ValueError(f"the oracle was asked about {count} pairs and returned shape {values.shape}")
    return np.array([usable(value) for value in values.tolist()], np.float64)


TOLD = 10  # answers that are shown of those that cannot be used


def usable(value: Any) -> float:
    """Returns an answer as a probability; NaN, with a warning unless it says that there is none, where it cannot be one."""
    try:
        number = np.asarray(value, np.float64)  # None becomes NaN
        probability = float(number) if number.ndim == 0 else -math.inf
    except (TypeError, ValueError):
        probability = -math.inf
    if 0 <= probability <= 1 or math.isnan(probability):
        return probability
    logging.log_first_n(
        logging.WARNING,
        "the oracle said %.60r of a pair: no probability in [0, 1], and taken as no answer",
        TOLD,
        value,
    )
    return math.nan


def labelled(preference: Preference, labels: Labels) -> Oracle:
    """Makes an oracle of a preference and a way to label.

    Args:
      preference: if it has a parameter `keys`, it is given the names of the asks there; if it has one `finished`, whether
        the first and the second response of each pair ended by themselves.
      labels: one of LABELS.

    Raises:
      ValueError: the preference's `keys` or `finished` has no default; or (by the oracle) the preference returns a wrong
        number of values.
    """
    wants_keys, wants_finished = takes(preference, "keys"), takes(preference, "finished")

    def oracle(
        prompts: Sequence[str],
        first: Sequence[str],
        second: Sequence[str],
        swapped: Bool[np.ndarray, " N"],
        keys: Keys,
        asks: Sequence[str],
        finished: Sequence[tuple[bool, bool]] | None = None,
    ) -> Iterator[Judgement]:
        names: dict[str, Any] = {"keys": list(asks)} if wants_keys else {}
        if wants_finished and finished is not None:
            names["finished"] = list(finished)
        for rows, probability in answers(preference, prompts, first, second, swapped, **names):
            yield Judgement(rows, probability, labels(probability, keys[rows]))

    return oracle


def takes(asked: Callable[..., Any], name: str) -> bool:
    """Returns whether a preference or an oracle takes what not all of them are told, in a parameter of this name.

    Raises:
      ValueError: the parameter has no default.
    """
    try:
        parameter = inspect.signature(asked).parameters.get(name)
    except ValueError:  # some callables written in C tell nothing of their parameters
        return False
    if parameter is not None and parameter.default is inspect.Parameter.empty:
        raise ValueError(
            f"the oracle's function {getattr(asked, '__name__', asked)}: its parameter `{name}` needs a default of "
            "None, since win rates are measured without"
        )
    return parameter is not None


SEEN, CERTAIN = 64, 0.95  # pairs after which a share of certain ones is told


def told_if_certain(oracle: Oracle, scale: float) -> Oracle:
    """Says once in the log if nearly all probabilities are 0 or 1, so that there is nothing to draw.

    Args:
      oracle: asked as it is.
      scale: what its rewards are multiplied by.
    """
    seen, certain, told = 0, 0, False

    @functools.wraps(oracle)  # whoever asks looks for what the oracle is told
    def watched(*asked: Any, **tells: Any) -> Iterator[Judgement]:
        nonlocal seen, certain, told
        for judgement in oracle(*asked, **tells):
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

    @functools.wraps(oracle)  # likewise
    def noisy(
        prompts: Sequence[str],
        first: Sequence[str],
        second: Sequence[str],
        swapped: Bool[np.ndarray, " N"],
        keys: Keys,
        asks: Sequence[str],
        **tells: Any,
    ) -> Iterator[Judgement]:
        own, inner = jnp.unstack(jax.vmap(jax.random.split)(keys), axis=1)
        flip = np.asarray(jax.vmap(jax.random.uniform)(own)) < flip_probability
        for judgement in oracle(prompts, first, second, swapped, inner, asks, **tells):
            label = np.where(flip[judgement.rows], 1 - judgement.label, judgement.label)
            yield judgement._replace(label=label)

    return noisy
