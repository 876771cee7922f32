"""Somebody who labels over HTTP as a browser would, and a page to do it on."""

import contextlib
import http.client
import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

Taste = Callable[[dict[str, Any]], str]  # a pair as it is shown -> what is said of it


def links(workdir: Path) -> dict[str, str]:
    """The links that a run's page has not given away yet, by whom they are for."""
    text = (workdir / "people" / "links.txt").read_text()
    return dict(re.findall(r"^(.+?): (http\S+)$", text, flags=re.MULTILINE))


class Person:
    """A browser with one cookie."""

    def __init__(self, link: str, name: str | None = None) -> None:
        """Comes in by a link, which is used up."""
        found = re.fullmatch(r"http://(.+):(\d+)/#(.+)", link)
        assert found is not None
        self.host, self.port, self.token = map(str, found.groups())
        self.cookie, self.csrf = "", ""
        self.shown: dict[str, Any] = {}
        status, _ = self.ask("POST", "/join", {"token": self.token} | ({"name": name} if name else {}))
        assert status == 200

    def ask(self, method: str, path: str, body: Any = None, **headers: str) -> tuple[int, Any]:
        """Status and JSON of one request; a header that is set to "" is not sent."""
        connection = http.client.HTTPConnection(self.host, int(self.port), timeout=20)
        sent = {
            "Content-Type": "application/json",
            "Cookie": self.cookie,
            "X-CSRF-Token": self.csrf,
            "Origin": f"http://{self.host}:{self.port}",
        } | {name.replace("_", "-"): value for name, value in headers.items()}
        try:
            connection.request(
                method, path, None if body is None else json.dumps(body), {k: v for k, v in sent.items() if v}
            )
            reply = connection.getresponse()
            answer = json.loads(reply.read())
        finally:
            connection.close()
        if cookie := reply.headers["Set-Cookie"]:
            assert "HttpOnly" in cookie
            assert "samesite=strict" in cookie.lower()
            self.cookie = cookie.split(";")[0]
        if "csrf" in answer:
            self.csrf, self.shown = answer["csrf"], self.shown | answer
        return reply.status, answer

    def look(self) -> dict[str, Any] | None:
        """The pair that is shown now."""
        status, answer = self.ask("GET", "/state")
        assert status == 200, answer
        return answer["pair"]

    def say(self, verdict: str, reason: str = "") -> tuple[int, Any]:
        """Answers the pair that was shown last."""
        pair = self.shown["pair"]
        body = {"pair": pair["number"], "ticket": pair["ticket"], "verdict": verdict, "reason": reason}
        return self.ask("POST", "/answer", body)

    def work(self, taste: Taste, over: threading.Event, said: list[tuple[int, str]]) -> None:
        """Answers whatever is shown, through every failure of the page, until it is over."""
        while not over.is_set():
            try:
                pair = self.look()
                if pair is None:
                    time.sleep(0.03)
                    continue
                verdict = taste(pair)
                status, _ = self.say(verdict)
                if status == 200:
                    said.append((pair["number"], verdict))
            except (OSError, http.client.HTTPException, AssertionError):
                time.sleep(0.05)


def prefers_many_es(pair: dict[str, Any]) -> str:
    """What the oracle of configs/tiny_random.py would click."""
    left, right = pair["left"].count("e"), pair["right"].count("e")
    return "left" if left > right else "right" if right > left else "tie"


@contextlib.contextmanager
def working(workdir: Path, taste: Taste, *names: str) -> Iterator[dict[str, list[tuple[int, str]]]]:
    """People who come in as soon as a run's page is open, and answer all that it shows: who -> pairs and what was said."""
    over = threading.Event()
    said: dict[str, list[tuple[int, str]]] = {name: [] for name in names}

    def come_in(name: str) -> None:
        while not over.is_set():
            try:
                person = Person(links(workdir)[name])
            except (OSError, KeyError, http.client.HTTPException, ValueError):
                time.sleep(0.05)
                continue
            person.work(taste, over, said[name])

    threads = [threading.Thread(target=come_in, args=(name,), daemon=True) for name in names]
    for thread in threads:
        thread.start()
    try:
        yield said
    finally:
        over.set()
        for thread in threads:
            thread.join()
