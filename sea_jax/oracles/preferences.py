"""Who labels a duel. A preference is noise-free taste; an oracle turns it into labels, and wrappers add noise to any oracle."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float64, Key
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


def probabilities(
    preference: Preference, prompts: Sequence[str], first: Sequence[str], second: Sequence[str]
) -> Float64[np.ndarray, " N"]:
    """Returns P(first wins) as a preference, which may be anybody's code, says.

    Raises:
      ValueError: it returns another number of values, or one outside [0, 1].
    """
    probability = np.asarray(preference(prompts, first, second), np.float64)
    if probability.shape != (len(prompts),):
        raise ValueError(f"the oracle was asked about {len(prompts)} pairs and returned shape {probability.shape}")
    if not ((probability >= 0) & (probability <= 1)).all():
        raise ValueError(f"the oracle's probabilities must lie in [0, 1]; found {probability}")
    return probability


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
        prompts: Sequence[str], first: Sequence[str], second: Sequence[str], keys: Keys, asks: Sequence[str]
    ) -> Judgement:
        names: dict[str, Any] = {"keys": list(asks)} if wants_keys else {}
        probability = probabilities(partial(preference, **names), prompts, first, second)
        return Judgement(probability, labels(probability, keys))

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


def flipped(oracle: Oracle, flip_probability: float) -> Oracle:
    """Wraps any oracle so that each label is exchanged (z -> 1 - z) with a given probability (SEA paper, App. G.4).

    The probabilities stay the noise-free ones; the labels are noisy.
    """

    def noisy(
        prompts: Sequence[str], first: Sequence[str], second: Sequence[str], keys: Keys, asks: Sequence[str]
    ) -> Judgement:
        own, inner = jnp.unstack(jax.vmap(jax.random.split)(keys), axis=1)
        judgement = oracle(prompts, first, second, inner, asks)
        flip = np.asarray(jax.vmap(jax.random.uniform)(own)) < flip_probability
        return judgement._replace(label=np.where(flip, 1 - judgement.label, judgement.label))

    return noisy
