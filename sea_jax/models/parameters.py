"""The abstract parameter tree of a model and the random parameters drawn from it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

Params = dict[str, Any]
"""A nested dict (with tuples of stacks) of arrays, or of the ParamSpec that describe them."""


@dataclass(frozen=True)
class ParamSpec:
    """What is known of a parameter before it has a value.

    Attributes:
      shape: its shape.
      axes: a logical name for each axis (layers, vocab, embed, heads, kv_heads, mlp), None where none is ever sharded.
      init: (key, shape, dtype) -> the first value.
      dtype: its dtype.
    """

    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    init: Callable[..., jax.Array]
    dtype: Any = jnp.float32


def initialise(abstract: Params, key: jax.Array) -> Params:
    """Draws every parameter of an abstract tree by its own initialiser.

    Args:
      abstract: a tree whose leaves are ParamSpec.
      key: a random key; each parameter gets its own split of it.

    Returns:
      A tree of the same structure whose leaves are arrays.
    """
    specs, structure = jax.tree.flatten(abstract)
    keys = jax.random.split(key, len(specs))
    leaves = [spec.init(key, spec.shape, spec.dtype) for spec, key in zip(specs, keys, strict=True)]
    return jax.tree.unflatten(structure, leaves)
