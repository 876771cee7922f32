"""The routes: what people see and say, and what the learner posts and takes."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar

import pydantic
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp

from label_page import prompt
from label_page.guard import SESSION_DAYS, Bearer, Guard, TooLong, csrf_token, digest, new_session, refused, too_long
from label_page.progress import Progress
from label_page.store import Ask, Refused, Store

PAGE = Path(__file__).parent / "page"
FILES = {
    "/": ("index.html", "text/html"),
    "/page.css": ("page.css", "text/css"),
    "/page.js": ("page.js", "text/javascript"),
}

Name = Annotated[str, pydantic.StringConstraints(strip_whitespace=True, min_length=1, max_length=64)]
Message = TypeVar("Message", bound=pydantic.BaseModel)


class Join(pydantic.BaseModel):
    """Somebody comes in by a link."""

    token: str = pydantic.Field(max_length=200)
    name: Name | None = None


class Answer(pydantic.BaseModel):
    """What a person says of a pair."""

    pair: int
    ticket: str = pydantic.Field(max_length=64)
    verdict: str = pydantic.Field(max_length=32)
    reason: str = pydantic.Field("", max_length=500)


class Asks(pydantic.BaseModel):
    """Pairs that the learner wants to have labelled."""

    asks: list[Ask]


class Names(pydantic.BaseModel):
    """Of asks."""

    names: list[str]


@dataclass(frozen=True)
class Page:
    """What the routes work with.

    Attributes:
      store: Store.
      bearer: who is the learner.
      names: of the people who may come in; empty: whoever has a link.
      invite: makes the links that are missing, and tells of them.
      guidelines: HTML, shown on top.
      budget: labels that the run pays for.
      progress: Progress.
      cookie: the name of the one that tells people apart.
      secure: the cookie is sent over TLS alone.
    """

    store: Store
    bearer: Bearer
    names: tuple[str, ...]
    invite: Callable[[], object]
    guidelines: str
    budget: int
    progress: Progress
    cookie: str
    secure: bool


def application(page: Page) -> ASGIApp:
    """Returns the whole application behind its guard."""
    routes = [Route(path, _file(*where)) for path, where in FILES.items()]
    for path, method, answer in (
        ("/join", "POST", _join),
        ("/state", "GET", _state),
        ("/answer", "POST", _answer),
        ("/undo", "POST", _undo),
        ("/learner/post", "POST", _post),
        ("/learner/take", "POST", _take),
        ("/learner/withdraw", "POST", _withdraw),
    ):
        routes.append(Route(path, _route(answer, page), methods=[method]))
    return Guard(Starlette(routes=routes), page.cookie)


Handler = Callable[[Page, Request], Awaitable[Response]]


def _route(answer: Handler, page: Page) -> Callable[[Request], Awaitable[Response]]:
    """A route whose refusals become a status and a sentence."""

    async def route(request: Request) -> Response:
        if request.url.path.startswith("/learner/") and not page.bearer.admits(request):
            return refused(401, "only the learner may ask this")
        try:
            return await answer(page, request)
        except TooLong as error:
            return too_long(error.most)
        except Refused as error:
            return refused(409, str(error))
        except pydantic.ValidationError as error:
            return refused(422, f"the message cannot be read: {error.errors(include_url=False)[0]['msg']}")

    return route


def _file(name: str, kind: str) -> Callable[[Request], Awaitable[Response]]:
    content = (PAGE / name).read_bytes()

    async def route(request: Request) -> Response:
        return Response(content, media_type=kind)

    return route


async def _read(request: Request, kind: type[Message]) -> Message:
    return kind.model_validate_json(await request.body())


# ------------------------------------------------------------------------------------------------------------------ People


async def _join(page: Page, request: Request) -> Response:
    """The link is used up; from now on the person is known by a cookie."""
    message = await _read(request, Join)
    invited = page.store.invited(message.token)
    if invited == "" and message.name is None:
        return refused(422, "say your name")
    session = new_session()
    person = page.store.join(message.token, message.name or "", digest(session))
    page.invite()
    answer = _shown(page, session, person)
    answer.set_cookie(
        page.cookie, session, max_age=SESSION_DAYS * 86400, httponly=True, samesite="strict", secure=page.secure
    )
    return answer


async def _state(page: Page, request: Request) -> Response:
    """What a person sees now."""
    session, person = _session(page, request)
    if person is None:
        return refused(401, "come in by a link: the run prints one")
    shown = request.query_params.get("shown", "")
    if shown.isdecimal() and page.store.is_needed(
        person, int(shown)
    ):  # who looks at it, or has gone home, keeps it no longer
        return JSONResponse(_about_run(page, session, person))
    return _shown(page, session, person)


async def _answer(page: Page, request: Request) -> Response:
    """A click: on disk when this answers."""
    session, person = _changes(page, request)
    if person is None:
        return refused(403, "the request does not come from the page, or its session is over: open the link again")
    message = await _read(request, Answer)
    try:
        foreseen = page.store.answer(person, message.pair, message.ticket, message.verdict, message.reason)
    except Refused as error:
        return _shown(page, session, person, status=409, error=str(error))
    return _shown(page, session, person, foreseen=foreseen)


async def _undo(page: Page, request: Request) -> Response:
    """The last click is taken back."""
    session, person = _changes(page, request)
    if person is None:
        return refused(403, "the request does not come from the page, or its session is over: open the link again")
    try:
        page.store.undo(person)
    except Refused as error:
        return _shown(page, session, person, status=409, error=str(error))
    return _shown(page, session, person)


def _session(page: Page, request: Request) -> tuple[str, str | None]:
    session = request.cookies.get(page.cookie, "")
    person = page.store.person(digest(session)) if session else None
    return session, person if not page.names or person in page.names else None


def _changes(page: Page, request: Request) -> tuple[str, str | None]:
    """Who wants to change something; nobody, if the request lacks what our page alone can know."""
    session, person = _session(page, request)
    token = request.headers.get("X-CSRF-Token", "")
    return session, person if token and token == csrf_token(session) else None


def _about_run(page: Page, session: str, person: str) -> dict[str, Any]:
    """What a person's page shows besides a pair."""
    return {
        "person": person,
        "csrf": csrf_token(session),
        "counts": page.store.counts(person),
        "budget": page.budget,
        "win_rate": page.progress.win_rate(),
        "verdicts": list(page.store.rules.labels()),
        "can_undo": page.store.can_undo(person),
        "guidelines": page.guidelines,
    }


def _shown(page: Page, session: str, person: str, *, status: int = 200, **more: Any) -> JSONResponse:
    """Everything that a person's page shows."""
    pair = page.store.next_pair(person)
    texts = pair and {
        "number": pair.number,
        "ticket": pair.ticket,
        "prompt": prompt.to_html(pair.prompt),
        "left": pair.left,
        "right": pair.right,
    }
    return JSONResponse(_about_run(page, session, person) | {"pair": texts} | more, status)


# ------------------------------------------------------------------------------------------------------------- The learner


async def _post(page: Page, request: Request) -> Response:
    message = await _read(request, Asks)
    page.store.post(message.asks)
    return JSONResponse({})


async def _take(page: Page, request: Request) -> Response:
    message = await _read(request, Names)
    taken = page.store.take(message.names)
    return JSONResponse({"taken": [vars(one) | {"verdicts": dict(one.verdicts)} for one in taken]})


async def _withdraw(page: Page, request: Request) -> Response:
    message = await _read(request, Names)
    page.store.withdraw(message.names)
    return JSONResponse({})
