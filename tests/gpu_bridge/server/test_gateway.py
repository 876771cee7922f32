"""The gateway in front of an engine that is none: who may ask, for what, and what happens when the engine fails."""

import asyncio
import contextlib
import dataclasses
import json
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import pytest
from safetensors.numpy import save_file

from gpu_bridge import protocol
from gpu_bridge.protocol import GenerateRequest, Response
from gpu_bridge.server import gateway, tensors
from gpu_bridge.server.backend import EngineAnswer, EngineFailed, RequestRefused, engine_seed
from gpu_bridge.server.gateway import Gateway, GatewayConfig

TOKEN = "a-token-for-tests"
WEIGHTS = {
    "model.norm.weight": np.zeros(3, np.float32),
    "model.layers.0.self_attn.q_proj.weight": np.zeros((3, 3), np.float32),
    "model.layers.0.self_attn.k_proj.weight": np.zeros((2, 3), np.float32),
    "model.layers.0.self_attn.v_proj.weight": np.zeros((2, 3), np.float32),
}
ASKED = {
    "prompts": [[1, 2], [3]],
    "num_samples": 2,
    "max_new_tokens": 2,
    "temperature": 1.0,
    "top_k": 0,
    "top_p": 1.0,
    "seeds": [1, 2],
    "eos_ids": [0],
}


class Engine:
    """Answers at once, or as a test wants it."""

    def __init__(self) -> None:
        self.version = protocol.INITIAL
        self.loaded: list[Path] = []
        self.stopped = False
        self.death: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self.fail: Exception | None = None
        self.hold = asyncio.Event()
        self.hold.set()
        self.writing = 0
        self.cancelled = 0

    async def start(self) -> None:
        """Does nothing."""

    async def ended(self) -> str:
        return await asyncio.shield(self.death)

    async def stop(self) -> None:
        self.stopped = True

    async def generate(self, request: GenerateRequest) -> EngineAnswer:
        if self.fail:
            raise self.fail
        version = self.version
        self.writing += 1
        try:
            await self.hold.wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        finally:
            self.writing -= 1
        rows = [[Response([5, 0], [-1.0, -2.0])] * request.num_samples for _ in request.prompts]
        return EngineAnswer(frozenset({version, self.version}), rows)

    async def load(self, path: Path, version: str) -> None:
        if self.fail:
            raise self.fail
        assert not self.writing, "weights were changed under a request"
        assert path.exists()
        self.loaded.append(path)
        self.version = version

    async def score(self, inputs: Sequence[Sequence[int]]) -> list[float]:
        return [float(sum(ids)) for ids in inputs]


@dataclasses.dataclass
class Service:
    """A running gateway.

    Attributes:
      http: a client with the token.
      engines: all that were started.
      run: the task that keeps the engine alive.
      directory: where weights may lie.
    """

    http: httpx2.AsyncClient
    engines: list[Engine]
    run: "asyncio.Task[str]"
    directory: Path

    async def push(self, version: str, arrays: dict[str, np.ndarray] = WEIGHTS, **fields: Any) -> httpx2.Response:
        """Pushes arrays by file."""
        save_file(arrays, self.directory / "weights")
        body = {"version": version, "path": str(self.directory / "weights"), **fields}
        return await self.http.post(protocol.WEIGHTS, json=body)


@contextlib.asynccontextmanager
async def served(
    directory: Path, kind: str = protocol.POLICY, make: Callable[[], Engine] = Engine, **changes: Any
) -> AsyncIterator[Service]:
    """Runs a gateway."""
    save_file(WEIGHTS, directory / "model.safetensors")
    engines: list[Engine] = []

    def remembered() -> Engine:
        engines.append(make())
        return engines[-1]

    config = GatewayConfig(
        kind=kind,
        model="tiny",
        token=TOKEN,
        max_body_bytes=1000,
        vocab_size=10,
        weights_dirs=(directory,),
        tensors=tensors.read_header(directory / "model.safetensors"),
        **changes,
    )
    door = Gateway(config, remembered)
    run = asyncio.create_task(door.run())
    async with httpx2.AsyncClient(
        transport=httpx2.ASGITransport(door.app),
        base_url="http://gateway",
        headers={"Authorization": f"Bearer {TOKEN}"},
    ) as http:
        await asyncio.wait({run, asyncio.create_task(door.ready.wait())}, return_when=asyncio.FIRST_COMPLETED)
        try:
            yield Service(http, engines, run, directory)
        finally:
            run.cancel()
            await asyncio.gather(run, return_exceptions=True)


def together(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[[Path], None]:
    """Runs an asynchronous test."""

    def run(tmp_path: Path) -> None:
        asyncio.run(asyncio.wait_for(test(tmp_path), 20))

    run.__doc__ = test.__doc__
    return run


async def until(condition: Callable[[], bool]) -> None:
    """Waits for a condition."""
    while not condition():
        await asyncio.sleep(0.001)


@together
async def test_nothing_is_told_without_the_token(tmp_path):
    async with served(tmp_path) as service:
        for header in ("", "Bearer", "Bearer ", f"Bearer {TOKEN}x", TOKEN, f"Basic {TOKEN}"):
            for path in ("/health", "/generate", "/pause", "/no"):
                answer = await service.http.post(path, headers={"Authorization": header}, json=ASKED)
                assert answer.status_code == 401
                assert set(answer.json()) == {"error"}
        assert not service.engines[0].loaded
        health = await service.http.get("/health")
        assert health.status_code == 200
        assert health.json().items() >= {"status": "ready", "kind": "policy", "version": "initial"}.items()


@together
async def test_only_our_endpoints_are_there(tmp_path):
    async with served(tmp_path) as service:
        for path in ("/pause", "/collective_rpc", "/v1/completions", "/score", "//health", "/health/"):
            answer = await service.http.post(path)
            assert (answer.status_code, answer.json()["version"]) == (404, "initial"), path
        assert (await service.http.get("/generate")).status_code == 405
    oracle = tmp_path / "oracle"
    oracle.mkdir()
    async with served(oracle, protocol.ORACLE) as service:
        assert (await service.http.post("/generate", json=ASKED)).status_code == 404
        answer = await service.http.post("/score", json={"inputs": [[1, 2], [3]]})
        assert answer.json() == {"version": "initial", "scores": [3.0, 3.0]}


@together
async def test_long_bodies_are_not_read(tmp_path):
    async with served(tmp_path) as service:
        read = 0

        async def endless() -> AsyncIterator[bytes]:
            nonlocal read
            while True:
                read += 100
                yield b" " * 100

        for body in (b" " * 1001, endless()):
            answer = await service.http.post("/generate", content=body)
            assert (answer.status_code, answer.json()["error"]) == (413, "a request may have 1000 bytes")
        assert read <= 1200


@together
async def test_a_wrong_field_is_answered_with_its_name(tmp_path):
    async with served(tmp_path) as service:
        answer = await service.http.post("/generate", json={**ASKED, "top_p": 2})
        assert answer.status_code == 400
        assert answer.json() == {"error": "top_p: expected a number from 0 to 1, found 2", "version": "initial"}
        answer = await service.http.post("/generate", json={**ASKED, "prompts": [[1, 10], [2]]})
        assert (answer.status_code, answer.json()["error"]) == (400, "prompts: expected ids below 10, found 10")
        service.engines[0].fail = RequestRefused("the prompt is too long")
        answer = await service.http.post("/generate", json=ASKED)
        assert (answer.status_code, answer.json()["error"]) == (400, "the prompt is too long")
        assert len(service.engines) == 1


@together
async def test_responses_bear_the_version_that_was_pushed(tmp_path):
    async with served(tmp_path) as service:
        assert (await service.push("a.1")).json() == {"version": "a.1"}
        answer = await service.http.post("/generate", json=ASKED)
        response = {"tokens": [5, 0], "logprobs": [-1.0, -2.0]}
        assert answer.json() == {"version": "a.1", "responses": [[response] * 2] * 2}
        service.engines[0].version = "other"  # what the engine says of its tokens counts
        answer = await service.http.post("/generate", json=ASKED)
        assert (answer.status_code, answer.json()["version"]) == (409, "a.1")


@together
async def test_weights_wait_for_requests_and_requests_for_weights(tmp_path):
    async with served(tmp_path) as service:
        engine = service.engines[0]
        engine.hold.clear()
        first = asyncio.create_task(service.http.post("/generate", json=ASKED))
        await until(lambda: engine.writing == 1)
        push = asyncio.create_task(service.push("a.1"))
        await asyncio.sleep(0.05)
        second = asyncio.create_task(service.http.post("/generate", json=ASKED))
        await asyncio.sleep(0.05)
        assert engine.writing == 1  # the second stands behind the weights
        assert not engine.loaded
        engine.hold.set()
        assert [(await task).json()["version"] for task in (first, push, second)] == ["initial", "a.1", "a.1"]


@together
async def test_changes_need_the_version_that_they_change(tmp_path):
    async with served(tmp_path) as service:
        norm = {"model.norm.weight": WEIGHTS["model.norm.weight"]}
        answer = await service.push("a.2", norm, base="a.1")
        assert (answer.status_code, answer.json()["version"]) == (409, "initial")
        assert not service.engines[0].loaded
        await service.push("a.1")
        assert (await service.push("a.2", norm, base="a.1")).json() == {"version": "a.2"}


@pytest.mark.parametrize(
    ("arrays", "base", "error"),
    [
        ({"model.norm.weight": np.zeros(3, np.float32)}, None, "lacks 3 tensors, .*q_proj.*|lacks 3 .*; no base"),
        ({"x": np.zeros(3, np.float32)}, "initial", "x is no tensor of the model"),
        ({"model.norm.weight": np.zeros(4, np.float32)}, "initial", "expected the shape"),
        ({"model.norm.weight": np.zeros(3, np.int8)}, "initial", "expected one of the dtypes F32, BF16, F16, found I8"),
        (
            {"model.layers.0.self_attn.q_proj.weight": np.zeros((3, 3), np.float32)},
            "initial",
            "lacks 2 tensors, model.layers.0.self_attn.k_proj.weight among them; tensors of one module go together",
        ),
    ],
)
def test_weights_of_another_model_do_not_reach_the_engine(arrays, base, error, tmp_path):
    async def test(tmp_path: Path) -> None:
        async with served(tmp_path) as service:
            answer = await service.push("a.1", arrays, **({"base": base} if base else {}))
            assert answer.status_code == 400
            with pytest.raises(AssertionError, match=error):
                raise AssertionError(answer.json()["error"])
            assert not service.engines[0].loaded

    together(test)(tmp_path)


@together
async def test_files_elsewhere_are_not_read(tmp_path):
    inside = tmp_path / "inside"
    inside.mkdir()
    save_file(WEIGHTS, tmp_path / "outside")
    (inside / "link").symlink_to(tmp_path / "outside")
    (inside / "cut").write_bytes((tmp_path / "outside").read_bytes()[:-1])
    async with served(inside) as service:
        for path, error in [
            (tmp_path / "outside", "expected a regular file in"),
            (inside / "link", "expected a regular file in"),
            (inside / ".." / "outside", "expected a regular file in"),
            (inside, "expected a regular file in"),
            (inside / "none", "cannot be read"),
            (inside / "cut", "bytes, and its header speaks of"),
        ]:
            answer = await service.http.post("/weights", json={"version": "a.1", "path": str(path)})
            assert answer.status_code == 400
            assert error in answer.json()["error"]
        assert not service.engines[0].loaded


@together
async def test_weights_are_fetched_with_the_bearer_and_up_to_their_length(tmp_path):
    save_file(WEIGHTS, tmp_path / "pushed")
    content = (tmp_path / "pushed").read_bytes()
    asked: list[bytes] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        asked.append(head := await reader.readuntil(b"\r\n\r\n"))
        body = content if b"/good" in head else b"x" * 100_000
        writer.write(f"HTTP/1.1 200 OK\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)
        with contextlib.suppress(ConnectionError):
            await writer.drain()
        writer.close()

    async with served(tmp_path) as service, await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        good = {"version": "a.1", "url": f"{url}/good", "bearer": "sesame"}
        assert (await service.http.post("/weights", json=good)).json() == {"version": "a.1"}
        assert b"bearer sesame" in asked[0].lower()
        answer = await service.http.post("/weights", json={**good, "version": "a.2", "url": f"{url}/long"})
        assert (answer.status_code, answer.json()["version"]) == (400, "a.1")
        assert "bytes, which this model's weights cannot have" in answer.json()["error"]
        assert not service.engines[0].loaded[0].exists()  # nothing is left behind
        answer = await service.http.post("/weights", json={**good, "url": "http://"})
        assert (answer.status_code, "UnsupportedProtocol" in answer.json()["error"]) == (400, True)


@pytest.mark.parametrize(
    ("fault", "error"),
    [
        (None, "ConnectError"),
        (b"", "RemoteProtocolError"),
        (b"HTTP/1.1 500 Internal Server Error\r\nContent-Length: 0\r\n\r\n", "answered with status 500"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nhalf", "RemoteProtocolError"),
        (b"HTTP/1.1 200 OK\r\n\r\nhalf", "is no safetensors file"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nsilence", "ReadTimeout"),
    ],
)
def test_a_download_that_breaks_off_may_be_tried_again(fault, error, tmp_path, monkeypatch):
    monkeypatch.setattr(gateway, "DOWNLOAD_TIMEOUT_SECONDS", 0.2)

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(fault)
        if fault.endswith(b"silence"):
            await reader.read()
        writer.close()

    async def test(tmp_path: Path) -> None:
        async with served(tmp_path) as service, await asyncio.start_server(serve, "127.0.0.1", 0) as server:
            url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
            if fault is None:
                server.close()
            answer = await service.http.post("/weights", json={"version": "a.1", "url": url})
            assert (answer.status_code, answer.json()["version"]) == (503, "initial")
            assert error in answer.json()["error"]
            assert (await service.push("a.1")).status_code == 200

    together(test)(tmp_path)


@together
async def test_an_engine_that_ends_is_started_anew_without_its_weights(tmp_path):
    async with served(tmp_path, max_restarts=2) as service:
        await service.push("a.1")
        before = (await service.http.get("/health")).json()
        service.engines[0].death.set_result("it was ended by signal 9")
        await until(lambda: len(service.engines) == 2)
        assert service.engines[0].stopped
        after = (await service.http.get("/health")).json()
        assert (before["version"], after["version"]) == ("a.1", "initial")
        assert before["started"] != after["started"]
        answer = await service.push("a.2", {"model.norm.weight": WEIGHTS["model.norm.weight"]}, base="a.1")
        assert (answer.status_code, answer.json()["version"]) == (409, "initial")
        service.engines[1].death.set_result("it ended with exit status 1")
        await until(lambda: len(service.engines) == 3)
        service.engines[2].death.set_result("it ended with exit status 1")
        assert "exit status 1" in await service.run
        assert len(service.engines) == 3
        answer = await service.http.get("/health")
        assert (answer.status_code, answer.json()["status"]) == (503, "failed")
        assert "exit status 1; it was started anew 2 times" in answer.json()["error"]
        assert (await service.http.post("/generate", json=ASKED)).status_code == 503


@together
async def test_an_engine_that_fails_at_a_request_is_replaced(tmp_path):
    async with served(tmp_path) as service:
        service.engines[0].fail = EngineFailed("it answered with status 500")
        answer = await service.http.post("/generate", json=ASKED)
        assert answer.status_code == 503
        assert answer.json()["error"] == "the engine failed and is started anew: it answered with status 500"
        await until(lambda: len(service.engines) == 2)
        await until(lambda: service.engines[0].stopped)
        assert (await service.http.post("/generate", json=ASKED)).status_code == 200
        service.engines[1].fail = EngineFailed("half of the weights")
        assert (await service.push("a.1")).status_code == 503
        await until(lambda: len(service.engines) == 3)
        assert (await service.http.get("/health")).json()["version"] == "initial"


@together
async def test_an_engine_that_never_starts_is_not_started_again(tmp_path):
    class Broken(Engine):
        async def start(self) -> None:
            raise EngineFailed("no such model")

    async with served(tmp_path, make=Broken) as service:
        assert await service.run == "no such model"
        assert len(service.engines) == 1
        assert service.engines[0].stopped
        health = await service.http.get("/health")
        assert (health.status_code, health.json()["error"]) == (503, "no such model")


@together
async def test_a_start_that_fails_in_any_way_is_tried_again(tmp_path):
    faults = [None, OSError(28, "No space left on device"), RequestRefused("too long"), None]

    class Unlucky(Engine):
        async def start(self) -> None:
            if fault := faults.pop(0):
                raise fault

    async with served(tmp_path, make=Unlucky) as service:
        service.engines[0].death.set_result("it was ended by signal 9")
        await until(lambda: len(service.engines) == 4)
        await until(lambda: all(engine.stopped for engine in service.engines[:3]))
        assert (await service.http.post("/generate", json=ASKED)).status_code == 200


@together
async def test_work_that_nobody_waits_for_is_given_up(tmp_path):
    async with served(tmp_path) as service:
        engine = service.engines[0]
        engine.hold.clear()
        sent = [{"type": "http.request", "body": json.dumps(ASKED).encode(), "more_body": False}]
        left = asyncio.Event()

        async def receive() -> dict[str, Any]:
            if sent:
                return sent.pop()
            await left.wait()
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            """Nobody reads it."""

        scope = {
            "type": "http",
            "method": "POST",
            "path": "/generate",
            "query_string": b"",
            "headers": [(b"authorization", f"Bearer {TOKEN}".encode())],
        }
        transport = service.http._transport
        assert isinstance(transport, httpx2.ASGITransport)
        request = asyncio.ensure_future(transport.app(scope, receive, send))  # type: ignore[arg-type,var-annotated]
        await until(lambda: engine.writing == 1)
        left.set()
        await request
        await until(lambda: engine.cancelled == 1)


def test_seeds_are_spread():
    spread = [engine_seed(seed) for seed in range(1000)]
    assert all(0 <= seed < 2**62 for seed in spread)
    assert min(b - a for a, b in zip(sorted(spread), sorted(spread)[1:], strict=False)) > protocol.MAX_SAMPLES
