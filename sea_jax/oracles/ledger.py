"""The ledger on disk: what the oracle is asked before it is asked, every label before it is used."""

import contextlib
import fcntl
import json
import os
import secrets
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, cast

from absl import logging

from sea_jax.runtime import files

# What a run went on with otherwise than before; whose labels it began with.
NOTES = ("settings", "labels")


class LedgerError(ValueError):
    """The ledger and the run contradict each other."""


class Ledger:
    """`queries.jsonl`: what the oracle is asked before it is asked, every label before it is used.

    A question to the oracle is two lines, an "ask" and, once it is answered, a "label", or an "abstention" where nobody will
    answer it; a label that the ERM gives is one "label" line with everything in it. A line's `key` names the pair within the
    run: a pair that was labelled before a crash is found here when the run comes past it again, and one that was only asked is
    asked again under the same name. Where an answer may come after the step that asked, a line "open" stands between the two,
    the last one names in `taken` the step that learns from it, and a line "taken" says that a step takes no more. Other lines
    are NOTES.

    Attributes:
      path: the file.
      run_id: names the run to whoever is asked, kept in the file `run_id` beside the ledger; empty where nothing is written.
    """

    def __init__(self, path: Path, *, writes: bool = True):
        """Opens the ledger and reads what it holds.

        Args:
          path: the file; made if there is none. A torn last line (a crash while writing) is cut off with a warning.
          writes: False keeps what is asked and recorded in memory only, for processes that run beside the one that writes.

        Raises:
          LedgerError: a line is not a ledger line, or the file `run_id` is gone.
          OSError: the disk is full or gone, or another run is writing this ledger.
        """
        self.path = path
        self._asks: dict[str, dict[str, Any]] = {}
        self._labelled: dict[str, dict[str, Any]] = {}
        self._abstained: dict[str, dict[str, Any]] = {}
        self._left_open: set[str] = set()
        self._taken_up_to = -1
        self._unanswered_in_a_row = 0
        self._notes: list[dict[str, Any]] = []
        self._file = _locked(path) if writes else None
        content = path.read_bytes() if path.exists() else b""
        self._size = self._read(content)
        if self._size < len(content):
            logging.warning("%s: the torn last line (%d bytes) is cut off", path, len(content) - self._size)
        self.run_id = self._named() if writes else ""
        if self._file is not None:
            self._file.truncate(self._size)
            os.fsync(self._file.fileno())  # a killed run may have written lines that it did not live to sync
            _sync_directory(path.parent)

    def __enter__(self) -> "Ledger":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            self._file.close()

    def asked(self, key: str) -> Mapping[str, Any] | None:
        """Returns what was asked under this key, whether or not it was answered.

        Args:
          key: the pair's name within the run.

        Returns:
          The ask as a mapping, or None if the oracle was never asked.
        """
        return self._asks.get(key)

    def find(self, key: str) -> Mapping[str, Any] | None:
        """Returns the ask and the label of this key as one mapping, or None.

        Args:
          key: the pair's name within the run.

        Returns:
          The mapping, or None if the pair has not been labelled.
        """
        return self._labelled.get(key)

    def abstained(self, key: str) -> Mapping[str, Any] | None:
        """Returns what was asked under this key if nobody will answer it, or None."""
        return self._abstained.get(key)

    def left_open(self, key: str) -> bool:
        """Returns whether the step that asked under this key went on before there was an answer."""
        return key in self._left_open

    def has_taken(self, step: int) -> bool:
        """Returns whether a step has taken all that it learns from of what steps before left open."""
        return step <= self._taken_up_to

    def ask(self, entries: Iterable[Mapping[str, Any]]) -> None:
        """Appends asks and returns when they are on disk (fsync); one whose key is there already is left as it is.

        Args:
          entries: asks with at least "key" (str).

        Raises:
          OSError: the disk is full or gone; the oracle must not be asked then.
        """
        new = {entry["key"]: dict(entry) for entry in entries if entry["key"] not in self._asks}
        self._append([{"event": "ask", **entry} for entry in new.values()])
        self._asks |= new

    def record(self, entries: Iterable[Mapping[str, Any]]) -> None:
        """Appends labels and returns when they are on disk (fsync); one whose key is there already is left as it is.

        Args:
          entries: labels with at least "key" (str) and "counted" (bool); of what its ask holds nothing but the key is
            written again.

        Raises:
          OSError: the disk is full or gone; nothing of the label may be used then.
        """
        new = {entry["key"]: dict(entry) for entry in entries if entry["key"] not in self._labelled}
        asks = {key: self._asks.get(key, {}) for key in new}
        self._append(
            [
                {"event": "label", "key": key} | {name: entry[name] for name in entry if name not in asks[key]}
                for key, entry in new.items()
            ]
        )
        for key, entry in new.items():
            self._label(key, asks[key] | entry)

    def abstain(self, entries: Iterable[Mapping[str, Any]]) -> None:
        """Appends that asks are not answered and returns when that is on disk (fsync): a resumed run does not ask again.

        Args:
          entries: asks with at least "key" (str), and "taken" where the step that asked left them open.

        Raises:
          OSError: the disk is full or gone.
        """
        new = {entry["key"]: dict(entry) for entry in entries if entry["key"] not in self._abstained}
        self._append([{"event": "abstention"} | _picked(entry, "key", "taken") for entry in new.values()])
        for key, entry in new.items():
            self._pass_over(key, self._asks.get(key, {}) | entry)

    def leave_open(self, entries: Iterable[Mapping[str, Any]]) -> None:
        """Appends that a step went on before asks were answered, and returns when that is on disk (fsync).

        Args:
          entries: asks with at least "key" (str).

        Raises:
          OSError: the disk is full or gone.
        """
        new = [entry["key"] for entry in entries if entry["key"] not in self._left_open]
        self._append([{"event": "open", "key": key} for key in new])
        self._left_open |= {*new}

    def take_up_to(self, step: int) -> None:
        """Appends that a step takes no more of what steps before left open, and returns when that is on disk (fsync)."""
        self._append([{"event": "taken", "step": step}])
        self._taken_up_to = step

    def note(self, event: str, told: Mapping[str, Any]) -> None:
        """Appends what people should know of the run, unless it is there already: one of NOTES and what is told of it.

        Raises:
          OSError: the disk is full or gone.
        """
        entry = {"event": event, "queries": self.counted(), **told}
        if entry not in self._notes:
            self._append([entry])
            self._notes.append(entry)

    def counted(self) -> int:
        """Returns how many labels are paid queries."""
        return sum(bool(entry["counted"]) for entry in self._labelled.values())

    def unanswered_in_a_row(self) -> int:
        """Returns how many asks have been passed over since the last one that was answered."""
        return self._unanswered_in_a_row

    def lines(self) -> Sequence[Mapping[str, Any]]:
        """Returns every label with what was asked for it, oldest first."""
        return list(self._labelled.values())

    def _read(self, content: bytes) -> int:
        """Takes in the lines of the file; returns how many bytes of it are whole."""
        intact = 0
        for number, line in enumerate(content.splitlines(keepends=True), start=1):
            if not line.endswith(b"\n"):
                break
            try:
                entry = json.loads(line)
                if entry["event"] in NOTES:
                    self._notes.append(entry)
                    intact += len(line)
                    continue
                if entry["event"] == "taken":
                    self._taken_up_to = max(self._taken_up_to, int(entry["step"]))
                    intact += len(line)
                    continue
                event, key = entry.pop("event"), entry["key"]
                if event == "ask":
                    self._asks[key] = entry
                elif event == "label":
                    whole = self._asks.get(key, {}) | entry
                    if not whole.keys() >= {"digest", "label", "counted"}:
                        raise ValueError("a label without what was asked")
                    self._label(key, whole)
                elif event == "abstention":
                    if key not in self._asks:
                        raise ValueError("an abstention without what was asked")
                    self._pass_over(key, self._asks[key] | entry)
                elif event == "open":
                    self._left_open.add(key)
                else:
                    raise ValueError(f"event {event!r}")
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise LedgerError(
                    f"{self.path}, line {number} is not a ledger line ({error}); labels that were paid for may be lost: "
                    "repair the line or restore the file"
                ) from error
            intact += len(line)
        return intact

    def _label(self, key: str, whole: dict[str, Any]) -> None:
        self._labelled[key] = whole
        if whole["counted"]:
            self._unanswered_in_a_row = 0

    def _pass_over(self, key: str, entry: dict[str, Any]) -> None:
        self._abstained[key] = entry
        self._unanswered_in_a_row += 1

    def _append(self, entries: Sequence[Mapping[str, Any]]) -> None:
        """Writes lines and syncs them; when that fails, what was written of them is cut off again."""
        if not entries or self._file is None:
            return
        content = "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries).encode()
        rest = memoryview(content)
        try:
            while rest:
                rest = rest[self._file.write(rest) :]
            os.fsync(self._file.fileno())
        except OSError as error:
            with contextlib.suppress(OSError):  # the next start cuts off whatever is left
                self._file.truncate(self._size)
            raise OSError(
                f"{self.path}: {error.strerror}; nothing was asked or learnt of what could not be written. Make room and "
                "start the same command again: it goes on, and what it has to ask again carries the same key"
            ) from error
        self._size += len(content)

    def _named(self) -> str:
        """Returns the run's own name, drawn before its first ask and the same after every restart."""
        path = self.path.with_name("run_id")
        if not path.exists():
            if self._asks:
                raise LedgerError(
                    f"{path} is missing: without it the questions in {self.path.name} would be asked, and paid for, under "
                    "other names; restore the file, or start anew with another --workdir"
                )
            files.write_whole(path, secrets.token_hex(8))
        return path.read_text()


def _picked(entry: Mapping[str, Any], *names: str) -> dict[str, Any]:
    return {name: entry[name] for name in names if name in entry}


def _locked(path: Path) -> BinaryIO:
    """Opens a ledger for writing, for one process at a time: two runs in one place would both pay for the same labels."""
    file = cast(BinaryIO, path.open("ab", buffering=0))
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        file.close()
        raise OSError(
            f"{path}: another run is writing this ledger; wait until it ends, or name another --workdir"
        ) from error
    except OSError as error:  # some file systems of clusters know no locks
        logging.warning("%s cannot be locked (%s): see to it that no second run writes here", path, error.strerror)
    return file


def _sync_directory(directory: Path) -> None:
    """Makes sure that the names of new files are on disk, too."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
