"""Runs real servers in the environment that `make bridge` sets up, and looks that nothing of them is left behind."""

import contextlib
import os
import secrets
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from gpu_bridge import protocol
from gpu_bridge.protocol import GenerateAnswer, GenerateRequest, Health, WeightsAnswer
from gpu_bridge.server.backend import VLLM_SERVER

ROOT = Path(__file__).parents[2]
PYTHON = Path(os.environ.get("BRIDGE_PYTHON", ROOT / ".venv-bridge/bin/python"))
START_SECONDS = 300
EOS = 0
POLICIES = ("tiny-random-llama", "tiny-random-gpt-neox")
TOKEN = secrets.token_hex(16)  # of all servers
HEADS_OF_32 = {"hidden_size": 128}  # with four heads; vLLM's attention on the CPU has no smaller ones
RNG = np.random.default_rng(0)
SHARED = RNG.integers(
    2, 258, 150
).tolist()  # tokens that several prompts begin with: more than a block of the prefix cache
PROMPTS = [[*SHARED, 5, 6], [*SHARED, 7], [3, 4, 5], [*SHARED[:40], 9]]


class Refused(Exception):
    """An answer with another status than 200, and its body."""


@dataclass
class Server:
    """A running server.

    Attributes:
      url: where it listens.
      token: what it wants to be shown.
      process: the gateway.
      mark: in the environment of everything that the gateway started.
    """

    url: str
    token: str
    process: subprocess.Popen[bytes]
    mark: str

    def ask(self, path: str, message: Any = None) -> bytes:
        """Sends a message and returns the body of the answer; raises Refused when its status is not 200."""
        request = urllib.request.Request(
            self.url + path,
            data=None if message is None else protocol.to_json(message),
            headers={"Authorization": f"Bearer {self.token}"},
        )
        try:
            with urllib.request.urlopen(request, timeout=120) as answer:
                return answer.read()
        except urllib.error.HTTPError as error:
            raise Refused(f"{error.code} {error.read().decode()}") from None

    def generate(self, **changes: Any) -> GenerateAnswer:
        """Asks for greedy responses to PROMPTS, or what the changes make of that."""
        prompts = changes.pop("prompts", PROMPTS)
        asked = GenerateRequest(
            **{
                "prompts": prompts,
                "num_samples": 2,
                "max_new_tokens": 12,
                "temperature": 0.0,
                "top_k": 0,
                "top_p": 1.0,
                "seeds": list(range(len(prompts))),
                "eos_ids": [EOS],
                **changes,
            }
        )
        answer = protocol.parse(GenerateAnswer, self.ask(protocol.GENERATE, asked))
        answer.check(asked)
        return answer

    def push(self, arrays: dict[str, np.ndarray], version: str, base: str | None = None) -> None:
        """Has weights served."""
        path = Path("/dev/shm") / f"test-{secrets.token_hex(8)}"
        try:
            save_file(arrays, path)
            asked = protocol.WeightsRequest(version, path=str(path), base=base)
            assert protocol.parse(WeightsAnswer, self.ask(protocol.WEIGHTS, asked)).version == version
        finally:
            path.unlink(missing_ok=True)


@contextlib.contextmanager
def running(kind: str, model: Path, *flags: str, ends: int = 0) -> Iterator[Server]:
    """Runs a server until it is ready; looks for the exit status, and that nothing of it is left behind."""
    mark = secrets.token_hex(8)
    directory = model.with_name(f"{kind}-{mark}")
    directory.mkdir()
    with (directory / "output").open("wb") as output:
        process = subprocess.Popen(
            [
                *(str(PYTHON), "-m", f"gpu_bridge.serve_{kind}", f"--model={model}", "--dtype=float32"),
                *(f"--url_file={directory / 'url'}", f"--log_dir={directory}", "--max_num_seqs=32", *flags),
            ],
            cwd=ROOT,
            env={**os.environ, protocol.TOKEN_VARIABLE: TOKEN, "BRIDGE_TEST_MARK": mark},
            stdout=output,
            stderr=output,
        )
    started: set[int] = set()
    try:
        wait_until((directory / "url").exists, process)
        server = Server((directory / "url").read_text().strip(), TOKEN, process, mark)
        wait_until(lambda: is_ready(server), process)
        started = groups(mark)
        assert len(started) == 3, "expected those of the gateway, of the keeper and of the engine"
        yield server
    finally:
        started |= groups(mark) - {os.getpgrp()}
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == ends, (directory / "output").read_text()
        wait_until(lambda: not alive(started - {os.getpgrp()}))


@contextlib.contextmanager
def chatting(model: Path, *flags: str) -> Iterator[str]:
    """Runs vLLM's own OpenAI server with a model, called judge, until it is ready; yields its URL."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [
        *(str(PYTHON), "-m", VLLM_SERVER, "--model", str(model), "--served-model-name", "judge", "--host", "127.0.0.1"),
        *("--port", str(port), "--api-key", TOKEN, "--dtype", "float32", "--enforce-eager", "--max-num-seqs", "8"),
        *flags,
    ]
    unbound = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}
    environment = {**unbound, **os.environ, "VLLM_NO_USAGE_STATS": "1", "VLLM_HOST_IP": "127.0.0.1"}
    with model.with_name("output").open("wb") as output:
        process = subprocess.Popen(command, env=environment, stdout=output, stderr=output, start_new_session=True)
    try:

        def answers() -> bool:
            with contextlib.suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
                return True
            return False

        wait_until(answers, process)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)
        wait_until(lambda: not alive({process.pid}))


def groups(mark: str) -> set[int]:
    """The process groups of the processes that have a mark in their environment."""
    found = set()
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if mark.encode() in (process / "environ").read_bytes():
                found.add(os.getpgid(int(process.name)))
    return found


def alive(wanted: set[int]) -> list[int]:
    """The processes of some groups; those that were ended and not yet asked for their status do not count."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            state, _, group = (process / "stat").read_text().rpartition(")")[2].split()[:3]
            if int(group) in wanted and state != "Z":
                found.append(int(process.name))
    return found


def kill_engine(server: Server) -> None:
    """Kills vLLM's worker behind a gateway."""
    engine = [pid for pid in alive(groups(server.mark)) if b"EngineCore" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    os.kill(engine[0], signal.SIGKILL)


def wait_until(condition: Any, process: subprocess.Popen[bytes] | None = None) -> None:
    """Waits for a condition as long as a process lives."""
    until = time.monotonic() + START_SECONDS
    while not condition():
        assert process is None or process.poll() is None, "the server has ended"
        assert time.monotonic() < until, f"not in {START_SECONDS} s"
        time.sleep(0.2)


def is_ready(server: Server) -> bool:
    """Whether a server answers; its health says the same as its status code."""
    try:
        return protocol.parse(Health, server.ask(protocol.HEALTH)).status == protocol.READY
    except Refused as refused:
        if '"status":"starting"' not in str(refused):
            raise
        return False
