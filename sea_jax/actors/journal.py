"""Responses on disk: what was written once need not be written again, nor can it come out otherwise."""

import functools
import io
import json
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from sea_jax.runtime import files, processes
from sea_jax.types import Candidates, FrozenStates

KEPT = "the responses that are kept"
FROZEN = "frozen."  # before the names of what the frozen layers made


@dataclass(frozen=True)
class Written:
    """A batch of responses.

    Attributes:
      candidates: Candidates.
      version: how many policy steps had made the policy that wrote them.
      logprob_gap: mean over tokens of |log-prob of who wrote them - log-prob of the learner's policy of that version|.
    """

    candidates: Candidates
    version: int
    logprob_gap: float


class Journal:
    """The responses to the last batches of prompts, a file each: whoever wrote them need not write the same again.

    A run that goes on from a checkpoint comes past the batches behind it once more. The same texts must then be there, or
    the labels that were paid for would belong to others. Of several processes the first alone has files; all must call.
    """

    def __init__(self, directory: Path, keep: int) -> None:
        """Opens a directory.

        Args:
          directory: made if there is none.
          keep: checkpoints that are kept; responses are, as long as one of these has not passed them.
        """
        self._directory = directory
        self._passed: deque[int] = deque(maxlen=keep + 1)  # the newest may still be on its way to the disk
        processes.by_first(lambda: directory.mkdir(parents=True, exist_ok=True), None, KEPT)

    def find(self, number: int, name: str = "") -> Written | None:
        """Returns the responses to the batch of a number, or None; the name tells several to one batch apart."""
        path = self._path(number, name)
        content = processes.bytes_of_first(
            processes.by_first(lambda: path.read_bytes() if path.exists() else b"", b"", KEPT)
        )
        if not content:
            return None
        with np.load(io.BytesIO(content), allow_pickle=False) as stored:
            about = json.loads(str(stored["about"]))
            dtypes = about.get("dtypes", {})  # NumPy reads a bfloat16 as bytes that mean nothing
            arrays = {name: stored[name] for name in stored.files if name != "about"}
        fields: dict[str, Any] = {
            name: jnp.asarray(array.view(jnp.dtype(dtypes[name])) if name in dtypes else array)
            for name, array in arrays.items()
        }
        states = {name.removeprefix(FROZEN): fields.pop(name) for name in arrays if name.startswith(FROZEN)}
        frozen = FrozenStates(**states) if states else None
        return Written(Candidates(**fields, frozen=frozen), about["version"], about["logprob_gap"])

    def record(self, number: int, written: Written, name: str = "") -> None:
        """Writes the responses to the batch of a number, under a name, and returns when they are on disk.

        Raises:
          OSError: the disk is full or gone.
        """
        parts = dict(vars(written.candidates))
        frozen = parts.pop("frozen")
        if frozen is not None:
            parts |= {FROZEN + name: value for name, value in vars(frozen).items()}
        fields: dict[str, Any] = {name: np.asarray(value) for name, value in parts.items()}
        dtypes = {name: str(value.dtype) for name, value in fields.items()}
        about = json.dumps({"version": written.version, "logprob_gap": written.logprob_gap, "dtypes": dtypes})
        content = io.BytesIO()
        np.savez(content, about=np.array(about), **fields)
        path = self._path(number, name)

        def write() -> None:
            try:
                files.write_whole(path, content.getvalue())
            except OSError as error:
                raise OSError(
                    f"{path}: {error.strerror}; responses that are not kept are not asked about. Make room and start the same "
                    "command again: it goes on from the last checkpoint"
                ) from error

        processes.by_first(write, None, KEPT)

    def checkpointed(self, batches: int) -> None:
        """Forgets what no checkpoint that is kept can come past again; this one was saved when so many batches were used."""
        self._passed.append(batches)
        if len(self._passed) == self._passed.maxlen:
            processes.by_first(functools.partial(self._forget, self._passed[0]), None, KEPT)

    def _forget(self, batches: int) -> None:
        """Removes the files of the first so many batches."""
        for path in self._directory.glob("*.npz"):
            if int(path.stem.split("-")[0]) < batches:
                path.unlink()

    def _path(self, number: int, name: str) -> Path:
        return self._directory / (f"{number}-{name}.npz" if name else f"{number}.npz")
