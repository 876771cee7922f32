"""Some rows of many, side by side, so that what works on rows alone works on those that count and on no others."""

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Bool, Int32, Shaped

from sea_jax.models import partition
from sea_jax.types import Array

GRAIN = 8  # sizes are multiples of an eighth of all rows: a few programs, whatever the lengths are


def rounded(count: int, num_rows: int) -> int | None:
    """Returns a size for `count` of so many rows; None: all, which need not be packed, or a mesh lets no row move."""
    grain = -(-num_rows // GRAIN)
    size = -(-count // grain) * grain
    return None if size >= num_rows or partition.divides() else size


@flax.struct.dataclass
class Packing:
    """R of N rows; each is there once.

    Attributes:
      rows: which they are.
      places: where each of the N stands among them; R or more where it is left out.
    """

    rows: Int32[Array, " R"]
    places: Int32[Array, " N"]


def choose(wanted: Bool[Array, " N"], size: int) -> Packing:
    """Returns R = `size` rows: the wanted ones in their order, of which there must be no more, and others to fill up."""
    order = jnp.argsort(~wanted, stable=True)
    return Packing(order[:size].astype(jnp.int32), jnp.argsort(order).astype(jnp.int32))


@jax.custom_vjp
def pack(x: Shaped[Array, "N ..."], packing: Packing) -> Shaped[Array, "R ..."]:
    """Takes the rows that are there."""
    return x[packing.rows]


@jax.custom_vjp
def spread(x: Shaped[Array, "R ..."], packing: Packing) -> Shaped[Array, "N ..."]:
    """Puts rows back where they were taken from; those that were left out are 0."""
    there = (packing.places < len(x)).reshape(-1, *(1,) * (x.ndim - 1))
    return jnp.where(there, x[jnp.minimum(packing.places, len(x) - 1)], 0)


# The gradient of one is the other: two gathers, where JAX's own would scatter.
pack.defvjp(lambda x, packing: (pack(x, packing), packing), lambda packing, dy: (spread(dy, packing), None))
spread.defvjp(lambda x, packing: (spread(x, packing), packing), lambda packing, dy: (pack(dy, packing), None))
