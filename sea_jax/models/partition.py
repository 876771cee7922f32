"""Where parameters and activations lie on a mesh, by the logical names of their axes; without a mesh nothing is done.

The mesh is the one of `jax.set_mesh`, its axes are "data", "fsdp" and "tensor". Batches are divided over the first two,
so that each of their devices works on prompts of its own; parameters over the last two: a layer's are gathered over
"fsdp" where they are used (https://arxiv.org/abs/2304.11277), and never over "tensor" (https://arxiv.org/abs/1909.08053).
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Shaped

from sea_jax.models.parameters import ParamSpec
from sea_jax.types import Array, Params

MESH_AXES = ("data", "fsdp", "tensor")

RULES: Mapping[str, tuple[str, ...]] = {
    "batch": ("data", "fsdp"),
    "embed": ("fsdp",),
    "vocab": ("tensor",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "mlp": ("tensor",),
}
"""Logical axis -> the mesh axes that divide it; an axis that is not here is whole on every device."""

Axes = Sequence[str | None]


def spec(axes: Axes, shape: Sequence[int], sizes: Mapping[str, int]) -> PartitionSpec:
    """Returns how an array is divided over a mesh; an axis that its mesh axes do not divide evenly stays whole.

    Args:
      axes: a logical name, or None, for each axis of the array.
      shape: of the array.
      sizes: devices along each mesh axis.
    """

    def of_axis(axis: str | None, size: int) -> str | tuple[str, ...] | None:
        names = RULES.get(axis or "", ())
        count = math.prod(sizes[name] for name in names)
        if count == 1 or size % count:
            return None
        return names if len(names) > 1 else names[0]

    entries = [of_axis(axis, size) for axis, size in zip(axes, shape, strict=True)]
    while entries and entries[-1] is None:  # as XLA writes it: another spelling would be compiled for once more
        entries.pop()
    return PartitionSpec(*entries)


def divides() -> bool:
    """Whether the mesh has devices to divide anything over."""
    mesh = jax.sharding.get_abstract_mesh()
    return not mesh.empty and mesh.size > 1


def constrain(x: Shaped[Array, "*shape"], *axes: str | None) -> Shaped[Array, "*shape"]:
    """Fixes, inside jit, how an array is divided over the mesh.

    Args:
      x: any array.
      axes: logical names of its first axes; those that are left out are whole.
    """
    if not divides():
        return x
    mesh = jax.sharding.get_abstract_mesh()
    named = (*axes, *(None,) * (x.ndim - len(axes)))
    return jax.lax.with_sharding_constraint(x, spec(named, x.shape, mesh.shape))


def batches(tree: Any) -> Any:
    """Divides the first axis, [B, ...], of every array of a tree as batches are."""
    return jax.tree.map(lambda x: constrain(x, "batch"), tree)


def whole(tree: Any) -> Any:
    """Puts every array of a tree whole on every device, for the host to read."""
    return jax.tree.map(constrain, tree)


def gathered(params: Any, specs: Any, dtype: Any) -> Any:
    """Gathers parameters over "fsdp" for their use; their gradients are scattered again.

    Args:
      params: one layer's, or any other part.
      specs: ParamSpec of each, whose axes may begin with a "layers" that the parameters do not have.
      dtype: of matrices; they are cast before they travel.
    """

    def gather(x: Shaped[Array, "*shape"], described: ParamSpec) -> Shaped[Array, "*shape"]:
        axes = described.axes[len(described.axes) - x.ndim :]
        # Two constraints: the gradient passes them in reverse and so ends divided as the parameter is.
        divided = constrain(x, *axes)
        divided = divided.astype(dtype) if x.ndim > 1 else divided
        return constrain(divided, *(None if axis == "embed" else axis for axis in axes))

    return jax.tree.map(gather, params, specs)


def as_stored(params: Params, specs: Params) -> Params:
    """Divides parameters, or what is shaped like them, as they are kept between steps, by the ParamSpec of each."""
    return jax.tree.map(lambda x, described: constrain(x, *described.axes), params, specs)


def abstract_batches(tree: Any) -> Any:
    """Returns the shapes of a tree of arrays or shapes, their first axis divided as batches are.

    Numbers without axes are whole.

    Returns:
      A tree of jax.ShapeDtypeStruct with the shardings of the mesh.
    """
    mesh = jax.sharding.get_mesh()

    def describe(x: Any) -> jax.ShapeDtypeStruct:
        axes = ("batch", *(None,) * (len(x.shape) - 1)) if x.shape else ()
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec(axes, x.shape, mesh.shape)))

    return jax.tree.map(describe, tree)


def _in_norm(path: Sequence[Any]) -> bool:
    """Whether a parameter is a norm's, to judge by the way to it in the tree."""
    return any("norm" in str(getattr(key, "key", "")) for key in path)


def cast(params: Params, dtype: Any) -> Params:
    """Returns parameters as they take part in a computation in a dtype.

    Args:
      params: arrays.
      dtype: of matrices and biases; what norms hold is float32, since they compute in it.
    """
    return jax.tree_util.tree_map_with_path(lambda path, x: x.astype(jnp.float32 if _in_norm(path) else dtype), params)


def _stored_dtype(path: Sequence[Any], described: ParamSpec, dtype: Any) -> Any:
    """The dtype in which a parameter lies on the devices, for a computation in a dtype."""
    return described.dtype if described.wide else jnp.float32 if _in_norm(path) else dtype


def put(params: Params, specs: Params, dtype: Any = jnp.float32) -> Params:
    """Brings parameters from the host onto the devices of the mesh, each device its part.

    Args:
      params: numpy arrays.
      specs: ParamSpec of each.
      dtype: as for `cast`.
    """
    mesh = jax.sharding.get_mesh()

    def place(path: Any, x: np.ndarray, described: ParamSpec) -> Array:
        host = np.asarray(x, _stored_dtype(path, described, dtype))
        if mesh.empty:
            return jax.device_put(host)
        sharding = NamedSharding(mesh, spec(described.axes, host.shape, mesh.shape))
        return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])

    return jax.tree_util.tree_map_with_path(place, params, specs)


def abstract(specs: Params, dtype: Any = jnp.float32) -> Params:
    """Returns what `put` would, without values: jax.ShapeDtypeStruct with the shardings of the mesh.

    Args:
      specs: ParamSpec of each parameter.
      dtype: as for `cast`.
    """
    mesh = jax.sharding.get_mesh()

    def describe(path: Any, described: ParamSpec) -> jax.ShapeDtypeStruct:
        shape = described.shape
        sharding = None if mesh.empty else NamedSharding(mesh, spec(described.axes, shape, mesh.shape))
        return jax.ShapeDtypeStruct(shape, _stored_dtype(path, described, dtype), sharding=sharding)

    return jax.tree_util.tree_map_with_path(describe, specs)
