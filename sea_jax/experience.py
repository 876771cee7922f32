"""What has been labelled: a replay of cached features for the ERM, and the ledger of every label on disk."""

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
import jax.numpy as jnp
from absl import logging
from flax import struct

from sea_jax.types import Array


@struct.dataclass
class Replay:
    """The last C oracle-labelled pairs as cached features, first in, first out.

    Attributes:
      features: [C, 2, d] float32, of the first and second response.
      labels: [C] float32, probability that the first wins.
      added: scalar int32, pairs ever added; the next one goes to slot added % C.
    """

    features: Array
    labels: Array
    added: Array


def empty_replay(capacity: int, num_features: int) -> Replay:
    """Returns a replay with room for `capacity` pairs.

    Args:
      capacity: C, pairs.
      num_features: d.

    Returns:
      Replay.
    """
    return Replay(
        features=jnp.zeros((capacity, 2, num_features), jnp.float32),
        labels=jnp.zeros(capacity, jnp.float32),
        added=jnp.zeros((), jnp.int32),
    )


def add(replay: Replay, features: Array, labels: Array, keep: Array) -> Replay:
    """Appends the kept pairs of a batch; the oldest pairs make room.

    Args:
      replay: Replay of capacity C >= B.
      features: [B, 2, d] float32.
      labels: [B] float32.
      keep: [B] bool, which pairs to append.

    Returns:
      Replay.
    """
    capacity = replay.labels.shape[0]
    slot = (replay.added + jnp.cumsum(keep) - 1) % capacity
    slot = jnp.where(keep, slot, capacity)  # out of bounds: dropped by the scatter
    return Replay(
        features=replay.features.at[slot].set(features, mode="drop"),
        labels=replay.labels.at[slot].set(labels, mode="drop"),
        added=replay.added + keep.sum(dtype=jnp.int32),
    )


def sample(replay: Replay, batch_size: int, key: Array) -> tuple[Array, Array, Array]:
    """Draws a batch uniformly and without replacement; while the replay holds fewer pairs, all of them.

    Args:
      replay: Replay of capacity C.
      batch_size: b, pairs; at most C are returned.
      key: random key.

    Returns:
      features [b, 2, d], labels [b], weights [b] (0 for rows that hold no pair).
    """
    capacity = replay.labels.shape[0]
    held = jnp.arange(capacity) < replay.added
    order = jnp.where(held, jax.random.uniform(key, (capacity,)), -1.0)
    _, rows = jax.lax.top_k(order, min(batch_size, capacity))
    return replay.features[rows], replay.labels[rows], held[rows].astype(jnp.float32)


class LedgerError(RuntimeError):
    """The ledger and the run contradict each other."""


class Ledger:
    """`queries.jsonl`: one line per labelled pair, on disk before the label is used.

    A line's `key` names the pair within the run. A pair that was labelled before a crash is found here under its key when
    the run comes past it again, so that no label is paid for twice.
    """

    def __init__(self, path: Path):
        """Opens the ledger and reads what it holds.

        Args:
          path: the file; made if there is none. A torn last line (a crash while writing) is cut off with a warning.

        Raises:
          LedgerError: a line before the last is not valid JSON.
        """
        self.path = path
        self._lines: dict[str, dict[str, Any]] = {}
        intact_bytes = 0
        content = path.read_bytes() if path.exists() else b""
        for number, line in enumerate(content.splitlines(keepends=True), start=1):
            try:
                if not line.endswith(b"\n"):
                    raise ValueError("no end of line")
                entry = json.loads(line)
                self._lines[entry["key"]] = entry
            except (ValueError, KeyError, TypeError) as error:
                if intact_bytes + len(line) < len(content):
                    raise LedgerError(
                        f"{path}, line {number} is not a ledger line ({error}); labels that were paid for may be lost: "
                        "repair the line or restore the file"
                    ) from error
                logging.warning("%s: the torn last line (%d bytes) is cut off", path, len(line))
                break
            intact_bytes += len(line)
        self._file = path.open("ab")
        self._file.truncate(intact_bytes)

    def __enter__(self) -> "Ledger":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def find(self, key: str) -> Mapping[str, Any] | None:
        """Returns the line of this key, or None.

        Args:
          key: the pair's name within the run.

        Returns:
          The line as a mapping, or None if the pair has not been labelled.
        """
        return self._lines.get(key)

    def record(self, entries: Iterable[Mapping[str, Any]]) -> None:
        """Appends lines and returns when they are on disk (fsync); a line whose key is there already is left as it is.

        Args:
          entries: lines with at least "key" (str) and "counted" (bool).

        Raises:
          OSError: the disk is full or gone; nothing of the label may be used then.
        """
        new = [dict(entry) for entry in entries if entry["key"] not in self._lines]
        if not new:
            return
        self._file.write("".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in new).encode())
        self._file.flush()
        os.fsync(self._file.fileno())
        self._lines.update((entry["key"], entry) for entry in new)

    def counted(self) -> int:
        """Returns how many lines are paid queries."""
        return sum(bool(entry["counted"]) for entry in self._lines.values())

    def lines(self) -> Sequence[Mapping[str, Any]]:
        """Returns every line, oldest first."""
        return list(self._lines.values())
