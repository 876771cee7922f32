"""A child process that ends with its parent, however the parent ends, and takes along everything it started.

The parent starts a keeper (this module as a program) and holds a pipe to it. The keeper starts the command in a process
group of its own and ends the whole group when the pipe closes, which the kernel does even for a parent that was killed.
"""

import asyncio
import contextlib
import ctypes
import os
import selectors
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

GRACE_SECONDS = 15.0  # between the polite and the hard end of a group
CLEAR_UP_SECONDS = 1.0  # between the end of a group's leader and that of the others
TAIL_LINES = 40
PR_SET_PDEATHSIG = 1  # linux/prctl.h


class Child:
    """A command behind its keeper."""

    def __init__(self, process: asyncio.subprocess.Process, log: Path) -> None:
        self._process = process
        self.log = log

    @classmethod
    async def start(cls, command: Sequence[str], environment: Mapping[str, str], log: Path, directory: Path) -> "Child":
        """Starts a command.

        Args:
          command: program and arguments.
          environment: its whole environment.
          log: where its output goes.
          directory: removed when the command has ended, or could not be started.

        Returns:
          The running child.

        Raises:
          OSError: the log cannot be written, or there can be no further process.
        """
        try:
            log.parent.mkdir(parents=True, exist_ok=True)
            with log.open("wb") as output:
                process = await asyncio.create_subprocess_exec(
                    *(sys.executable, str(Path(__file__)), str(directory), *command),
                    stdin=asyncio.subprocess.PIPE,
                    stdout=output,
                    stderr=output,
                    env=dict(environment),
                    start_new_session=True,  # Ctrl-C is the parent's to handle
                )
        except OSError:
            shutil.rmtree(directory, ignore_errors=True)
            raise
        return cls(process, log)

    async def ended(self) -> str:
        """Returns one line on how it ended, once it has."""
        code = await self._process.wait()
        return f"it was ended by signal {-code}" if code < 0 else f"it ended with exit status {code}"

    async def stop(self) -> None:
        """Ends the command and everything it started; returns when all is gone."""
        if self._process.stdin is not None:
            self._process.stdin.close()
        await self._process.wait()

    def tail(self) -> str:
        """Returns the last lines of the log."""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-TAIL_LINES:])


def keep(directory: str, command: Sequence[str]) -> int:
    """Runs a command until it ends, or until standard input does.

    Args:
      directory: removed behind the end.
      command: program and arguments.

    Returns:
      The command's exit status; minus the signal that ended it.
    """
    keeper = os.getpid()

    def die_with_keeper() -> None:
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != keeper:  # it was gone before the line above
            os._exit(1)

    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    with contextlib.ExitStack() as at_the_end:
        at_the_end.callback(shutil.rmtree, directory, ignore_errors=True)
        child = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True, preexec_fn=die_with_keeper)
        at_the_end.callback(_end_group, child)
        with selectors.DefaultSelector() as selector:
            selector.register(sys.stdin.fileno(), selectors.EVENT_READ, "parent")
            selector.register(os.pidfd_open(child.pid), selectors.EVENT_READ, "child")
            while child.poll() is None:
                for key, _ in selector.select():
                    if key.data == "parent" and not os.read(key.fd, 4096):
                        return _end_group(child)
        return child.returncode


def _end_group(child: subprocess.Popen[bytes]) -> int:
    """Ends a process group: the leader politely; what outlives it may clear up its shared memory, and is killed then."""
    if child.poll() is None:
        child.terminate()
        until = time.monotonic() + GRACE_SECONDS
        while child.poll() is None and time.monotonic() < until:
            time.sleep(0.05)
    with contextlib.suppress(ProcessLookupError):
        until = time.monotonic() + CLEAR_UP_SECONDS
        while child.returncode is not None and time.monotonic() < until:
            os.killpg(child.pid, 0)
            time.sleep(0.05)
        os.killpg(child.pid, signal.SIGKILL)
    return child.wait()


if __name__ == "__main__":
    sys.exit(keep(sys.argv[1], sys.argv[2:]))
