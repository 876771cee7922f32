"""The learner's side of the bridge: several servers share the work, and faults that pass are waited for."""

import http.client
import logging
import os
import secrets
import ssl
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from gpu_bridge import protocol, weights
from gpu_bridge.protocol import GenerateRequest, ProtocolError, Response, ScoreRequest, WeightsRequest
from gpu_bridge.weights import Route
from sea_jax.runtime import backoff
from sea_jax.types import OtherVersion

MAX_ANSWER_BYTES = 2**30
HEALTH_TIMEOUT_S = 10.0
MAX_LOGPROB = 1e-3  # a log-prob may round to a little above 0
START_COMMANDS = {
    protocol.POLICY: ("actor", "python -m gpu_bridge.serve_policy"),
    protocol.ORACLE: ("oracle", "python -m gpu_bridge.serve_oracle"),
}

Item = TypeVar("Item")
Result = TypeVar("Result")
Message = TypeVar("Message")

log = logging.getLogger("absl")  # the one whose lines the learner shows


class Unavailable(ConnectionError):
    """A server gave no answer that can be used; the text names it and says why. This may pass."""


class Starting(Unavailable):
    """A server that will be ready in a while."""


class Refused(ValueError):
    """A server will never do what it is asked to; the text says what to change."""


@dataclass(frozen=True)
class Patience:
    """How long servers are waited for.

    Attributes:
      timeout_s: seconds until a server must have answered.
      retries: how often all servers are tried again after none has answered.
      backoff_s: seconds before the first of these; they double each time.
      max_backoff_s: seconds at most.
    """

    timeout_s: float = 600.0
    retries: int = 8
    backoff_s: float = backoff.FIRST_S
    max_backoff_s: float = backoff.LONGEST_S

    def wait(self, failures: int) -> None:
        """Sleeps after nobody has answered so many times in a row, at least 1."""
        time.sleep(backoff.wait_s(failures, self.backoff_s, self.max_backoff_s))


@dataclass(frozen=True)
class Servers:
    """Servers of one kind.

    Attributes:
      kind: protocol.POLICY or protocol.ORACLE.
      urls: of each, without a path.
      token: what they let in.
      patience: Patience.
    """

    kind: str
    urls: tuple[str, ...]
    token: str
    patience: Patience = Patience()


def read_token(file: str = "") -> str:
    """Returns the token that the servers let in.

    Args:
      file: holds it; "": the environment variable SEA_JAX_BRIDGE_TOKEN does.

    Raises:
      ValueError: it is nowhere, or empty.
    """
    if not file:
        token, place = (
            os.environ.get(protocol.TOKEN_VARIABLE, ""),
            f"the environment variable {protocol.TOKEN_VARIABLE}",
        )
    else:
        place = f"config.bridge_token_file={file}"
        try:
            token = Path(file).expanduser().read_text(encoding="utf-8")
        except OSError as error:
            raise ValueError(f"{place}: {error.strerror}; a server prints where its token lies") from error
    if not token.strip().isascii() or not token.strip().isprintable() or not token.strip():
        raise ValueError(
            f"{place} holds no token, which the servers ask for: set it to theirs, or name the file that holds it "
            "with --config.bridge_token_file=FILE"
        )
    return token.strip()


class PolicyClient:
    """Policy servers as `sea_jax.types.PolicyServers` describes them.

    Attributes:
      run: begins the names of the versions that are pushed from here.
      turn: a lock, held by whoever has responses written.
    """

    def __init__(
        self,
        urls: Sequence[str],
        token: str,
        patience: Patience = Patience(),
        route: Route = Route(),  # noqa: B008
    ) -> None:
        """Takes the servers' URLs, without a path, and the token that they let in; nothing is asked yet."""
        self.run = secrets.token_hex(6)
        self.turn = threading.Lock()
        self._servers = Servers(protocol.POLICY, tuple(urls), token, patience)
        self._route = route

    def versions(self) -> dict[str, str]:
        """As in PolicyServers."""
        return {url: health.version for url, health in ready_servers(self._servers).items()}

    def push(
        self, tensors: Mapping[str, np.ndarray], version: str, urls: Sequence[str], base: str | None = None
    ) -> None:
        """As in PolicyServers."""
        with weights.offer(tensors, self._route) as offer:
            request = WeightsRequest(version=version, base=base, **vars(offer))

            def give(url: str) -> None:
                answer = exchange(self._servers, url, protocol.WEIGHTS, request, protocol.WeightsAnswer)
                if answer.version != version:
                    raise OtherVersion(f"{url} was given version {version} and has {answer.version}")

            outcomes = in_parallel(give, urls)
        faults = [outcome for outcome in outcomes if isinstance(outcome, Exception)]
        for fault in faults:
            if not isinstance(fault, Unavailable | OtherVersion):
                raise fault
            log.warning("weights %s not taken: %s", version, fault)
        if len(faults) == len(urls):
            raise OtherVersion("; ".join(map(str, faults)))

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        seeds: Sequence[int],
        version: str,
        *,
        num_samples: int,
        max_new_tokens: int,
        eos_ids: Sequence[int],
        absent_ids: Sequence[int],
        vocab_size: int,
        temperature: float,
        top_k: int,
        top_p: float,
    ) -> list[list[Response]]:
        """As in PolicyServers."""
        template = GenerateRequest(
            prompts=[[0]],
            num_samples=num_samples,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            seeds=[0],
            eos_ids=list(eos_ids),
            absent_ids=list(absent_ids) or None,
        )

        def ask(url: str, rows: Sequence[tuple[Sequence[int], int]]) -> list[list[Response]]:
            found = health(self._servers, url).version
            if found != version:  # better known before it has worked for nothing
                raise OtherVersion(f"{url} has version {found}, asked for is {version}")
            request = replace(template, prompts=[list(ids) for ids, _ in rows], seeds=[seed for _, seed in rows])
            answer = exchange(self._servers, url, protocol.GENERATE, request, protocol.GenerateAnswer)
            if answer.version != version:
                raise OtherVersion(f"{url} wrote with version {answer.version}, asked for is {version}")
            try:
                answer.check(request)
                check_responses(answer.responses, request.eos_ids, vocab_size, absent_ids)
            except ProtocolError as error:
                raise Unavailable(f"{url} answered garbage ({error})") from error
            return answer.responses

        rows_at_once = max(1, min(protocol.MAX_ROWS, protocol.MAX_NEW_TOKENS // (num_samples * max_new_tokens)))
        return share(self._servers, list(zip(prompts, seeds, strict=True)), ask, rows_at_once)


class OracleClient:
    """Servers of one reward model."""

    def __init__(self, urls: Sequence[str], token: str, patience: Patience = Patience(), batch_size: int = 32) -> None:
        """Takes the servers' URLs, without a path, and the token that they let in; nothing is asked yet.

        Args:
          batch_size: inputs of one request; where a server fails, the requests that it has answered count.
        """
        self._servers = Servers(protocol.ORACLE, tuple(urls), token, patience)
        self._batch_size = min(batch_size, protocol.MAX_ROWS)
        self._known_ready: set[str] = set()  # URLs of those that were ready and have not failed since

    def score(self, inputs: Sequence[Sequence[int]]) -> np.ndarray:
        """Scores conversations.

        Args:
          inputs: N, token ids without padding.

        Returns:
          [N] float64.

        Raises:
          OSError: no server is up after all the waiting.
          ValueError: a server refuses, and says why.
        """

        def ask(url: str, rows: Sequence[Sequence[int]]) -> list[float]:
            request = ScoreRequest([list(ids) for ids in rows])
            if url not in self._known_ready:
                health(self._servers, url)  # tells one that starts, and is worth waiting for, from one that is broken
            self._known_ready.discard(url)
            answer = exchange(self._servers, url, protocol.SCORE, request, protocol.ScoreAnswer)
            try:
                answer.check(request)
            except ProtocolError as error:
                raise Unavailable(f"{url} answered garbage ({error})") from error
            self._known_ready.add(url)
            return answer.scores

        return np.array(share(self._servers, inputs, ask, self._batch_size), np.float64)


def check_responses(
    rows: Sequence[Sequence[Response]], eos_ids: Sequence[int], vocab_size: int, absent_ids: Sequence[int]
) -> None:
    """Raises ProtocolError for responses that no model with this vocabulary can have written."""
    for response in (response for row in rows for response in row):
        if max(response.tokens) >= vocab_size:
            raise ProtocolError(
                f"tokens: {max(response.tokens)} is none of the {vocab_size} of the policy's vocabulary; is it the same model?"
            )
        if drawn := set(response.tokens).intersection(absent_ids):
            raise ProtocolError(f"tokens: {min(drawn)} is no token, and asked was not to draw it")
        if set(response.tokens[:-1]).intersection(eos_ids):
            raise ProtocolError("tokens: a response goes on behind its end")
        if max(response.logprobs) > MAX_LOGPROB:
            raise ProtocolError(f"logprobs: {max(response.logprobs)} is the logarithm of no probability")


# --------------------------------------------------------------------------------------------------------- Sharing the work


def share(
    servers: Servers, items: Sequence[Item], ask: Callable[[str, Sequence[Item]], Sequence[Result]], rows_at_once: int
) -> list[Result]:
    """Has the servers do a part of the work each; what one fails to do goes to the others at once.

    Args:
      servers: Servers.
      items: N.
      ask: a URL and some items -> the result of each, or one of this module's errors or OtherVersion.
      rows_at_once: items of one request at most.

    Returns:
      N results, in order.

    Raises:
      Unavailable: none has answered after all the waiting.
      OtherVersion: those that are up have other weights.
      Refused: one of them says that it makes no sense to ask again.
    """
    results: dict[int, Result] = {}
    retries = Retries(servers)
    usable = list(servers.urls)
    while len(results) < len(items):
        open_items = [index for index in range(len(items)) if index not in results]
        parts = [part for part in split(open_items, len(usable)) if part]

        def work(place: tuple[str, Sequence[int]], done: dict[int, Result] = results, size: int = rows_at_once) -> None:
            url, part = place
            for start in range(0, len(part), size):
                some = part[start : start + size]
                answer = ask(url, [items[index] for index in some])
                done.update(zip(some, answer, strict=True))

        asked = usable[: len(parts)]
        outcomes = dict(zip(asked, in_parallel(work, list(zip(asked, parts, strict=True))), strict=True))
        faults = {url: fault for url, fault in outcomes.items() if isinstance(fault, Exception)}
        for fault in faults.values():
            if not isinstance(fault, Unavailable | OtherVersion):
                raise fault
        usable = [url for url in usable if url not in faults]
        if faults:
            log.warning("%s", "; ".join(map(str, faults.values())))
        if not usable and any(isinstance(fault, OtherVersion) for fault in faults.values()):
            raise OtherVersion("; ".join(map(str, faults.values())))
        if not usable:
            retries.wait(faults, progress=len(open_items) > len(items) - len(results))
            usable = list(servers.urls)
    return [results[index] for index in range(len(items))]


class Retries:
    """Counts how often nobody has answered, sleeps longer each time, and gives up in the end."""

    def __init__(self, servers: Servers) -> None:
        self._servers, self._failures, self._since = servers, 0, time.monotonic()

    def wait(self, faults: Mapping[str, Exception], progress: bool = False) -> None:
        """Sleeps before the servers are tried again.

        Args:
          faults: what every URL said.
          progress: a part of the work was done since the last time.

        Raises:
          Unavailable: it is enough.
        """
        patience = self._servers.patience
        if progress:
            self._failures, self._since = 0, time.monotonic()
        waited = time.monotonic() - self._since
        starting = any(isinstance(fault, Starting) for fault in faults.values()) and waited < patience.timeout_s
        if self._failures >= patience.retries and not starting:
            part, command = START_COMMANDS[self._servers.kind]
            raise Unavailable(
                f"no {self._servers.kind} server of config.{part}.urls has answered in {self._failures + 1} tries over "
                f"{waited:.0f} s: {'; '.join(map(str, faults.values()))}. See the servers' logs and start them again "
                f"(`{command}`), or name others; the same command then goes on from the last checkpoint"
            )
        self._failures += 1
        patience.wait(self._failures)


def split(items: Sequence[Item], num_parts: int) -> Iterator[Sequence[Item]]:
    """Yields parts, in order, whose sizes differ by at most one: the greater first, empty ones last."""
    size, more = divmod(len(items), num_parts)
    start = 0
    for part in range(num_parts):
        end = start + size + (part < more)
        yield items[start:end]
        start = end


def in_parallel(function: Callable[[Item], Result], items: Sequence[Item]) -> list[Result | Exception]:
    """Calls a function for each item in a thread of its own; Ctrl-C leaves at once those that are not done.

    Returns:
      N results, or the exceptions in their places.
    """
    outcomes: dict[int, Result | Exception] = {}

    def call(index: int) -> None:
        try:
            outcomes[index] = function(items[index])
        except Exception as error:
            outcomes[index] = error

    # Daemons: those of an executor would be waited for, by it and at the interpreter's end, as long as a server hangs.
    threads = [threading.Thread(target=call, args=(index,), daemon=True) for index in range(len(items))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [outcomes[index] for index in range(len(items))]


# ------------------------------------------------------------------------------------------------------------- One exchange


def ready_servers(servers: Servers) -> dict[str, protocol.Health]:
    """Asks all servers how they are, until one is ready; returns the URL and Health of those that are.

    Raises:
      Unavailable: none is after all the waiting.
      Refused: the token or the URL is wrong.
    """
    retries = Retries(servers)
    while True:
        outcomes = dict(zip(servers.urls, in_parallel(lambda url: health(servers, url), servers.urls), strict=True))
        faults = {url: outcome for url, outcome in outcomes.items() if isinstance(outcome, Exception)}
        for fault in faults.values():
            if not isinstance(fault, Unavailable):
                raise fault
            log.warning("%s", fault)
        found = {url: outcome for url, outcome in outcomes.items() if isinstance(outcome, protocol.Health)}
        if found:
            return found
        retries.wait(faults)


def health(servers: Servers, url: str) -> protocol.Health:
    """Returns how one of the servers is, if it is ready.

    Raises:
      Unavailable: it is not up, or not ready.
      Refused: it lets nobody in who has this token, or it is a server of another kind.
    """
    timeout_s = min(HEALTH_TIMEOUT_S, servers.patience.timeout_s)
    status, body = request_bytes(url, "GET", protocol.HEALTH, servers.token, None, timeout_s)
    if status not in (200, 503):
        raise _error(servers, url, status, body)
    found = _parse(url, protocol.Health, body)
    if found.kind != servers.kind:
        part, command = START_COMMANDS[servers.kind]
        raise Refused(
            f"config.{part}.urls: {url} is a server of kind {found.kind}; name one that `{command}` has started"
        )
    if found.status == protocol.STARTING:
        raise Starting(f"{url} is starting")
    if found.status != protocol.READY:
        raise Unavailable(f"{url} is {found.status} ({found.error})")
    return found


def exchange(servers: Servers, url: str, path: str, request: Any, kind: type[Message]) -> Message:
    """Sends one of the servers a message of `protocol`, and reads its answer.

    Raises:
      Unavailable: there is none, or it is not such a message.
      OtherVersion: the server has other weights than it would need.
      Refused: it makes no sense to ask again.
    """
    body = protocol.to_json(request)
    if len(body) > protocol.MAX_BODY_BYTES:
        raise Refused(
            f"{url}: a request of {len(body)} bytes is more than the {protocol.MAX_BODY_BYTES} that a server takes; make "
            "config.data.batch_size, config.eval.batch_size or config.oracle.batch_size smaller"
        )
    status, answer = request_bytes(url, "POST", path, servers.token, body, servers.patience.timeout_s)
    if status != 200:
        raise _error(servers, url, status, answer)
    return _parse(url, kind, answer)


def _parse(url: str, kind: type[Message], body: bytes) -> Message:
    """The message in an answer."""
    try:
        return protocol.parse(kind, body)
    except ProtocolError as error:
        raise Unavailable(f"{url} answered garbage ({error})") from error


def _error(servers: Servers, url: str, status: int, body: bytes) -> Exception:
    """What an answer with another status code than 200 means."""
    part, command = START_COMMANDS[servers.kind]
    try:
        failure = protocol.parse(protocol.Failure, body)
    except ProtocolError:
        failure = protocol.Failure(f"status {status}, {body[:80]!r}")
    if status in (401, 403):
        return Refused(
            f"config.{part}.urls: {url} does not let in who has the learner's token ({failure.error}); put that "
            f"of the server into the variable {protocol.TOKEN_VARIABLE}, or the name of its file into config.bridge_token_file"
        )
    if status == 409:
        return OtherVersion(f"{url} has version {failure.version}: {failure.error}")
    if status in (408, 429) or status >= 500:
        return Unavailable(f"{url} failed ({failure.error})")
    if status in (400, 413, 422):
        return Refused(f"{url} refuses what it was asked ({failure.error})")
    return Refused(
        f"config.{part}.urls: {url} is no server of the bridge ({failure.error}); name one that `{command}` has started"
    )


def request_bytes(
    url: str, method: str, path: str, token: str, body: bytes | None, timeout_s: float
) -> tuple[int, bytes]:
    """One HTTP request, on a connection of its own; proxies and redirections are not followed.

    Args:
      url: http:// or https://, host and port.
      method: GET or POST.
      path: begins with a slash.
      token: put into the Authorization header.
      body: JSON, or None.
      timeout_s: seconds for everything.

    Returns:
      Status code and body.

    Raises:
      Unavailable: there was no whole answer in time.
    """
    parts, deadline = urllib.parse.urlsplit(url), time.monotonic() + timeout_s
    assert parts.hostname
    connection: http.client.HTTPConnection
    if parts.scheme == "https":
        context = ssl.create_default_context()
        connection = http.client.HTTPSConnection(parts.hostname, parts.port, timeout=timeout_s, context=context)
    else:
        connection = http.client.HTTPConnection(parts.hostname, parts.port, timeout=timeout_s)
    headers = {"Authorization": f"Bearer {token}", "Content-Type": "application/json", "Connection": "close"}
    try:
        connection.connect()
        socket = connection.sock  # getresponse takes it away from a connection that will close
        socket.settimeout(max(deadline - time.monotonic(), 1e-3))
        connection.request(method, path, body, headers)
        socket.settimeout(max(deadline - time.monotonic(), 1e-3))
        response = connection.getresponse()
        received, size = [], 0
        while True:
            socket.settimeout(max(deadline - time.monotonic(), 1e-3))  # not anew for every byte that trickles in
            piece = response.read1(2**20)
            if not piece:
                break
            received.append(piece)
            size += len(piece)
            if size > MAX_ANSWER_BYTES:
                raise Unavailable(f"{url} answered garbage (more than {MAX_ANSWER_BYTES} bytes)")
        if response.length:
            raise Unavailable(f"{url} broke off its answer, {response.length} bytes are missing")
        return response.status, b"".join(received)
    except TimeoutError:
        raise Unavailable(f"{url} has not answered within {timeout_s:g} s") from None
    except (OSError, http.client.HTTPException) as error:
        if isinstance(error, Unavailable):
            raise
        if isinstance(error, http.client.HTTPException) and not isinstance(error, ConnectionError):
            raise Unavailable(f"{url} answered garbage ({type(error).__name__}: {str(error)[:80]})") from None
        raise Unavailable(f"{url}: {error.strerror or error or type(error).__name__}") from None
    finally:
        connection.close()
