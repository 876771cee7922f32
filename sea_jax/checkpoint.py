"""Checkpoints with Orbax: the whole state of a run, written in the background, the newest few kept."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias

import jax
from absl import logging
from orbax.checkpoint import v1 as ocp

Checkpointer: TypeAlias = ocp.training.Checkpointer


@contextmanager
def open_directory(directory: Path, keep: int) -> Iterator[Checkpointer]:
    """Opens a directory of checkpoints; on leaving, waits until the last save is on disk.

    Args:
      directory: made if there is none.
      keep: newest checkpoints kept.

    Yields:
      An Orbax checkpointer.
    """
    policy = ocp.training.preservation_policies.LatestN(keep)
    checkpointer = Checkpointer(directory.absolute(), preservation_policy=policy, cleanup_tmp_directories=True)
    try:
        yield checkpointer
    finally:
        checkpointer.close()


def save(checkpointer: Checkpointer, step: int, state: Any) -> None:
    """Writes a state; returns once it is copied, the disk is written in the background.

    Args:
      checkpointer: from `open_directory`.
      step: names the checkpoint; one that is there already is left as it is.
      state: a pytree of arrays and Python numbers.
    """
    if checkpointer.latest is not None and checkpointer.latest.step >= step:
        return
    checkpointer.save_async(step, state)


def restore(checkpointer: Checkpointer, like: Any) -> tuple[int, Any] | None:
    """Reads the newest checkpoint that can be read; one that is damaged is passed over with a warning.

    Args:
      checkpointer: from `open_directory`.
      like: a state of the same structure, shapes and dtypes.

    Returns:
      (step, state), or None if there is no checkpoint.

    Raises:
      ValueError: there are checkpoints and none can be read.
    """
    abstract = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding) if isinstance(x, jax.Array) else x, like
    )
    found = sorted((metadata.step for metadata in checkpointer.checkpoints), reverse=True)
    reason: Exception | None = None
    for step in found:
        try:
            return step, checkpointer.load(step, abstract)
        except (ValueError, OSError, KeyError) as error:
            logging.warning("checkpoint %d cannot be read and is passed over: %s", step, error)
            reason = error
    if found:
        raise ValueError(f"none of the checkpoints {found} can be read; the oldest says: {reason}") from reason
    return None
