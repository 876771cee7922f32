"""The abstract parameter tree of a model and the random parameters drawn from it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.nn.initializers import ones, zeros
from jaxtyping import PRNGKeyArray

from sea_jax.types import Array, Params


@dataclass(frozen=True)
class ParamSpec:
    """What is known of a parameter before it has a value.

    Attributes:
      shape: its shape.
      axes: a logical name for each axis (layers, vocab, embed, heads, kv_heads, mlp), None where none is ever sharded.
      init: (key, shape, dtype) -> the first value.
      dtype: its dtype.
      wide: it stays in this dtype where the others are cast to that of a computation.
    """

    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    init: Callable[..., Array]
    dtype: Any = jnp.float32
    wide: bool = False


def norm(*shape: int, bias: bool = True) -> Params:
    """Describes norms, "scale" and "bias" of a shape ([layers,] width), that begin as the identity; an RMSNorm has no bias."""
    axes = ("layers",) * (len(shape) - 1) + (None,)
    scale = {"scale": ParamSpec(shape, axes, ones)}
    return scale | {"bias": ParamSpec(shape, axes, zeros)} if bias else scale


def matrices(
    shape: tuple[int, int, int], axes: tuple[str, str], init: Callable[..., Array], bias: bool = True
) -> Params:
    """Describes one matrix per layer, "kernel" [layers, rows, columns] and "bias" [layers, columns].

    Args:
      shape: (layers, rows, columns).
      axes: logical names of rows and columns.
      init: of the matrices; biases begin at 0.
      bias: there is one.
    """
    kernel = {"kernel": ParamSpec(shape, ("layers", *axes), init)}
    return kernel | {"bias": ParamSpec((shape[0], shape[2]), ("layers", axes[1]), zeros)} if bias else kernel


def initialise(abstract: Params, key: PRNGKeyArray) -> Params:
    """Draws every parameter of a tree of ParamSpec by its own initialiser, with a split of the key of its own."""
    specs, structure = jax.tree.flatten(abstract)
    keys = jax.random.split(key, len(specs))
    leaves = [spec.init(key, spec.shape, spec.dtype) for spec, key in zip(specs, keys, strict=True)]
    return jax.tree.unflatten(structure, leaves)
