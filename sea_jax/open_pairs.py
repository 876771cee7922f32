"""Pairs that somebody was asked about and has not answered yet, with all that is learnt from them once they are answered."""

from collections.abc import Sequence
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Bool, Float32, Int32

from sea_jax.models import partition
from sea_jax.types import AnyArray, Array, PreferenceBatch, Prompts

FREE = -1


@struct.dataclass
class OpenPairs:
    """Room for C pairs.

    Attributes:
      step: that asked about a pair; FREE where there is none.
      row: which of that step's it was.
      version: policy steps taken when it was asked about.
      prompts: padded to the longest that there will be.
      tokens: of the first and second response.
      lengths: response tokens.
      features: what the ERM sees of them.
    """

    step: Int32[Array, " C"]
    row: Int32[Array, " C"]
    version: Int32[Array, " C"]
    prompts: Prompts
    tokens: Int32[Array, "C 2 T"]
    lengths: Int32[Array, "C 2"]
    features: Float32[Array, "C 2 d"]

    def taken(self) -> list[int]:
        """Returns the slots that hold a pair, what was asked first first."""
        step, row = np.asarray(self.step), np.asarray(self.row)
        order = np.lexsort((row, step))
        return order[step[order] != FREE].tolist()


def empty_open_pairs(capacity: int, prompt_length: int, response_length: int, num_features: int) -> OpenPairs:
    """Returns room for C = `capacity` pairs of P, T and d such."""

    def filled(value: int | float | bool, *shape: int) -> Array:
        return partition.whole(jnp.full((capacity, *shape), value))

    free = filled(FREE)
    return OpenPairs(
        step=free,
        row=free,
        version=free,
        prompts=Prompts(filled(0, prompt_length), filled(False, prompt_length)),
        tokens=filled(0, 2, response_length),
        lengths=filled(0, 2),
        features=filled(0.0, 2, num_features),
    )


def add(
    pairs: OpenPairs,
    chosen: Bool[np.ndarray, " B"],
    *,
    step: int,
    version: int,
    prompts: Prompts,
    tokens: Int32[Array, "B 2 T"],
    lengths: Int32[Array, "B 2"],
    features: Float32[Array, "B 2 d"],
) -> OpenPairs:
    """Keeps the chosen rows of a step's pairs; there must be room."""
    rows = np.flatnonzero(chosen)
    slots = np.flatnonzero(np.asarray(pairs.step) == FREE)[: len(rows)]
    missing = pairs.prompts.tokens.shape[1] - prompts.tokens.shape[1]

    def padded(values: AnyArray) -> Array:
        return jnp.pad(jnp.asarray(values), ((0, 0), (missing, 0)))

    new = OpenPairs(
        step=jnp.full(len(chosen), step),
        row=jnp.arange(len(chosen)),
        version=jnp.full(len(chosen), version),
        prompts=Prompts(padded(prompts.tokens), padded(prompts.valid)),
        tokens=tokens,
        lengths=lengths,
        features=features,
    )
    return jax.tree.map(lambda held, values: partition.whole(held.at[slots].set(values[rows])), pairs, new)


def free(pairs: OpenPairs, slots: Sequence[int]) -> OpenPairs:
    """Forgets the pairs of some slots."""
    return replace(pairs, step=partition.whole(pairs.step.at[np.array(slots, int)].set(FREE)))


def batch_of(
    pairs: OpenPairs, slots: Sequence[int], labels: Sequence[float], batch_size: int
) -> tuple[PreferenceBatch, Float32[Array, "B 2 d"]]:
    """Returns B = `batch_size` pairs to learn from, and their features.

    Args:
      pairs: OpenPairs.
      slots: of those that are answered, 1 to B; what fills the batch up has no weight.
      labels: of each, the probability that the first response wins.
      batch_size: B.
    """
    missing = batch_size - len(slots)
    rows = np.array([*slots, *[slots[0]] * missing])
    batch = PreferenceBatch(
        prompts=Prompts(pairs.prompts.tokens[rows], pairs.prompts.valid[rows]),
        tokens=pairs.tokens[rows],
        lengths=pairs.lengths[rows],
        labels=jnp.array([*labels, *[0.5] * missing], jnp.float32),
        weights=(jnp.arange(batch_size) < len(slots)).astype(jnp.float32),
    )
    return batch, pairs.features[rows]
