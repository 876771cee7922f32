"""Names, limits and JSON shapes of the messages between the learner and the servers; needs the standard library only.

Requests and answers are frozen dataclasses: `to_json(message)` writes one, `parse(kind, body)` reads and checks one.
"""

import dataclasses
import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

HEALTH, GENERATE, WEIGHTS, SCORE = "/health", "/generate", "/weights", "/score"
TOKEN_VARIABLE = "SEA_JAX_BRIDGE_TOKEN"
INITIAL = "initial"  # the version of a policy server that was given no weights yet
POLICY, ORACLE = "policy", "oracle"  # kinds of servers
STARTING, READY, FAILED = "starting", "ready", "failed"  # states of servers

MAX_BODY_BYTES = 64 * 2**20
MAX_ROWS = 8192  # prompts or inputs of one request
MAX_SAMPLES = 1024
MAX_LENGTH = 2**20  # tokens of a sequence; the model's own limit is the engine's to tell
MAX_NEW_TOKENS = 2**25  # of all responses of one request together
MIN_TEMPERATURE, MAX_TEMPERATURE = 0.01, 2.0  # vLLM rounds up to the one and refuses what is above the other
MAX_ID = 2**31 - 1
MAX_SEED = 2**63 - 1

_VERSION = re.compile(r"[A-Za-z0-9_.:+-]{1,128}")
_FILE_OR_URL = re.compile(r"[\x21-\x7e]{1,4096}")


class ProtocolError(ValueError):
    """A message is not what it should be; the text names the field, what was found and what would do."""


@dataclass(frozen=True)
class GenerateRequest:
    """Asks for responses; POST /generate.

    Attributes:
      prompts: token ids of each prompt, without padding.
      num_samples: M, responses to each prompt.
      max_new_tokens: T, longest response.
      temperature: 0 takes the most probable token, and all M are the same; else MIN_TEMPERATURE to MAX_TEMPERATURE.
      top_k: keep the k most probable tokens; 0 keeps all.
      top_p: keep the fewest most probable tokens that reach this mass; 1 keeps all.
      seeds: one per prompt; decides its M responses whatever else the server is doing.
      eos_ids: tokens that end a response; they stay in it. No other token ends one.
    """

    prompts: list[list[int]]
    num_samples: int
    max_new_tokens: int
    temperature: float
    top_k: int
    top_p: float
    seeds: list[int]
    eos_ids: list[int]

    def __post_init__(self) -> None:
        _rows("prompts", self.prompts)
        _integer("num_samples", self.num_samples, 1, MAX_SAMPLES)
        _integer("max_new_tokens", self.max_new_tokens, 1, MAX_LENGTH)
        if type(self.temperature) is bool or self.temperature != 0:
            _number("temperature", self.temperature, MIN_TEMPERATURE, MAX_TEMPERATURE)
        _integer("top_k", self.top_k, 0, MAX_ID)
        _number("top_p", self.top_p, 0, 1)
        if self.top_p == 0:
            raise ProtocolError("top_p: expected a number above 0, found 0")
        _integers("seeds", self.seeds, 0, MAX_SEED)
        _integers("eos_ids", self.eos_ids, 0, MAX_ID)
        if len(self.seeds) != len(self.prompts):
            raise ProtocolError(f"seeds: expected one per prompt, {len(self.prompts)}, found {len(self.seeds)}")
        tokens = len(self.prompts) * self.num_samples * self.max_new_tokens
        if tokens > MAX_NEW_TOKENS:
            raise ProtocolError(
                f"prompts, num_samples, max_new_tokens: expected a product of at most {MAX_NEW_TOKENS}, found {tokens}"
            )


@dataclass(frozen=True)
class Response:
    """One response.

    Attributes:
      tokens: its ids, the end-of-sequence token included where one was written.
      logprobs: of each token at temperature 1, unrestricted.
    """

    tokens: list[int]
    logprobs: list[float]

    def __post_init__(self) -> None:
        _integers("tokens", self.tokens, 0, MAX_ID)
        _numbers("logprobs", self.logprobs)
        if not 0 < len(self.tokens) == len(self.logprobs):
            raise ProtocolError(
                f"tokens, logprobs: expected as many of both, one or more, found {len(self.tokens)} and "
                f"{len(self.logprobs)}"
            )


@dataclass(frozen=True)
class GenerateAnswer:
    """The responses.

    Attributes:
      version: of the weights that wrote every token of them.
      responses: M for each prompt.
    """

    version: str
    responses: list[list[Response]]

    def __post_init__(self) -> None:
        _version("version", self.version)
        for row in _list("responses", self.responses):
            for response in _list("responses", row):
                if not isinstance(response, Response):
                    raise ProtocolError(f"responses: expected Response, found {_found(response)}")

    def check(self, request: GenerateRequest) -> None:
        """Refuses an answer to another request.

        Args:
          request: what was asked for.

        Raises:
          ProtocolError: the number of prompts, of samples, a response's length or its end is not what was asked for.
        """
        if len(self.responses) != len(request.prompts):
            raise ProtocolError(
                f"responses: expected those to {len(request.prompts)} prompts, found {len(self.responses)}"
            )
        for row in self.responses:
            if len(row) != request.num_samples:
                raise ProtocolError(f"responses: expected {request.num_samples} to each prompt, found {len(row)}")
            for response in row:
                ended = response.tokens[-1] in request.eos_ids
                if len(response.tokens) > request.max_new_tokens or not (
                    ended or len(response.tokens) == request.max_new_tokens
                ):
                    raise ProtocolError(
                        f"tokens: expected {request.max_new_tokens}, or fewer and an end, found "
                        f"{len(response.tokens)} ending with {response.tokens[-1]}"
                    )


@dataclass(frozen=True)
class WeightsRequest:
    """Gives a policy server other weights; POST /weights.

    Attributes:
      version: what they are to be called.
      path: a safetensors file with Hugging Face names, on the server's host under /dev/shm or its --weights_dir ...
      url: ... or where the server can get one by HTTP.
      bearer: the token to get it with; only with url.
      base: the version that the file's tensors change; None: the file has all tensors.
    """

    version: str
    path: str | None = None
    url: str | None = None
    bearer: str | None = None
    base: str | None = None

    def __post_init__(self) -> None:
        _version("version", self.version)
        if (self.path is None) == (self.url is None):
            raise ProtocolError("path, url: expected one of them")
        if self.path is not None and not (_printable(self.path) and self.path.startswith("/")):
            raise ProtocolError(f"path: expected an absolute path without spaces, found {_found(self.path)}")
        if self.url is not None and not (_printable(self.url) and self.url.startswith(("http://", "https://"))):
            raise ProtocolError(f"url: expected one that begins with http:// or https://, found {_found(self.url)}")
        if self.bearer is not None and (self.url is None or not _printable(self.bearer)):
            raise ProtocolError("bearer: expected printable characters, together with url")
        if self.base is not None:
            _version("base", self.base)
        if self.version == INITIAL:
            raise ProtocolError(f"version: expected another name than {INITIAL!r}, which a fresh server's weights have")


@dataclass(frozen=True)
class WeightsAnswer:
    """The weights that are served from now on.

    Attributes:
      version: their name.
    """

    version: str

    def __post_init__(self) -> None:
        _version("version", self.version)


@dataclass(frozen=True)
class ScoreRequest:
    """Asks for scores; POST /score.

    Attributes:
      inputs: token ids of each conversation as the reward model wants it, without padding.
    """

    inputs: list[list[int]]

    def __post_init__(self) -> None:
        _rows("inputs", self.inputs)


@dataclass(frozen=True)
class ScoreAnswer:
    """The scores.

    Attributes:
      version: of the reward model's weights.
      scores: one per input, as the head gives it.
    """

    version: str
    scores: list[float]

    def __post_init__(self) -> None:
        _version("version", self.version)
        _numbers("scores", self.scores)

    def check(self, request: ScoreRequest) -> None:
        """Refuses an answer to another request.

        Args:
          request: what was asked for.

        Raises:
          ProtocolError: there is not one score per input.
        """
        if len(self.scores) != len(request.inputs):
            raise ProtocolError(f"scores: expected {len(request.inputs)}, found {len(self.scores)}")


@dataclass(frozen=True)
class Health:
    """How a server is; GET /health, with status code 200 when ready and 503 otherwise.

    Attributes:
      status: STARTING, READY or FAILED.
      kind: POLICY or ORACLE.
      model: the model's name.
      version: of the weights that are served.
      started: drawn anew whenever the engine starts; another one means that pushed weights are gone.
      error: why the server is not ready; None when it is.
    """

    status: str
    kind: str
    model: str
    version: str
    started: str
    error: str | None = None

    def __post_init__(self) -> None:
        for name, value, allowed in (
            ("status", self.status, (STARTING, READY, FAILED)),
            ("kind", self.kind, (POLICY, ORACLE)),
        ):
            if value not in allowed:
                raise ProtocolError(f"{name}: expected one of {', '.join(allowed)}, found {_found(value)}")
        for name in ("model", "started"):
            if not isinstance(getattr(self, name), str):
                raise ProtocolError(f"{name}: expected a string, found {_found(getattr(self, name))}")
        _version("version", self.version)


@dataclass(frozen=True)
class Failure:
    """What every answer with another status code than 200 says; /health excepted.

    Attributes:
      error: one sentence.
      version: of the weights that are served; None: nobody has shown a token, so it is not told.
    """

    error: str
    version: str | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.error, str):
            raise ProtocolError(f"error: expected a string, found {_found(self.error)}")


Message = TypeVar("Message")


def to_json(message: Any) -> bytes:
    """Writes a message.

    Args:
      message: one of this module's dataclasses.

    Returns:
      JSON; fields that are None are left out.
    """
    fields = {name: value for name, value in dataclasses.asdict(message).items() if value is not None}
    return json.dumps(fields, allow_nan=False, separators=(",", ":")).encode()


def parse(kind: type[Message], body: bytes) -> Message:
    """Reads a message.

    Args:
      kind: one of this module's dataclasses.
      body: JSON.

    Returns:
      The message; every field has the right type and lies within the limits.

    Raises:
      ProtocolError: it is not such a message.
    """
    try:
        fields = json.loads(body, parse_constant=_not_json)
    except (ValueError, RecursionError) as error:
        raise ProtocolError(f"expected JSON, found {_found(body[:40])} ({error})") from None
    if not isinstance(fields, dict):
        raise ProtocolError(f"expected a JSON object, found {_found(fields)}")
    if kind is GenerateAnswer:
        fields = {**fields, "responses": [_responses(row) for row in _list("responses", fields.get("responses"))]}
    return _build(kind, fields)


def _responses(row: object) -> list[Response]:
    """Reads the M responses to one prompt."""
    return [_build(Response, response) for response in _list("responses", row)]


def _build(kind: Callable[..., Message], fields: object) -> Message:
    """Makes a dataclass of a JSON object; its own checks run then."""
    known = {field.name: field for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    if not isinstance(fields, Mapping):
        raise ProtocolError(f"expected a JSON object, found {_found(fields)}")
    unknown = sorted(set(fields) - set(known))
    if unknown:
        raise ProtocolError(f"{unknown[0][:40]}: no such field; there are {', '.join(known)}")
    missing = [name for name, field in known.items() if field.default is dataclasses.MISSING and name not in fields]
    if missing:
        raise ProtocolError(f"{missing[0]}: the field is missing")
    return kind(**fields)


def _not_json(constant: str) -> object:
    """Refuses NaN and infinities, which Python reads and JSON does not have."""
    raise ValueError(f"{constant} is no JSON")


def _found(value: object) -> str:
    """Names a value in an error message, shortened."""
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


def _printable(value: object) -> bool:
    """Whether a value is a short string of visible ASCII characters."""
    return isinstance(value, str) and _FILE_OR_URL.fullmatch(value) is not None


def _version(name: str, value: object) -> None:
    """Refuses what cannot name weights."""
    if not (isinstance(value, str) and _VERSION.fullmatch(value)):
        raise ProtocolError(f"{name}: expected 1 to 128 letters, digits or any of _.:+-, found {_found(value)}")


def _list(name: str, value: object) -> list[Any]:
    """Refuses what is no list."""
    if not isinstance(value, list):
        raise ProtocolError(f"{name}: expected a list, found {_found(value)}")
    return value


def _integer(name: str, value: object, low: int, high: int) -> None:
    """Refuses what is no integer within the limits."""
    if type(value) is not int or not low <= value <= high:
        raise ProtocolError(f"{name}: expected an integer from {low} to {high}, found {_found(value)}")


def _integers(name: str, values: object, low: int, high: int) -> None:
    """Refuses what is no list of integers within the limits."""
    for value in _list(name, values):
        _integer(name, value, low, high)


def _number(name: str, value: object, low: float, high: float) -> None:
    """Refuses what is no finite number within the limits."""
    if type(value) not in (int, float) or not low <= value <= high:  # type: ignore[operator]
        raise ProtocolError(f"{name}: expected a number from {low} to {high}, found {_found(value)}")


def _numbers(name: str, values: object) -> None:
    """Refuses what is no list of finite numbers."""
    for value in _list(name, values):
        if type(value) not in (int, float) or not math.isfinite(value):
            raise ProtocolError(f"{name}: expected finite numbers, found {_found(value)}")


def _rows(name: str, rows: object) -> None:
    """Refuses what is no list of sequences of token ids."""
    if not 0 < len(_list(name, rows)) <= MAX_ROWS:
        raise ProtocolError(f"{name}: expected 1 to {MAX_ROWS} of them, found {len(rows)}")  # type: ignore[arg-type]
    for row in rows:  # type: ignore[attr-defined]
        if not 0 < len(_list(name, row)) <= MAX_LENGTH:
            raise ProtocolError(f"{name}: expected 1 to {MAX_LENGTH} ids in each, found {len(row)}")
        _integers(name, row, 0, MAX_ID)
