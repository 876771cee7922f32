"""What stands before every request: how large and how many they may be, where they come from, and what a browser may do."""

import hashlib
import hmac
import secrets
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

PERSON_BYTES, LEARNER_BYTES = 2**14, 2**28  # longest requests
LEARNER_PATHS = "/learner/"
BURST, PER_SECOND = 60.0, 15.0  # requests of one person, or of one address that nobody is known by
JOIN_BURST, JOINS_PER_SECOND = 10.0, 0.2  # tries of one address to come in
KNOWN_VISITORS = 10_000  # of whom it is kept how many requests they have left
SESSION_DAYS = 30

HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), microphone=(), geolocation=()",
    "Cache-Control": "no-store",
}


class TooLong(Exception):
    """A request's body is longer than the bytes it may have."""

    def __init__(self, most: int) -> None:
        super().__init__(f"a request holds at most {most} bytes")
        self.most = most


class Allowance:
    """So many requests at once and so many a second of each visitor (a token bucket)."""

    def __init__(self, burst: float, per_second: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._burst, self._per_second, self._clock = burst, per_second, clock
        self._left: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def admits(self, visitor: str) -> bool:
        """Returns whether one more request of a visitor is within the allowance, and counts it if so."""
        now = self._clock()
        left, since = self._left.pop(visitor, (self._burst, now))
        left = min(self._burst, left + (now - since) * self._per_second)
        admitted = left >= 1
        self._left[visitor] = (left - admitted, now)
        if len(self._left) > KNOWN_VISITORS:
            self._left.popitem(last=False)
        return admitted


class Guard:
    """Around an application: refuses early what is too long or too often, and sets HEADERS on every answer."""

    def __init__(self, app: ASGIApp, cookie: str) -> None:
        """Makes a guard.

        Args:
          app: what is guarded.
          cookie: the name of the one that tells people apart.
        """
        self._app, self._cookie = app, cookie
        self._allowance = Allowance(BURST, PER_SECOND)
        self._joins = Allowance(JOIN_BURST, JOINS_PER_SECOND)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers a request."""
        if scope["type"] != "http":
            return

        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers[name] = value
            await send(message)

        request = Request(scope)
        refusal = self._refusal(request)
        if refusal is not None:
            await refusal(scope, receive, with_headers)
            return
        most = LEARNER_BYTES if _of_learner(request) else PERSON_BYTES
        read = 0

        async def bounded() -> Message:
            nonlocal read
            message = await receive()
            read += len(message.get("body", b""))
            if read > most:  # which said nothing of its length, or not the truth
                raise TooLong(most)
            return message

        await self._app(scope, bounded, with_headers)

    def _refusal(self, request: Request) -> JSONResponse | None:
        """What a request is refused with before anything of its body is read."""
        learner = _of_learner(request)
        most = LEARNER_BYTES if learner else PERSON_BYTES
        length = request.headers.get("Content-Length", "0")
        if not length.isdigit() or int(length) > most:
            return too_long(most)
        address = request.client.host if request.client else ""
        if not learner:
            visitor = request.cookies.get(self._cookie, "") or address
            if not self._allowance.admits(digest(visitor)):
                return refused(429, "too many requests: wait a moment", {"Retry-After": "1"})
            if request.url.path == "/join" and not self._joins.admits(address):
                return refused(429, "too many tries to come in: wait a minute", {"Retry-After": "60"})
            if request.method == "POST" and not _same_origin(request.headers):
                return refused(403, "the request comes from another page")
        if request.method == "POST" and request.headers.get("Content-Type", "").split(";")[0] != "application/json":
            return refused(415, "requests are JSON")
        return None


def refused(status: int, error: str, headers: dict[str, str] | None = None) -> JSONResponse:
    """Returns an answer that says in a sentence why there is no other."""
    return JSONResponse({"error": error}, status, headers)


def too_long(most: int) -> JSONResponse:
    """Returns a refusal behind which nothing more is read."""
    return refused(413, f"a request holds at most {most} bytes", {"Connection": "close"})


def digest(secret: str) -> str:
    """Returns by what a secret is recognised where it is not kept itself."""
    return hashlib.sha256(secret.encode()).hexdigest()


def csrf_token(session: str) -> str:
    """Returns what every change must carry besides the cookie; only our own page can read it."""
    return hmac.new(session.encode(), b"csrf", hashlib.sha256).hexdigest()


def new_session() -> str:
    """Returns the secret by which a person is known."""
    return secrets.token_urlsafe(32)


@dataclass(frozen=True)
class Bearer:
    """Who may use the learner's paths.

    Attributes:
      token: that only the learner has.
    """

    token: str

    def admits(self, request: Request) -> bool:
        """Returns whether a request carries the token."""
        return hmac.compare_digest(request.headers.get("Authorization", "").encode(), f"Bearer {self.token}".encode())


def _of_learner(request: Request) -> bool:
    return request.url.path.startswith(LEARNER_PATHS)


def _same_origin(headers: Headers) -> bool:
    """Whether a request was sent by our own page; a browser always says where a POST comes from."""
    origin, site = headers.get("Origin"), headers.get("Sec-Fetch-Site", "same-origin")
    return site == "same-origin" and (origin is None or origin.split("://")[-1] == headers.get("Host"))
