"""What has been labelled, as cached features on the devices, for the ERM to learn from."""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Bool, Float32, Int32, PRNGKeyArray

from sea_jax.models import partition
from sea_jax.settings import AT_LEAST_1, setting
from sea_jax.types import Array


@dataclass(frozen=True)
class ReplaySettings:
    """How much is remembered."""

    replay_capacity: int = setting(
        50_000, "pairs kept, first in, first out", AT_LEAST_1, unit="pairs", source="authors' code"
    )


RESIZABLE = ("replay/features", "replay/labels")  # where its pairs stand in a run's state, as many as it has room for


@struct.dataclass
class Replay:
    """The last C oracle-labelled pairs as cached features, first in, first out.

    Attributes:
      features: of the first and second response.
      labels: probability that the first wins.
      added: pairs ever added; the next one goes to slot added % C.
    """

    features: Float32[Array, "C 2 d"]
    labels: Float32[Array, " C"]
    added: Int32[Array, ""]


def empty_replay(capacity: int, num_features: int) -> Replay:
    """Returns a replay with room for `capacity` pairs of d = `num_features`."""

    @jax.jit
    def empty() -> Replay:
        return _divided(jnp.zeros((capacity, 2, num_features)), jnp.zeros(capacity), jnp.zeros((), jnp.int32))

    return empty()


def _divided(features: Float32[Array, "C 2 d"], labels: Float32[Array, " C"], added: Int32[Array, ""]) -> Replay:
    """A replay whose pairs are divided over the mesh like a batch."""
    return Replay(partition.constrain(features, "batch"), partition.constrain(labels, "batch"), partition.whole(added))


@partial(jax.jit, static_argnames="capacity")
def resized(replay: Replay, capacity: int) -> Replay:
    """Returns a replay of another capacity with the newest pairs that it has room for."""
    former, num_features = replay.labels.shape[0], replay.features.shape[-1]
    number = replay.added - former + jnp.arange(former)  # of the pairs that are held, the oldest first
    kept = (number >= 0) & (number >= replay.added - capacity)
    slot = jnp.where(kept, number % capacity, capacity)  # out of bounds: dropped by the scatter
    return _divided(
        jnp.zeros((capacity, 2, num_features)).at[slot].set(replay.features[number % former], mode="drop"),
        jnp.zeros(capacity).at[slot].set(replay.labels[number % former], mode="drop"),
        replay.added,
    )


@jax.jit
def add_pairs(
    replay: Replay, features: Float32[Array, "B 2 d"], labels: Float32[Array, " B"], keep: Bool[Array, " B"]
) -> Replay:
    """Appends the kept pairs of a batch to a replay of capacity C >= B; the oldest pairs make room."""
    capacity = replay.labels.shape[0]
    slot = (replay.added + jnp.cumsum(keep) - 1) % capacity
    slot = jnp.where(keep, slot, capacity)  # out of bounds: dropped by the scatter
    return _divided(
        replay.features.at[slot].set(features, mode="drop"),
        replay.labels.at[slot].set(labels, mode="drop"),
        replay.added + keep.sum(dtype=jnp.int32),
    )


def sample_pairs(
    replay: Replay, batch_size: int, key: PRNGKeyArray
) -> tuple[Float32[Array, "b 2 d"], Float32[Array, " b"], Float32[Array, " b"]]:
    """Draws a batch uniformly and without replacement; while the replay holds fewer pairs, all of them.

    Args:
      replay: of capacity C.
      batch_size: pairs; b is at most C.
      key: random key.

    Returns:
      Features, labels, and weights: 0 for rows that hold no pair.
    """
    capacity = replay.labels.shape[0]
    held = jnp.arange(capacity) < replay.added
    order = jnp.where(held, jax.random.uniform(key, (capacity,)), -1.0)
    _, rows = jax.lax.top_k(order, min(batch_size, capacity))
    return replay.features[rows], replay.labels[rows], held[rows].astype(jnp.float32)
