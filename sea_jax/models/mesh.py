"""The mesh that a run computes on, and what it must divide."""

import math
from collections.abc import Mapping, Sequence

import jax
from absl import logging
from jax.sharding import AxisType, Mesh

from sea_jax.models.config import DebertaConfig, ModelConfig
from sea_jax.models.partition import MESH_AXES


def resolve_mesh(shape: Sequence[int], num_devices: int) -> tuple[int, ...]:
    """Returns a mesh's shape, three numbers, with -1 replaced by what makes use of all devices.

    Args:
      shape: devices along "data", "fsdp" and "tensor"; one of them may be -1.
      num_devices: how many there are.

    Raises:
      ValueError: the shape does not go with the number of devices.
    """
    known = math.prod(size for size in shape if size != -1)
    resolved = tuple(num_devices // known if size == -1 else size for size in shape)
    if math.prod(resolved) > num_devices or 0 in resolved or (-1 in shape and num_devices % known):
        raise ValueError(
            f"config.mesh={tuple(shape)}: {known} devices or a multiple are needed, there are {num_devices}; the three numbers "
            f"are the devices along {', '.join(MESH_AXES)}, their product at most {num_devices}"
        )
    return resolved


def make_mesh(shape: Sequence[int], devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Returns the mesh of a run, for `jax.set_mesh`, over the first devices: over all where there are several processes.

    Args:
      shape: devices along "data", "fsdp" and "tensor"; one of them may be -1: all that are left.
      devices: of all processes; None: those that JAX finds.

    Raises:
      ValueError: the shape does not go with the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    resolved = resolve_mesh(shape, len(devices))
    used = math.prod(resolved)
    if used < len(devices):
        if jax.process_count() > 1:
            raise ValueError(
                f"config.mesh={tuple(shape)} uses {used} of {len(devices)} devices; with several processes all must be used: "
                "put -1 in one place"
            )
        logging.warning("config.mesh=%s uses %d of %d devices", tuple(shape), used, len(devices))
    return jax.make_mesh(resolved, MESH_AXES, axis_types=(AxisType.Auto,) * 3, devices=devices[:used])


def mesh_sizes(mesh: Mesh) -> tuple[int, int, int]:
    """Returns how many devices there are along "data", "fsdp" and "tensor"."""
    data, fsdp, tensor = (mesh.shape[name] for name in MESH_AXES)
    return data, fsdp, tensor


def check_divides(
    mesh: Mesh, batch_sizes: Mapping[str, int], models: Mapping[str, ModelConfig | DebertaConfig]
) -> None:
    """Refuses batches and models that a mesh does not divide evenly.

    Args:
      mesh: from `make_mesh`.
      batch_sizes: by the config field that holds each.
      models: by the config field that names each.

    Raises:
      ValueError: one line per size that is not divided.
    """
    data, fsdp, tensor = mesh_sizes(mesh)
    faults = [
        f"config.{field}={size}: must be a multiple of {data * fsdp}, the mesh's data x fsdp"
        for field, size in batch_sizes.items()
        if size % (data * fsdp)
    ]
    for field, model in models.items():
        for what, size, axis, count in (
            ("attention heads", model.num_heads, "tensor", tensor),
            ("key and value heads", model.num_kv_heads, "tensor", tensor),
            ("hidden features of the MLP", model.d_ff, "tensor", tensor),
            ("features", model.d_model, "fsdp", fsdp),
        ):
            if size % count:
                faults.append(f"config.{field}: its {size} {what} must be a multiple of {count}, the mesh's {axis}")
    if faults:
        raise ValueError(f"config.mesh={mesh_sizes(mesh)} (data, fsdp, tensor) does not fit:\n" + "\n".join(faults))
