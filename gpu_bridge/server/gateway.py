"""The only door to an engine: asks for the token, bounds sizes, checks fields, keeps versions apart, restarts the engine."""

import asyncio
import collections
import contextlib
import hmac
import logging
import os
import secrets
import stat
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import httpx2
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route

from gpu_bridge import protocol
from gpu_bridge.protocol import (
    Failure,
    GenerateAnswer,
    GenerateRequest,
    Health,
    ProtocolError,
    ScoreAnswer,
    ScoreRequest,
    WeightsAnswer,
    WeightsRequest,
)
from gpu_bridge.server import tensors
from gpu_bridge.server.backend import Backend, EngineFailed, RequestRefused

RESTART_SECONDS = 3600.0  # max_restarts counts those within so many seconds
DOWNLOAD_TIMEOUT_SECONDS = 60.0  # without a byte
DOWNLOAD_PART_BYTES = 2**22

Result = TypeVar("Result")


@dataclass(frozen=True)
class GatewayConfig:
    """What a gateway guards.

    Attributes:
      kind: protocol.POLICY or protocol.ORACLE.
      model: its name.
      token: who has it may ask.
      max_body_bytes: longest request.
      vocab_size: V; the engine would read whatever lies behind the last embedding.
      weights_dirs: files with weights must lie in one of these; downloads go to the first.
      tensors: of the model, for the check of files with weights.
      max_restarts: of an engine that ended, within an hour.
    """

    kind: str
    model: str
    token: str
    max_body_bytes: int
    vocab_size: int
    weights_dirs: tuple[Path, ...]
    tensors: dict[str, tensors.Tensor]
    max_restarts: int = 3


class Refusal(Exception):
    """Ends a request with a status code and a sentence."""

    def __init__(self, status: int, error: str) -> None:
        super().__init__(error)
        self.status = status


class ReadersWriter:
    """Lets in many readers or one writer; who waits to write goes before new readers."""

    def __init__(self) -> None:
        self._condition = asyncio.Condition()
        self._readers = 0
        self._writing = False
        self._waiting = 0

    @contextlib.asynccontextmanager
    async def reading(self) -> AsyncIterator[None]:
        """Holds off writers."""
        async with self._condition:
            await self._condition.wait_for(lambda: not self._writing and not self._waiting)
            self._readers += 1
        try:
            yield
        finally:
            async with self._condition:
                self._readers -= 1
                self._condition.notify_all()

    @contextlib.asynccontextmanager
    async def writing(self) -> AsyncIterator[None]:
        """Holds off everybody else."""
        async with self._condition:
            self._waiting += 1
            try:
                await self._condition.wait_for(lambda: not self._writing and not self._readers)
                self._writing = True
            finally:
                self._waiting -= 1
                self._condition.notify_all()
        try:
            yield
        finally:
            async with self._condition:
                self._writing = False
                self._condition.notify_all()


class Gateway:
    """A model's door: `app` answers requests, `run` keeps the engine alive."""

    def __init__(self, config: GatewayConfig, engine: Callable[[], Backend]) -> None:
        """Makes a gateway that answers 503 until `run` has started an engine.

        Args:
          config: GatewayConfig.
          engine: makes an engine that is not started yet.
        """
        self.ready = asyncio.Event()
        self._config = config
        self._make_engine = engine
        self._engine: Backend | None = None
        self._lock = ReadersWriter()
        self._status, self._error = protocol.STARTING, "the engine is starting"
        self._version, self._started = protocol.INITIAL, ""
        self._failure: asyncio.Future[str] | None = None
        endpoints = {
            protocol.HEALTH: ("GET", self._health),
            protocol.GENERATE: ("POST", self._generate),
            protocol.WEIGHTS: ("POST", self._weights),
            protocol.SCORE: ("POST", self._score),
        }
        other = {protocol.POLICY: (protocol.SCORE,), protocol.ORACLE: (protocol.GENERATE, protocol.WEIGHTS)}
        self._endpoints = {path: way for path, way in endpoints.items() if path not in other[config.kind]}
        self.app = Starlette(routes=[Route("/{path:path}", self._answer, methods=_METHODS)])

    # ----------------------------------------------------------------------------------------------- The engine's life

    async def run(self) -> str:
        """Starts the engine, and again when it ends; cancelling this ends it.

        Returns:
          Why there is no engine any more.
        """
        restarts: collections.deque[float] = collections.deque(maxlen=self._config.max_restarts)
        while True:
            reason = await self._run_once()
            logging.error("%s", reason)
            now = time.monotonic()
            often = len(restarts) == restarts.maxlen and (not restarts or now - restarts[0] < RESTART_SECONDS)
            if often or not self.ready.is_set():
                limit = f"; it was started anew {len(restarts)} times within the hour" if self.ready.is_set() else ""
                self._status, self._error = protocol.FAILED, reason + limit
                return self._error
            restarts.append(now)
            self._error = f"the engine is being started anew: {reason}"

    async def _run_once(self) -> str:
        """One engine from its start to its end; returns why it ended."""
        self._status, self._version = protocol.STARTING, protocol.INITIAL
        engine = self._make_engine()
        ended = None
        try:
            await engine.start()
            self._failure = asyncio.get_running_loop().create_future()
            self._engine, self._started = engine, secrets.token_hex(8)
            self._status, self._error = protocol.READY, ""
            if self.ready.is_set():
                logging.warning("the engine answers again, with the weights it was started with")
            self.ready.set()
            ended = asyncio.ensure_future(engine.ended())
            done, _ = await asyncio.wait({ended, self._failure}, return_when=asyncio.FIRST_COMPLETED)
            return done.pop().result()
        except EngineFailed as error:
            return str(error)
        except (RequestRefused, OSError) as error:  # of the warm-up; a full disk
            return f"the engine did not start: {error}"
        finally:
            self._engine, self._status = None, protocol.STARTING
            if ended is not None:
                ended.cancel()
            await engine.stop()

    def _give_up(self, engine: Backend, reason: str) -> None:
        """Has an engine replaced that failed at a request."""
        if engine is self._engine and self._failure is not None and not self._failure.done():
            self._failure.set_result(reason)
            self._engine, self._status, self._error = None, protocol.STARTING, reason

    def _ready_engine(self) -> Backend:
        """Returns the engine; refuses when there is none."""
        if self._engine is None:
            raise Refusal(503, self._error)
        return self._engine

    async def _ask(self, engine: Backend, work: Awaitable[Result]) -> Result:
        """Waits for an engine's answer; its failure is the engine's end."""
        try:
            return await work
        except RequestRefused as error:
            raise Refusal(400, str(error)) from None
        except EngineFailed as error:
            self._give_up(engine, str(error))
            raise Refusal(503, f"the engine failed and is started anew: {error}") from None

    # ------------------------------------------------------------------------------------------------------- Requests

    async def _answer(self, request: Request) -> Response:
        """Answers any request: the token first, then everything else."""
        scheme, _, token = request.headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not hmac.compare_digest(token.encode(), self._config.token.encode()):
            return _json(401, Failure("expected the header 'Authorization: Bearer TOKEN' with this server's token"))
        try:
            method, endpoint = self._endpoints.get(request.url.path, ("", None))
            if endpoint is None:
                names = ", ".join(self._endpoints)
                raise Refusal(404, f"no such endpoint at a server of kind {self._config.kind!r}; there are {names}")
            if request.method != method:
                raise Refusal(405, f"{request.url.path} is asked with {method}")
            return await endpoint(request)
        except Refusal as refusal:
            return _json(refusal.status, Failure(str(refusal), self._version))
        except ProtocolError as error:
            return _json(400, Failure(str(error), self._version))
        except ClientDisconnect:
            return Response(status_code=499)  # nobody will read it

    async def _body(self, request: Request) -> bytes:
        """Reads a request's body as far as its length is allowed."""
        limit = self._config.max_body_bytes
        too_long = Refusal(413, f"a request may have {limit} bytes")
        length = request.headers.get("content-length", "")
        if length.isdigit() and int(length) > limit:
            raise too_long
        parts, size = [], 0
        async for part in request.stream():
            size += len(part)
            if size > limit:
                raise too_long
            parts.append(part)
        return b"".join(parts)

    async def _health(self, request: Request) -> Response:
        """GET /health."""
        ready = self._status == protocol.READY
        health = Health(
            self._status, self._config.kind, self._config.model, self._version, self._started, self._error or None
        )
        return _json(200 if ready else 503, health)

    async def _generate(self, request: Request) -> Response:
        """POST /generate."""
        asked = protocol.parse(GenerateRequest, await self._body(request))
        self._check_ids("prompts", asked.prompts)
        return await _unless_disconnected(request, self._write(asked))

    async def _write(self, asked: GenerateRequest) -> Response:
        """Has responses written, all by the same weights."""
        async with self._lock.reading():
            engine, version = self._ready_engine(), self._version
            answered = await self._ask(engine, engine.generate(asked))
            if answered.versions != {version} or engine is not self._engine:
                raise Refusal(409, f"the weights changed while the responses were written: {sorted(answered.versions)}")
        answer = GenerateAnswer(version, answered.responses)
        try:
            answer.check(asked)
        except ProtocolError as error:
            raise Refusal(503, f"the engine's answer does not fit the question: {error}") from None
        return _json(200, answer)

    async def _score(self, request: Request) -> Response:
        """POST /score."""
        asked = protocol.parse(ScoreRequest, await self._body(request))
        self._check_ids("inputs", asked.inputs)
        engine = self._ready_engine()
        scores = await _unless_disconnected(request, self._ask(engine, engine.score(asked.inputs)))
        return _json(200, ScoreAnswer(self._version, scores))

    async def _weights(self, request: Request) -> Response:
        """POST /weights."""
        asked = protocol.parse(WeightsRequest, await self._body(request))
        self._ready_engine()
        self._check_base(asked)
        # To the end even when nobody waits for the answer: half of the weights would be of no use.
        return await asyncio.shield(asyncio.ensure_future(self._load(asked)))

    def _check_ids(self, name: str, rows: list[list[int]]) -> None:
        """Refuses token ids that the model does not have."""
        highest = max(max(row) for row in rows)
        if highest >= self._config.vocab_size:
            raise Refusal(400, f"{name}: expected ids below {self._config.vocab_size}, found {highest}")

    def _check_base(self, asked: WeightsRequest) -> None:
        """Refuses changes to other weights than those that are served."""
        if asked.base is not None and asked.base != self._version:
            raise Refusal(409, f"base: this server serves the version {self._version!r}, not {asked.base!r}")

    async def _load(self, asked: WeightsRequest) -> Response:
        """Gets the weights, waits until nothing is being written, and has them served."""
        async with contextlib.AsyncExitStack() as stack:
            if asked.url is None:
                assert asked.path is not None
                path = await asyncio.to_thread(_resolve_within, Path(asked.path), self._config.weights_dirs)
            else:
                try:
                    directory = tempfile.TemporaryDirectory(prefix="bridge-", dir=self._config.weights_dirs[0])
                    path = Path(stack.enter_context(directory)) / "weights.safetensors"
                    await _download(asked.url, asked.bearer, path, tensors.max_file_bytes(self._config.tensors))
                except OSError as error:
                    raise Refusal(503, f"url: the weights cannot be kept: {error}") from None
            try:
                given = await asyncio.to_thread(tensors.read_header, path)
            except (ValueError, OSError) as error:
                # A download whose length was not told may have been cut: it may go well another time.
                raise Refusal(400 if asked.url is None else 503, str(error)) from None
            try:
                tensors.check(given, self._config.tensors, whole=asked.base is None)
            except ValueError as error:
                raise Refusal(400, str(error)) from None
            async with self._lock.writing():
                engine = self._ready_engine()
                self._check_base(asked)
                await self._ask(engine, engine.load(path, asked.version))
                if engine is not self._engine:
                    raise Refusal(503, self._error)
                self._version = asked.version
        return _json(200, WeightsAnswer(asked.version))


_METHODS = ["GET", "POST", "PUT", "PATCH", "DELETE", "HEAD", "OPTIONS"]


def _json(status: int, message: Any) -> Response:
    """Makes a response of a message."""
    return Response(protocol.to_json(message), status, media_type="application/json")


async def _unless_disconnected(request: Request, work: Coroutine[Any, Any, Result]) -> Result:
    """Waits for an answer as long as there is somebody to read it."""

    async def disconnected() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(disconnected())
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        return task.result()
    finally:
        gone.cancel()
        task.cancel()


def _resolve_within(path: Path, directories: tuple[Path, ...]) -> Path:
    """Returns a regular file's true path; refuses one outside the directories."""
    names = " or ".join(map(str, directories))
    try:
        true = path.resolve(strict=True)
        regular = stat.S_ISREG(true.stat().st_mode) and os.access(true, os.R_OK)
    except (OSError, RuntimeError):
        raise Refusal(400, f"path: expected a file in {names}, {path} cannot be read") from None
    if not regular or not any(true.is_relative_to(directory.resolve()) for directory in directories):
        raise Refusal(400, f"path: expected a regular file in {names}, found {path}")
    return true


async def _download(url: str, bearer: str | None, path: Path, most: int) -> None:
    """Writes what a URL gives to a file, up to a length; refuses with 503 what may go well another time."""
    headers = {} if bearer is None else {"Authorization": f"Bearer {bearer}"}
    try:
        async with (
            httpx2.AsyncClient(trust_env=False, timeout=DOWNLOAD_TIMEOUT_SECONDS) as client,
            client.stream("GET", url, headers=headers) as answer,
        ):
            if answer.status_code != 200:
                raise Refusal(503, f"url: {url} answered with status {answer.status_code}")
            size = 0
            with path.open("wb") as file:
                async for part in answer.aiter_raw(DOWNLOAD_PART_BYTES):
                    size += len(part)
                    if size > most:
                        raise Refusal(400, f"url: more than {most} bytes, which this model's weights cannot have")
                    await asyncio.to_thread(file.write, part)
    except (httpx2.HTTPError, httpx2.InvalidURL) as error:
        malformed = isinstance(error, httpx2.InvalidURL | httpx2.UnsupportedProtocol | httpx2.LocalProtocolError)
        reason = f"url: {url} cannot be got: {type(error).__name__} {error}"
        raise Refusal(400 if malformed else 503, reason) from None
