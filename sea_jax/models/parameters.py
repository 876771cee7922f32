"""The abstract parameter tree of a model and the random parameters drawn from it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.nn.initializers import ones, zeros

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


def norm(*shape: int, bias: bool = True) -> Params:
    """Describes norms that begin as the identity.

    Args:
      *shape: ([layers,] width).
      bias: a LayerNorm's; an RMSNorm has none.

    Returns:
      {"scale": shape} and, with a bias, "bias": shape.
    """
    axes = ("layers",) * (len(shape) - 1) + (None,)
    scale = {"scale": ParamSpec(shape, axes, ones)}
    return scale | {"bias": ParamSpec(shape, axes, zeros)} if bias else scale


def matrices(
    shape: tuple[int, int, int], axes: tuple[str, str], init: Callable[..., jax.Array], bias: bool = True
) -> Params:
    """Describes one matrix per layer.

    Args:
      shape: (layers, rows, columns).
      axes: logical names of rows and columns.
      init: of the matrices; biases begin at 0.
      bias: there is one.

    Returns:
      {"kernel": shape} and, with a bias, "bias": [layers, columns].
    """
    kernel = {"kernel": ParamSpec(shape, ("layers", *axes), init)}
    return kernel | {"bias": ParamSpec((shape[0], shape[2]), ("layers", axes[1]), zeros)} if bias else kernel


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
