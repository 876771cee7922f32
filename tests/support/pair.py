"""Two processes of one program, each with CPU devices of its own."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

ROOT = Path(__file__).parents[2]
LIMIT_S = 280  # less than Orbax's patience of 300 s: no barrier may have been waited out
POLL_S = 0.02


def run(
    directory: Path,
    module: str,
    *arguments: str,
    devices: int,
    ends: int = 0,
    stop_second: Callable[[], bool] = lambda: False,
) -> None:
    """Runs both to their end.

    Args:
      directory: for what they say.
      module: the program, called with the arguments, the coordinator's address and the process's number.
      *arguments: those before the address.
      devices: of each process.
      ends: the exit status that both must have.
      stop_second: asked now and then; once it says so, the second process, and it alone, gets a SIGTERM.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": str(devices), "JAX_PLATFORMS": "cpu", "USE_TORCH": "0"}
    command = [sys.executable, "-m", module, *arguments, address]
    logs = [directory / f"log-{number}" for number in range(2)]
    deadline = time.monotonic() + LIMIT_S
    with ExitStack() as stack:
        processes: list[subprocess.Popen[bytes]] = []
        for number, log in enumerate(logs):
            said = stack.enter_context(log.open("w"))
            process = subprocess.Popen([*command, str(number)], cwd=ROOT, env=environment, stdout=said, stderr=said)
            stack.callback(process.kill)
            processes.append(process)
        stopped = False
        while any(process.poll() is None for process in processes) and time.monotonic() < deadline:
            if not stopped and stop_second():
                processes[1].terminate()
                stopped = True
            time.sleep(POLL_S)
        codes = [process.poll() for process in processes]
    assert codes == [ends, ends], [log.read_text()[-3000:] for log in logs]
