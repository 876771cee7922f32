"""A chat endpoint that speaks as OpenAI's does: one question, one answer, and what went wrong in words."""

import asyncio
import email.utils
import functools
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import httpx2
from pydantic import BaseModel, Field, ValidationError

MAX_ANSWER_BYTES = 2**24
LONGEST_TEXT = 300  # characters that are shown of what a server says
KEPT_ALIVE_S = 3.0  # an idle connection; servers close theirs after 5 s or more
PASSING = (408, 409, 425, 429)  # status codes besides 500 and more that another try may not meet again


class Alternative(BaseModel):
    """A token that could have stood at a position."""

    token: str
    logprob: float


class Position(BaseModel):
    """A token of an answer, with the most probable ones in its place."""

    top_logprobs: list[Alternative]


class LogProbs(BaseModel):
    """Of the tokens of an answer."""

    content: list[Position] | None = None


class Message(BaseModel):
    """What was answered."""

    content: str | None = None


class Choice(BaseModel):
    """One of the answers to a question."""

    message: Message
    logprobs: LogProbs | None = None


class Usage(BaseModel):
    """Tokens that are paid for."""

    prompt_tokens: int = Field(ge=0)
    completion_tokens: int = Field(ge=0)


class Completion(BaseModel):
    """What of a server's answer is read and kept."""

    choices: list[Choice] = Field(min_length=1)
    usage: Usage | None = None


class PassingError(Exception):
    """There is no answer that can be used, which another try may change.

    Attributes:
      retry_after_s: seconds for which the server asks not to be asked again.
      billed: the server may have written an answer, and want to be paid for it.
    """

    def __init__(self, text: str, *, billed: bool, retry_after_s: float = 0.0) -> None:
        super().__init__(text)
        self.billed, self.retry_after_s = billed, retry_after_s


class RefusedQuestionError(Exception):
    """The server does not take this question; it may take others."""


class RefusedError(Exception):
    """The server takes nothing as things are; the text says what to change."""


@dataclass(frozen=True)
class ChatClient:
    """Asks one endpoint.

    Attributes:
      url: with the version's path, without that of the chat.
      key: shown to the server; "": none. It stands in no text.
      timeout_s: seconds for everything from the first byte sent to the last that comes.
      concurrency: connections that are kept.
    """

    url: str
    key: str = field(repr=False)
    timeout_s: float
    concurrency: int

    async def complete(self, body: Mapping[str, Any]) -> Completion:
        """Asks once.

        Args:
          body: of the request.

        Raises:
          PassingError: another try may be answered.
          RefusedQuestionError: this question is not.
          RefusedError: no question is.
        """
        try:
            async with asyncio.timeout(self.timeout_s):
                status, headers, content = await self._exchange(body)
        except TimeoutError:
            raise PassingError(f"{self.url} has not answered within {self.timeout_s:g} s", billed=True) from None
        except (httpx2.ConnectError, httpx2.ProxyError) as error:
            raise PassingError(
                self._told(f"cannot be reached ({error or type(error).__name__})"), billed=False
            ) from None
        except (httpx2.HTTPError, httpx2.InvalidURL) as error:
            said = " ".join(str(error).split())[:LONGEST_TEXT]
            raise PassingError(self._told(f"broke off ({said or type(error).__name__})"), billed=True) from None
        if status != 200:
            raise self._failure(status, headers, content)
        try:
            return Completion.model_validate_json(content)
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False)[0]
            place = ".".join(map(str, first["loc"])) or "the whole"
            raise PassingError(self._told(f"answered garbage ({place}: {first['msg']})"), billed=True) from None

    async def _exchange(self, body: Mapping[str, Any]) -> tuple[int, httpx2.Headers, bytes]:
        """Status, headers and body of an answer."""
        async with self._connections.stream("POST", f"{self.url}/chat/completions", json=body) as answer:
            content = bytearray()
            async for piece in answer.aiter_bytes():
                content += piece
                if len(content) > MAX_ANSWER_BYTES:
                    raise httpx2.RemoteProtocolError(f"more than {MAX_ANSWER_BYTES} bytes")
            return answer.status_code, answer.headers, bytes(content)

    @functools.cached_property
    def _connections(self) -> httpx2.AsyncClient:
        limits = httpx2.Limits(max_keepalive_connections=self.concurrency, keepalive_expiry=KEPT_ALIVE_S)
        headers = {"Authorization": f"Bearer {self.key}"} if self.key else {}
        return httpx2.AsyncClient(headers=headers, timeout=None, limits=limits)

    def _failure(self, status: int, headers: Mapping[str, str], content: bytes) -> Exception:
        """What an answer with another status than 200 means."""
        said = self._told(f"answers {status} ({_message(content)})")
        if status in PASSING or status >= 500:
            return PassingError(said, billed=False, retry_after_s=retry_after_s(headers.get("retry-after", "")))
        if status in (400, 413, 422):
            return RefusedQuestionError(said)
        return RefusedError(said)

    def _told(self, what: str) -> str:
        """A text about the server, in which its key never stands."""
        told = f"{self.url} {what}"
        return told.replace(self.key, "[key]") if self.key else told


def _message(content: bytes) -> str:
    """What a server says of its failure."""
    text = content.decode(errors="replace")
    try:
        found = json.loads(text)
        error = found.get("error", found)
        said = error.get("message", text) if isinstance(error, dict) else error
    except (ValueError, AttributeError):
        said = text
    return " ".join(str(said).split())[:LONGEST_TEXT] or "and says nothing"


def retry_after_s(header: str) -> float:
    """Returns the seconds that a Retry-After header asks to wait, given as such or as a date; 0 where it cannot be read."""
    try:
        return max(float(header), 0.0) if header.strip().isdecimal() else _until(header)
    except (TypeError, ValueError):
        return 0.0


def _until(date: str) -> float:
    return max(email.utils.parsedate_to_datetime(date).timestamp() - time.time(), 0.0)
