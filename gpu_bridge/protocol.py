"""Names, limits and JSON shapes of the messages between the learner and the servers.

Messages are frozen dataclasses that are checked wherever one is made; `to_json` writes one, `parse` reads one.
"""

import dataclasses
import functools
import inspect
import reprlib
from typing import Annotated, Any, TypeVar, dataclass_transform

import pydantic.dataclasses
from pydantic import AfterValidator, ConfigDict, FailFast, GetCoreSchemaHandler, TypeAdapter, ValidationError
from pydantic_core import CoreSchema, core_schema

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

Message = TypeVar("Message")


class ProtocolError(ValueError):
    """A message is not what it should be; the text names the field, what was found and what would do."""


# ------------------------------------------------------------------------------------------------------ Types of the fields


class Expect:
    """Bounds a field's type, and says what would do whatever is wrong with a value."""

    def __init__(self, what: str, **limits: Any) -> None:
        self._what, self._limits = what, limits

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        limited: Any = {**handler(source), **self._limits}
        return core_schema.custom_error_schema(limited, "expected", custom_error_message=self._what)


def _integer(low: int, high: int) -> Expect:
    return Expect(f"an integer from {low} to {high}", ge=low, le=high)


def _one_of(*names: str) -> Expect:
    return Expect(f"one of {', '.join(names)}", pattern=f"^({'|'.join(names)})$")


def _sized(rows: list[list[int]]) -> list[list[int]]:
    if not 0 < len(rows) <= MAX_ROWS:
        raise ValueError(f"expected 1 to {MAX_ROWS} of them, found {len(rows)}")
    for row in rows:
        if not 0 < len(row) <= MAX_LENGTH:
            raise ValueError(f"expected 1 to {MAX_LENGTH} ids in each, found {len(row)}")
    return rows


Ids = Annotated[list[Annotated[int, _integer(0, MAX_ID)]], FailFast()]
Rows = Annotated[list[Ids], FailFast(), AfterValidator(_sized)]
Seeds = Annotated[list[Annotated[int, _integer(0, MAX_SEED)]], FailFast()]
Numbers = Annotated[list[Annotated[float, Expect("finite numbers", allow_inf_nan=False)]], FailFast()]
Text = Annotated[str, Expect("a string")]
Version = Annotated[str, Expect("1 to 128 letters, digits or any of _.:+-", pattern=r"^[A-Za-z0-9_.:+-]{1,128}$")]
Temperature = Annotated[
    Annotated[float, Expect("0", ge=0, le=0)]
    | Annotated[float, Expect("more", ge=MIN_TEMPERATURE, le=MAX_TEMPERATURE)],
    Expect(f"a number from {MIN_TEMPERATURE} to {MAX_TEMPERATURE}, or 0"),
]
File = Annotated[str, Expect("an absolute path without spaces", pattern=r"^/[\x21-\x7e]*$", max_length=4096)]
Url = Annotated[
    str, Expect("one that begins with http:// or https://", pattern=r"^https?://[\x21-\x7e]*$", max_length=4096)
]
Bearer = Annotated[str, Expect("printable characters, together with url", pattern=r"^[\x21-\x7e]+$", max_length=4096)]


@dataclass_transform(frozen_default=True)
def _message(fields: type[Message]) -> type[Message]:
    """Makes a frozen dataclass that raises ProtocolError where a field is not what it should be."""
    config = ConfigDict(strict=True, extra="forbid")
    kind: Any = pydantic.dataclasses.dataclass(frozen=True, config=config)(fields)
    unguarded, signature = kind.__init__, inspect.signature(kind)

    @functools.wraps(unguarded)
    def init(self: Any, *values: Any, **named: Any) -> None:
        try:
            unguarded(self, **signature.bind(*values, **named).arguments)  # a fault has a field's name then
        except ValidationError as error:
            raise _first_fault(kind, error) from None

    kind.__init__ = init
    return kind


def _first_fault(kind: Any, error: ValidationError) -> ProtocolError:
    """Says in one line what pydantic has found first."""
    fault = error.errors(include_url=False)[0]
    names = [part for part in fault["loc"] if isinstance(part, str)]
    field = f"{names[-1][:40]}: " if names else ""
    match fault["type"]:
        case "json_invalid":
            return ProtocolError(f"expected JSON, found {fault['input'][:40]!r} ({fault['ctx']['error']})")
        case "missing":
            return ProtocolError(f"{field}the field is missing")
        case "unexpected_keyword_argument":
            known = (one.name for one in dataclasses.fields(Response if len(names) > 1 else kind))
            return ProtocolError(f"{field}no such field; there are {', '.join(known)}")
        case "value_error":
            cause = fault["ctx"]["error"]
            return cause if isinstance(cause, ProtocolError) else ProtocolError(f"{field}{cause}")
    objects = {"list_type": "a list", "dataclass_type": "a JSON object", "dataclass_exact_type": "Response"}
    what = objects.get(fault["type"], fault["msg"])
    return ProtocolError(f"{field}expected {what}, found {reprlib.repr(fault['input'])}")


# ------------------------------------------------------------------------------------------------------------- The messages


@_message
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
      absent_ids: rows of the vocabulary that are no token and are never drawn; the log-probs count them all the same.
    """

    prompts: Rows
    num_samples: Annotated[int, _integer(1, MAX_SAMPLES)]
    max_new_tokens: Annotated[int, _integer(1, MAX_LENGTH)]
    temperature: Temperature
    top_k: Annotated[int, _integer(0, MAX_ID)]
    top_p: Annotated[float, Expect("a number from 0 to 1", ge=0, le=1)]
    seeds: Seeds
    eos_ids: Ids
    absent_ids: list[Annotated[int, _integer(0, MAX_ID)]] | None = None

    def __post_init__(self) -> None:
        if self.top_p == 0:
            raise ProtocolError("top_p: expected a number above 0, found 0")
        if len(self.seeds) != len(self.prompts):
            raise ProtocolError(f"seeds: expected one per prompt, {len(self.prompts)}, found {len(self.seeds)}")
        tokens = len(self.prompts) * self.num_samples * self.max_new_tokens
        if tokens > MAX_NEW_TOKENS:
            raise ProtocolError(
                f"prompts, num_samples, max_new_tokens: expected a product of at most {MAX_NEW_TOKENS}, found {tokens}"
            )


@_message
class Response:
    """One response.

    Attributes:
      tokens: its ids, the end-of-sequence token included where one was written.
      logprobs: of each token at temperature 1, unrestricted.
    """

    tokens: Ids
    logprobs: Numbers

    def __post_init__(self) -> None:
        if not 0 < len(self.tokens) == len(self.logprobs):
            raise ProtocolError(
                f"tokens, logprobs: expected as many of both, one or more, found {len(self.tokens)} and "
                f"{len(self.logprobs)}"
            )


@_message
class GenerateAnswer:
    """The responses.

    Attributes:
      version: of the weights that wrote every token of them.
      responses: M for each prompt.
    """

    version: Version
    responses: Annotated[list[Annotated[list[Response], FailFast()]], FailFast()]

    def check(self, request: GenerateRequest) -> None:
        """Raises ProtocolError if the number of prompts, of samples, a response's length or its end is not as asked for."""
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


@_message
class WeightsRequest:
    """Gives a policy server other weights; POST /weights.

    Attributes:
      version: what they are to be called.
      path: a safetensors file with Hugging Face names, on the server's host under /dev/shm or its --weights_dir ...
      url: ... or where the server can get one by HTTP.
      bearer: the token to get it with; only with url.
      base: the version that the file's tensors change; None: the file has all tensors.
    """

    version: Version
    path: File | None = None
    url: Url | None = None
    bearer: Bearer | None = None
    base: Version | None = None

    def __post_init__(self) -> None:
        if (self.path is None) == (self.url is None):
            raise ProtocolError("path, url: expected one of them")
        if self.bearer is not None and self.url is None:
            raise ProtocolError("bearer: expected printable characters, together with url")
        if self.version == INITIAL:
            raise ProtocolError(f"version: expected another name than {INITIAL!r}, which a fresh server's weights have")


@_message
class WeightsAnswer:
    """The version of the weights that are served from now on."""

    version: Version


@_message
class ScoreRequest:
    """Asks for scores; POST /score.

    Attributes:
      inputs: token ids of each conversation as the reward model wants it, without padding.
    """

    inputs: Rows


@_message
class ScoreAnswer:
    """The scores.

    Attributes:
      version: of the reward model's weights.
      scores: one per input, as the head gives it.
    """

    version: Version
    scores: Numbers

    def check(self, request: ScoreRequest) -> None:
        """Raises ProtocolError if there is not one score per input."""
        if len(self.scores) != len(request.inputs):
            raise ProtocolError(f"scores: expected {len(request.inputs)}, found {len(self.scores)}")


@_message
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

    status: Annotated[str, _one_of(STARTING, READY, FAILED)]
    kind: Annotated[str, _one_of(POLICY, ORACLE)]
    model: Text
    version: Version
    started: Text
    error: Text | None = None


@_message
class Failure:
    """What every answer with another status code than 200 says; /health excepted.

    Attributes:
      error: one sentence.
      version: of the weights that are served; None: nobody has shown a token, so it is not told.
    """

    error: Text
    version: Text | None = None


# ---------------------------------------------------------------------------------------------------------- As JSON and back


def to_json(message: Any) -> bytes:
    """Writes a message as JSON; fields that are None are left out."""
    return TypeAdapter(type(message)).dump_json(message, exclude_none=True)


def parse(kind: type[Message], body: bytes) -> Message:
    """Reads a message from JSON; raises ProtocolError if a field has another type or lies outside the limits."""
    try:
        return TypeAdapter(kind).validate_json(body)
    except ValidationError as error:
        raise _first_fault(kind, error) from None
