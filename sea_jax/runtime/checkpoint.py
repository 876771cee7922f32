"""Checkpoints with Orbax: the whole state of a run, written in the background, the newest few kept."""

import functools
import gc
import json
import math
import re
import shutil
import sys
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from logging import LogRecord, getLogger
from pathlib import Path
from typing import Any, TypeAlias, TypeVar, cast

import jax
from absl import logging
from flax.traverse_util import unflatten_dict
from jax.sharding import NamedSharding, PartitionSpec
from orbax.checkpoint import v1 as ocp

from sea_jax.runtime import processes
from sea_jax.settings import AT_LEAST_1, setting

Checkpointer: TypeAlias = ocp.training.Checkpointer
Found = TypeVar("Found")

SETTINGS = r"\n| \[tensorstore_spec| See full TensorStore"  # where they begin


@dataclass(frozen=True)
class CheckpointSettings:
    """When the state of a run is saved."""

    every_steps: int = setting(
        10, "between checkpoints; with actor.sync_every, the next push after them", AT_LEAST_1, unit="steps"
    )
    keep: int = setting(2, "newest checkpoints kept, besides that of the best evaluation", AT_LEAST_1)


@contextmanager
def open_directory(directory: Path, keep: int, best_by: str = "") -> Iterator[Checkpointer]:
    """Opens a directory of checkpoints; on leaving, waits until the last save is on disk.

    Args:
      directory: made if there is none; what a killed run left half-written in it is removed.
      keep: newest checkpoints kept.
      best_by: the measure of which the best checkpoint is kept, too; "": none is.

    Raises:
      OSError: the last save failed.
    """
    policies = ocp.training.preservation_policies
    best = policies.BestN(
        get_metric_fn=lambda measures: measures.get(best_by, -math.inf), n=1, keep_checkpoints_without_metrics=False
    )
    policy = policies.AnyPreservationPolicy([policies.LatestN(keep), *([best] if best_by else [])])
    _quiet()
    checkpointer = Checkpointer(directory.absolute(), preservation_policy=policy, cleanup_tmp_directories=True)
    try:
        yield checkpointer
    finally:
        with _name_failures(checkpointer):
            checkpointer.close()


def save(checkpointer: Checkpointer, step: int, state: Any, measures: Mapping[str, float] | None = None) -> None:
    """Writes a state; returns once it is copied, the disk is written in the background.

    Args:
      checkpointer: from `open_directory`.
      step: names the checkpoint; one that is there already is left as it is.
      state: a pytree of arrays and Python numbers.
      measures: how good it is, the more the better; None: nobody knows.

    Raises:
      OSError: this save or the one before failed; the checkpoints before it are whole.
    """
    with _name_failures(checkpointer):
        checkpointer.wait()
        if checkpointer.latest is not None and checkpointer.latest.step >= step:
            return
        # By itself Orbax leaves saves out that come too fast.
        checkpointer.save_async(step, state, force=True, metrics=dict(measures) if measures else None)


def abstract(state: Any) -> Any:
    """Returns a state of arrays and Python numbers with a jax.ShapeDtypeStruct, shardings included, for each array."""

    def describe(x: Any) -> Any:
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding) if isinstance(x, jax.Array) else x

    return jax.tree.map(describe, state)


def restore(checkpointer: Checkpointer, like: Any, resizable: Collection[str] = ()) -> tuple[int, Any] | None:
    """Reads the newest checkpoint that can be read; one that is damaged is passed over and set aside with a warning.

    Args:
      checkpointer: from `open_directory`.
      like: a state of the same structure, shapes and dtypes, or what `abstract` says of one.
      resizable: paths of arrays, such as replay/labels, whose first axis is returned as long as it is there.

    Returns:
      (step, state), or None if there is no checkpoint.

    Raises:
      ValueError: a checkpoint is of another model, or there are checkpoints and none can be read.
    """
    like = abstract(like)
    damaged: dict[int, str] = {}
    for step in sorted((metadata.step for metadata in checkpointer.checkpoints), reverse=True):
        try:
            found = _read(functools.partial(checkpointer.metadata, step)).metadata
            expected = _resized(like, found, resizable)
            difference = _difference(found, expected)
            state = None if difference else _read(functools.partial(checkpointer.load, step, expected))
        except _DamagedError as damage:
            damaged[step] = str(damage)
            continue
        if difference:
            raise ValueError(
                f"{checkpointer.directory / str(step)} is a checkpoint of another model: {difference}. Go on with the settings "
                "and the version that wrote it, or start anew with another --workdir"
            )
        _set_aside(checkpointer, damaged)
        return step, state
    if damaged:
        raise ValueError(
            f"{checkpointer.directory}: none of the checkpoints {sorted(damaged)} can be read; the newest says: "
            f"{damaged[max(damaged)]}. Move the directory away to begin at step 0 again: the labels that are paid for are "
            "taken from the ledger"
        )
    return None


def steps(directory: Path) -> list[int]:
    """Returns the steps, ascending, of the checkpoints in a directory, which need not exist; nothing in it is touched."""
    found = directory.iterdir() if directory.is_dir() else ()
    return sorted(int(path.name) for path in found if path.name.isdecimal())


def best(directory: Path, measure: str) -> int | None:
    """Returns the step of the best checkpoint in a directory, the newest of several; None: none was measured.

    Args:
      directory: that `open_directory` was given; nothing in it is touched.
      measure: as in `open_directory`.
    """
    found = {step: _measures(directory / str(step)).get(measure) for step in steps(directory)}
    return max(((value, step) for step, value in found.items() if value is not None), default=(None, None))[1]


def _measures(path: Path) -> dict[str, float]:
    """What a checkpoint was saved with."""
    file = path / "metrics" / "metrics"  # where Orbax puts it
    return json.loads(file.read_text()) if file.is_file() else {}


def read(directory: Path, parts: Mapping[str, Any], step: int | None = None) -> tuple[int, dict[str, Any]]:
    """Reads parts of a saved state; nothing in the directory is touched, so that a run may be writing there.

    Args:
      directory: that `open_directory` was given.
      parts: path in the state, such as learner/trained -> what stands there, as arrays or as shapes with shardings.
      step: of the checkpoint; None: the newest one that can be read, others are passed over with a warning.

    Returns:
      The step, and the parts by the same names.

    Raises:
      ValueError: the checkpoint is of another model, or none can be read.
    """
    _quiet()
    wanted = unflatten_dict(dict(parts), sep="/")
    damaged: dict[int, str] = {}
    while True:  # the run may remove a checkpoint while it is read, but not without having written newer ones
        untried = [found for found in steps(directory) if found not in damaged and step in (None, found)]
        newest = processes.of_first(max(untried, default=-1))
        if newest < 0:
            break
        path = directory.absolute() / str(newest)
        try:
            difference = _difference(_read(functools.partial(ocp.metadata, path)).metadata, wanted, parts)
            state: Any = None if difference else _read(functools.partial(ocp.load, path, wanted), partly=True)
        except _DamagedError as damage:
            damaged[newest] = str(damage)
            if step is None and path.exists():
                logging.warning("%s cannot be read and is passed over: %s", path, damaged[newest])
            continue
        if difference:
            raise ValueError(
                f"{path} is a checkpoint of another model: {difference}. Is the model that config.json names as policy.source "
                "still the one that was trained, and this the version of sea_jax that wrote it?"
            )
        return newest, {name: functools.reduce(lambda tree, key: tree[key], name.split("/"), state) for name in parts}
    named = f"the checkpoint of step {step}" if step is not None else "a checkpoint"
    reason = damaged[max(damaged)] if damaged else "there is none"
    raise ValueError(f"{directory}: {named} cannot be read: {reason}; those there are: {steps(directory)}")


class _DamagedError(Exception):
    """A checkpoint cannot be read, in every process, since one of them cannot read it."""


def _read(task: Callable[[], Found], partly: bool = False) -> Found:
    """Reads something of a checkpoint in every process, each for itself, and then agrees on whether all could."""
    alone = ocp.Context()
    alone.pytree.loading.partial_load = partly
    # Orbax would let them wait for each other: minutes, and in vain where one has failed.
    alone.multiprocessing.active_processes, alone.multiprocessing.primary_host = {jax.process_index()}, None

    def attempt() -> tuple[Found | None, str]:
        with _without_complaints(), alone:
            try:
                return task(), ""
            except Exception as error:
                return None, _damage_of(error)

    found, damage = processes.together(attempt, "a checkpoint")
    if processes.any_of(bool(damage)):
        raise _DamagedError(damage or "another process cannot read it, and says why")
    return cast(Found, found)


def _difference(found: Any, expected: Any, parts: Iterable[str] = ()) -> str:
    """Names the first leaf in which a checkpoint's tree, or parts of it, and the expected one differ; empty if none does."""
    here, there = _leaves(expected), _leaves(found)
    if not there:  # what Orbax says of a tree that it cannot read; reading the checkpoint shows whether it is damaged
        return ""
    if parts:
        there = {name: kind for name, kind in there.items() if any(f"{name}/".startswith(f"{part}/") for part in parts)}
    for name in sorted(here.keys() | there.keys()):
        if here.get(name) != there.get(name):
            return f"{name} is {there.get(name, 'missing')} there, and {here.get(name, 'missing')} here"
    return ""


def _resized(like: Any, found: Any, resizable: Collection[str]) -> Any:
    """What is expected, with the arrays of these paths as long as they are found, then not divided over devices."""
    there = {_path(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(found)}

    def expect(path: Any, leaf: Any) -> Any:
        own: Any = there.get(_path(path))
        if _path(path) not in resizable or not hasattr(own, "shape") or tuple(own.shape[:1]) == leaf.shape[:1]:
            return leaf
        whole = leaf.sharding
        if isinstance(whole, NamedSharding):
            whole = NamedSharding(whole.mesh, PartitionSpec())
        return jax.ShapeDtypeStruct((*own.shape[:1], *leaf.shape[1:]), leaf.dtype, sharding=whole)

    return jax.tree_util.tree_map_with_path(expect, like)


def _path(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _leaves(tree: Any) -> dict[str, str]:
    """What stands where: learner/trained/final_norm/scale -> float32[32]."""

    def kind(leaf: Any) -> str:
        return f"{leaf.dtype}{list(leaf.shape)}" if hasattr(leaf, "shape") else type(leaf).__name__

    return {_path(path): kind(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def _damage_of(error: Exception) -> str:
    """What is wrong with a checkpoint. Orbax wraps whatever comes up while it reads; what tells of no damage is raised."""
    cause: BaseException = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    if isinstance(cause, ValueError | OSError | KeyError) and not isinstance(cause, TimeoutError):
        return _message_of(cause)
    raise cause  # a device without room, a file system that does not answer, Ctrl-C


def _message_of(error: Exception) -> str:
    """What an error says, without the pages of settings that TensorStore puts behind it."""
    return f"{type(error).__name__}: {re.split(SETTINGS, str(error))[0]}"


def _set_aside(checkpointer: Checkpointer, damaged: Mapping[int, str]) -> None:
    """Renames damaged checkpoints, so that they do not stand where the run will save, or count as kept."""
    for step, reason in damaged.items():
        path = Path(checkpointer.directory) / str(step)
        aside = path.with_name(f"{step}.damaged")
        logging.warning("%s cannot be read and is passed over, now as %s: %s", path, aside.name, reason)
        processes.by_first(functools.partial(_replace, path, aside), None, "a damaged checkpoint")
    if damaged:
        checkpointer.reload()


def _replace(path: Path, other: Path) -> None:
    """Renames a directory; one that has the name already is removed."""
    shutil.rmtree(other, ignore_errors=True)
    path.rename(other)


@contextmanager
def _name_failures(checkpointer: Checkpointer) -> Iterator[None]:
    """Turns whatever a save raises, or the one before it in the background, into one error that tells where."""
    try:
        yield
    except (ValueError, OSError) as error:
        latest = checkpointer.latest
        last = f"the last whole one is that of step {latest.step}" if latest else "there is none before it"
        raise OSError(
            f"{checkpointer.directory}: a checkpoint could not be written, {last}: {_message_of(error)}. Make room and start "
            "the same command again: it goes on from there"
        ) from error


def _quiet() -> None:
    """Keeps back what Orbax logs: whatever goes wrong is raised besides, and said once, in a line instead of pages."""
    for logger in (logging.get_absl_logger(), getLogger()):
        logger.addFilter(_not_orbax)  # it stays, since threads of a save that failed may log for a while


def _not_orbax(record: LogRecord) -> bool:
    return "/orbax/" not in record.pathname or logging.level_debug()


@contextmanager
def _without_complaints() -> Iterator[None]:
    """Keeps back the complaints of what Orbax leaves unfinished when a checkpoint cannot be read; the reason is raised."""

    def nothing(_: Any) -> bool:
        return False

    logger, hook = getLogger("asyncio"), sys.unraisablehook
    logger.addFilter(nothing)
    sys.unraisablehook = nothing
    try:
        with warnings.catch_warnings(action="ignore", category=RuntimeWarning):
            yield
            gc.collect()
    finally:
        logger.removeFilter(nothing)
        sys.unraisablehook = hook
