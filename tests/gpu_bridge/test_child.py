"""A child and what it started end with the parent, whichever way that goes."""

import asyncio
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from gpu_bridge import child
from gpu_bridge.child import Child

# Starts a grandchild that does not end by SIGTERM, tells both ids, and waits.
PARENT = """
import os, signal, subprocess, sys, time
deaf = subprocess.Popen(["sh", "-c", "trap '' TERM; while true; do sleep 0.1; done"])
print(os.getpid(), deaf.pid, flush=True)
time.sleep(60)
"""


def gone(pid: int) -> bool:
    """Whether a process has ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def wait_for(condition, seconds: float = 10.0) -> None:
    """Waits until something holds."""
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.01)


@pytest.mark.parametrize("way", ["stop", "child", "keeper", "parent"])
def test_all_end_together(way, tmp_path):
    log, directory = tmp_path / "log", tmp_path / "private"
    directory.mkdir()
    # The parent is a process of its own, so that it can be killed.
    program = f"""
import asyncio, os, sys
from pathlib import Path
from gpu_bridge.child import Child
async def main():
    child = await Child.start([sys.executable, "-c", {PARENT!r}], os.environ, Path({str(log)!r}), Path({str(directory)!r}))
    print(child._process.pid, flush=True)
    await asyncio.to_thread(sys.stdin.readline)
    await child.stop()
    print(await child.ended(), flush=True)
asyncio.run(main())
"""
    parent = subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=Path(__file__).parents[2]
    )
    assert parent.stdin is not None
    assert parent.stdout is not None
    keeper = int(parent.stdout.readline())
    wait_for(lambda: log.exists() and log.read_text().endswith("\n"))
    pids = [keeper, *map(int, log.read_text().split())]
    assert not any(gone(pid) for pid in pids)
    if way == "stop":
        parent.stdin.write(b"\n")
        parent.stdin.flush()
        assert parent.wait(10) == 0
    else:
        victim = {"child": pids[1], "keeper": keeper, "parent": parent.pid}[way]
        os.kill(victim, signal.SIGTERM if way == "keeper" else signal.SIGKILL)
    wait_for(lambda: all(gone(pid) for pid in pids))
    assert not directory.exists()
    parent.kill()
    parent.wait()


def test_the_end_is_told_with_the_log(tmp_path):
    async def run(command: list[str]) -> tuple[str, str]:
        started = await Child.start(command, os.environ, tmp_path / "logs/log", tmp_path / "none")
        return await started.ended(), started.tail()

    lines = "\n".join(map(str, range(100)))
    how, tail = asyncio.run(run([sys.executable, "-c", f"print('''{lines}'''); raise SystemExit(3)"]))
    assert how == "it ended with exit status 3"
    assert tail.splitlines() == list(map(str, range(100 - child.TAIL_LINES, 100)))


def test_what_cannot_be_run_leaves_no_directory(tmp_path):
    async def run(log: Path) -> str:
        private.mkdir()
        started = await Child.start([str(tmp_path / "none")], os.environ, log, private)
        return f"{await started.ended()}, {started.tail()}"

    private = tmp_path / "private"
    told = asyncio.run(run(tmp_path / "log"))
    assert told.startswith("it ended with exit status 1")
    assert told.endswith(f"No such file or directory: '{tmp_path / 'none'}'")
    assert not private.exists()
    with pytest.raises(OSError, match="Is a directory"):
        asyncio.run(run(tmp_path))
    assert not private.exists()
