"""A chat endpoint without any model, which misbehaves as it is told."""

import json
import math
import socket
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from sea_jax.oracles import judge

KEY = "sk-secret"
INPUT_TOKENS, OUTPUT_TOKENS = 40, 1


def likes_es(question: str) -> float:
    """P("0") of a judge that likes the letter e: by the two texts that stand behind "output" in the paper's template."""
    first, second = (part.split("\n}")[0] for part in question.split('"output": ')[1:])
    return 1 / (1 + math.exp(second.count("e") - first.count("e")))


def with_logprobs(probability: float) -> dict[str, Any]:
    """An answer with the log-probs of its first token, which is written in several ways."""
    tokens = {"0": 0.5 * probability, " 0": 0.25 * probability, "1": 0.75 * (1 - probability), "The": 0.25}
    top = [{"token": token, "logprob": math.log(mass)} for token, mass in tokens.items() if mass]
    return {
        "message": {"role": "assistant", "content": top[0]["token"]},
        "logprobs": {"content": [{**top[0], "top_logprobs": top}]},
    }


def saying(text: str) -> dict[str, Any]:
    """An answer without log-probs."""
    return {"message": {"role": "assistant", "content": text}}


class ChatServer:
    """One server in a thread; `faults` are what befalls the next requests, "" for none.

    Attributes:
      asked: body of every request that was answered as it should be, in order.
      statuses: of all requests, what became of them.
      most_at_once: requests that were there at the same time.
      at_times: when the requests came.
    """

    def __init__(self, answer: Callable[[str, int], list[dict[str, Any]]] | None = None, key: str = KEY) -> None:
        self.answer = answer or (lambda question, n: [with_logprobs(likes_es(question))])
        self.key = key
        self.faults: list[str] = []
        self.asked: list[dict[str, Any]] = []
        self.statuses: list[str] = []
        self.at_times: list[float] = []
        self.most_at_once = self._now = 0
        self.before: Callable[[int], None] = lambda number: None  # called with the number of a request
        self.released = threading.Event()
        self._lock = threading.Lock()
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self.server.daemon_threads, self.server.block_on_close = True, False
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server.server_port}/v1"

    def questions(self) -> list[str]:
        """What was asked, of the requests that were answered."""
        return [body["messages"][0]["content"] for body in self.asked]

    def close(self) -> None:
        """Ends everything."""
        self.released.set()
        self.server.shutdown()
        self.server.server_close()

    def completion(self, body: dict[str, Any]) -> dict[str, Any]:
        """What is answered when nothing goes wrong."""
        choices = self.answer(body["messages"][0]["content"], body.get("n", 1))
        usage = {"prompt_tokens": INPUT_TOKENS, "completion_tokens": OUTPUT_TOKENS * len(choices), "total_tokens": 0}
        return {"id": "x", "object": "chat.completion", "model": body["model"], "choices": choices, "usage": usage}

    def _handler(own) -> type[BaseHTTPRequestHandler]:
        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with own._lock:
                    own._now += 1
                    own.most_at_once = max(own.most_at_once, own._now)
                    own.at_times.append(time.monotonic())
                    fault = own.faults.pop(0) if own.faults else ""
                    own.statuses.append(fault or "ok")
                    number = len(own.statuses)
                try:
                    own.before(number)
                    self.reply(body, fault)
                except OSError:
                    pass  # who asked is gone
                finally:
                    with own._lock:
                        own._now -= 1

            def reply(self, body: Any, fault: str) -> None:
                whole = json.dumps(own.completion(body)).encode() if self.path == "/v1/chat/completions" else b""
                if not whole:
                    return self.send(404, b'{"error": {"message": "no such path"}}')
                if own.key and self.headers["Authorization"] != f"Bearer {own.key}":
                    said = f"Incorrect API key provided: {self.headers['Authorization']}"
                    return self.send(401, json.dumps({"error": {"message": said}}).encode())
                kind, _, told = fault.partition(" ")
                if kind == "429":
                    return self.send(429, b'{"error": {"message": "slow down"}}', {"Retry-After": told})
                if kind in ("400", "402", "500", "503"):
                    return self.send(int(kind), json.dumps({"error": {"message": told}}).encode())
                if kind == "reset":
                    return self.drop()
                if kind == "hang":
                    own.released.wait()
                    return self.drop()
                if kind == "trickle":  # a byte now and then, so that no read of its own takes long
                    self.head(200, len(whole))
                    for byte in whole:
                        self.wfile.write(bytes([byte]))
                        self.wfile.flush()
                        if own.released.wait(0.02):
                            break
                    return self.drop()
                if kind == "cut":
                    self.head(200, len(whole))
                    self.wfile.write(whole[: len(whole) // 2])
                    self.wfile.flush()
                    return self.drop()
                if kind == "says":  # this body
                    return self.send(200, told.encode())
                if kind == "slow":
                    time.sleep(float(told))
                with own._lock:
                    own.asked.append(body)
                self.send(200, whole)

            def drop(self) -> None:
                self.close_connection = True
                self.connection.shutdown(socket.SHUT_RDWR)

            def head(self, status: int, length: int, headers: dict[str, str] | None = None) -> None:
                self.send_response(status)
                self.send_header("Content-Length", str(length))
                for name, value in (headers or {}).items():
                    self.send_header(name, value)
                self.end_headers()

            def send(self, status: int, content: bytes, headers: dict[str, str] | None = None) -> None:
                self.head(status, len(content), headers)
                self.wfile.write(content)

            def log_message(self, *_: Any) -> None:
                pass

        return Handler


def settings(server: ChatServer, **fields: Any) -> judge.ChatJudgeSettings:
    """A judge at a server."""
    return judge.ChatJudgeSettings(url=server.url, model="any", key_environment="TEST_JUDGE_KEY", **fields)
