"""Servers that speak the protocol without any model, and fail as they are told."""

import json
import threading
import time
import urllib.request
from collections.abc import Iterable
from dataclasses import asdict
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
from safetensors.numpy import load, load_file

from gpu_bridge import protocol

TOKEN = "the-token"
VOCAB_SIZE, EOS = 37, 3


def answer(prompt: list[int], seed: int, num_samples: int, length: int, eos: int = EOS) -> list[dict[str, Any]]:
    """M responses that depend on the prompt and its seed alone; some end early."""
    rng = np.random.default_rng([seed, *prompt])
    rows = []
    for _ in range(num_samples):
        tokens = rng.integers(0, VOCAB_SIZE, length).tolist()
        tokens = tokens[: tokens.index(eos) + 1] if eos in tokens else tokens
        rows.append({"tokens": tokens, "logprobs": (-rng.random(len(tokens))).tolist()})
    return rows


def score(ids: list[int]) -> float:
    """The score of a conversation."""
    return float(sum(ids)) / 7


def fetched(url: str, bearer: str) -> bytes:
    """What a learner serves."""
    request = urllib.request.Request(url, headers={"Authorization": f"Bearer {bearer}"})
    with urllib.request.urlopen(request, timeout=5) as reply:
        return reply.read()


class Fake:
    """One server in a thread; `faults[path]` are what befalls the next requests to a path, "" for none."""

    def __init__(self, kind: str = protocol.POLICY, version: str = protocol.INITIAL) -> None:
        self.kind, self.version, self.token, self.status = kind, version, TOKEN, protocol.READY
        self.faults: dict[str, list[str]] = {}
        self.asked: list[tuple[str, Any]] = []  # path and message of every request
        self.tensors: dict[str, np.ndarray] = {}
        self.released = threading.Event()  # ends what hangs
        self.port = 0
        self.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def sent(self, path: str) -> list[Any]:
        """The messages to a path."""
        return [message for asked, message in self.asked if asked == path]

    def start(self) -> None:
        """Listens, again on the same port if it has before."""
        self.server = ThreadingHTTPServer(("127.0.0.1", self.port), self._handler())
        self.server.daemon_threads, self.server.block_on_close = True, False
        self.port = self.server.server_port
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()

    def stop(self) -> None:
        """Lets nobody in any more."""
        self.server.shutdown()
        self.server.server_close()

    def restart_in(self, seconds: float) -> None:
        """Dies and comes up again without the weights it had."""
        self.stop()

        def revive() -> None:
            self.version, self.tensors = protocol.INITIAL, {}
            self.start()

        threading.Timer(seconds, revive).start()

    def close(self) -> None:
        """Ends everything."""
        self.released.set()
        self.stop()

    def reply(self, path: str, message: Any) -> tuple[int, Any]:
        """Status code and JSON of an answer when nothing goes wrong."""
        if path == protocol.HEALTH:
            health = protocol.Health(self.status, self.kind, "fake", self.version, "1")
            return 200 if self.status == protocol.READY else 503, asdict(health)
        if path == protocol.WEIGHTS:
            if message.get("base") not in (None, self.version):
                return 409, {"error": "another base", "version": self.version}
            new = load_file(message["path"]) if "path" in message else load(fetched(message["url"], message["bearer"]))
            self.tensors = {**self.tensors, **new} if "base" in message else new
            self.version = message["version"]
            return 200, {"version": self.version}
        if path == protocol.SCORE:
            return 200, {"version": self.version, "scores": [score(ids) for ids in message["inputs"]]}
        how = message["num_samples"], message["max_new_tokens"], *message["eos_ids"]
        rows = [answer(*row, *how) for row in zip(message["prompts"], message["seeds"], strict=True)]
        return 200, {"version": self.version, "responses": rows}

    def _handler(fake) -> type[BaseHTTPRequestHandler]:
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.handle_any(None)

            def do_POST(self) -> None:
                self.handle_any(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

            def handle_any(self, message: Any) -> None:
                fake.asked.append((self.path, message))
                waiting = fake.faults.get(self.path, [])
                fault = waiting.pop(0) if waiting else ""
                if self.headers["Authorization"] != f"Bearer {fake.token}":
                    return self.send(401, b'{"error": "no or a wrong token"}')
                if fault == "reset":
                    return self.connection.close()
                if fault == "hang":
                    fake.released.wait()
                    return self.connection.close()
                if fault == "late":
                    time.sleep(0.15)
                if fault == "restart":
                    fake.restart_in(0.15)
                    return self.connection.close()
                if fault == "error":
                    return self.send(500, b'{"error": "out of memory"}')
                if fault == "half":
                    body = json.dumps(fake.reply(self.path, message)[1]).encode()
                    return self.send(200, body[: len(body) // 2], len(body))
                if fault.startswith("garbage "):
                    return self.send(200, fault.removeprefix("garbage ").encode())
                status, reply = fake.reply(self.path, message)
                if fault.startswith("set "):  # set PLACE VALUE: falsifies one value of the answer
                    _, place, value = fault.split(" ", 2)
                    spoil(reply, place.split("."), json.loads(value))
                self.send(status, json.dumps(reply).encode())

            def send(self, status: int, body: bytes, length: int | None = None) -> None:
                self.send_response(status)
                self.send_header("Content-Length", str(length or len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *arguments: object) -> None:
                pass

        return Handler


def spoil(reply: Any, place: Iterable[str], value: Any) -> None:
    """Puts a value into a nested answer."""
    *path, last = (int(part) if part.isdigit() else part for part in place)
    for part in path:
        reply = reply[part]
    reply[last] = value
