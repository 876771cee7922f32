"""The page over HTTP, as browsers and others who are up to no good use it."""

import contextlib
import http.client
import socket
import subprocess
import threading
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from label_page import guard
from sea_jax.oracles.people import People
from tests.support.people import Person, links

SCRIPT = "<script>alert(1)</script><img src=x onerror=alert(1)>"


def ask(oracle: People, *texts: tuple[str, str, str], swapped=None, foreseen=None) -> dict[str, float]:
    """Asks people and waits for what they say."""
    prompts, first, second = zip(*texts, strict=True)
    names = [f"run/{prompt}/{index}" for index, prompt in enumerate(prompts)]
    swapped = np.zeros(len(texts), bool) if swapped is None else np.array(swapped)
    keys = jax.random.split(jax.random.key(0), len(texts))
    found: dict[str, float] = {}
    for judgement in oracle(prompts, first, second, swapped, keys, names, foreseen=foreseen):
        found |= {names[row]: label for row, label in zip(judgement.rows, judgement.label, strict=True)}
    return found


@pytest.fixture
def asking(opened, over):
    """Starts a page and a question in the background; `answers` are there when the thread has ended."""
    answers: dict[str, float] = {}

    def start(*texts, foreseen=None, swapped=None, **settings) -> threading.Thread:
        oracle = opened(**settings)

        def wait() -> None:
            with contextlib.suppress(SystemExit):  # the test is over
                answers.update(ask(oracle, *texts, swapped=swapped, foreseen=foreseen))

        thread = threading.Thread(target=wait, daemon=True)
        thread.start()
        threads.append(thread)
        return thread

    threads: list[threading.Thread] = []
    start.answers = answers  # type: ignore[attr-defined]
    yield start
    over.set()
    for thread in threads:
        thread.join()


def shown(person: Person) -> dict:
    """The pair that a person is shown, once there is one."""
    while (pair := person.look()) is None:
        time.sleep(0.02)
    return pair


def come_in(tmp_path: Path, name: str = "anna", whose: str = "whoever labels") -> Person:
    return Person(links(tmp_path / "run")[whose], name)


def test_two_people_answer_and_the_labels_are_turned_back(asking, tmp_path):
    thread = asking(
        ("p", "one", "two"), ("q", "three", "four"), swapped=[False, True], foreseen=[0.9, 0.8], names=("anna", "ben")
    )
    anna, ben = (Person(links(tmp_path / "run")[name]) for name in ("anna", "ben"))
    assert (shown(anna)["left"], shown(ben)["left"]) == ("one", "four")
    assert "foreseen" not in anna.shown
    assert anna.say("left")[1]["foreseen"] == pytest.approx(0.9)
    assert ben.say("right")[1]["foreseen"] == pytest.approx(0.2)
    thread.join(20)
    assert asking.answers == {"run/p/0": 1.0, "run/q/1": 1.0}
    assert (anna.shown["counts"]["mine"], ben.shown["person"], anna.shown["budget"]) == (1, "ben", 24)


def test_texts_are_data(asking, tmp_path):
    named = "[x](javascript:alert(1)) ![i](http://elsewhere/i.png)"
    prompt = f"# Title\n\n{SCRIPT}\n\n{named}\n\n```\n  a < b\n```\n\n\u05e9\u05dc\u05d5\u05dd"
    asking((prompt, f"  two\n\n{SCRIPT}", "b"))
    pair = shown(come_in(tmp_path))
    assert pair["left"] == f"  two\n\n{SCRIPT}"  # the page shows it as text
    html = pair["prompt"]
    assert "<h1" in html
    assert "<code>  a &lt; b" in html
    assert "&lt;script&gt;alert(1)" in html
    assert 'dir="auto"' in html
    for never in ("<script", "<img", 'href="javascript', "onerror=alert(1)>"):
        assert never not in html.replace("onerror=alert(1)&gt;", "")


def test_every_answer_tells_the_browser_what_it_may_do(asking, tmp_path):
    asking(("p", "a", "b"))
    person = come_in(tmp_path)
    for path in ("/", "/page.js", "/page.css", "/state", "/nowhere"):
        connection = http.client.HTTPConnection(person.host, int(person.port))
        connection.request("GET", path)
        reply = connection.getresponse()
        policy = reply.headers["Content-Security-Policy"]
        assert "default-src 'none'; script-src 'self'; style-src 'self'" in policy
        assert "unsafe" not in policy
        assert reply.headers["X-Content-Type-Options"] == "nosniff"
        assert reply.headers["Referrer-Policy"] == "no-referrer"
        content = reply.read()
        assert b"http://" not in content
        assert b"https://" not in content  # everything comes from the process itself
        assert b"onclick" not in content
        assert b"style=" not in content


def test_a_stolen_link_a_replayed_click_and_a_request_from_elsewhere_are_refused(asking, tmp_path):
    asking(("p", "a", "b"), ("q", "a", "b"), ("r", "a", "b"), undo_s=60.0)
    link = links(tmp_path / "run")["whoever labels"]
    person = Person(link, "anna")
    with pytest.raises(AssertionError):
        Person(link, "mallory")  # it was used
    assert links(tmp_path / "run")["whoever labels"] != link  # and the next one stands there
    pair = shown(person)
    click = {"pair": pair["number"], "ticket": pair["ticket"], "verdict": "left"}
    assert person.ask("POST", "/answer", click, X_CSRF_Token="")[0] == 403
    assert person.ask("POST", "/answer", click, X_CSRF_Token="0" * 64)[0] == 403
    assert person.ask("POST", "/answer", click, Cookie="")[0] == 403
    assert person.ask("POST", "/answer", click, Origin="http://elsewhere")[0] == 403
    assert person.ask("POST", "/answer", click, Sec_Fetch_Site="cross-site")[0] == 403
    assert person.ask("POST", "/answer", click, Content_Type="text/plain")[0] == 415
    assert person.ask("POST", "/answer", click | {"pair": "no"})[0] == 422
    assert person.ask("GET", "/state", Cookie="")[0] == 401
    assert person.look() == pair  # nothing has changed
    assert person.ask("POST", "/answer", click)[0] == 200
    assert person.ask("POST", "/answer", click)[0] == 200  # the same once more
    assert person.shown["counts"]["mine"] == 1
    assert person.ask("POST", "/undo", {})[0] == 200
    assert person.ask("POST", "/answer", click)[0] == 409
    assert person.shown["counts"]["mine"] == 0
    for path in ("post", "take", "withdraw"):
        assert person.ask("POST", f"/learner/{path}", {"names": []})[0] == 401
        assert person.ask("POST", f"/learner/{path}", {"names": []}, Authorization="Bearer x")[0] == 401


def test_requests_that_are_too_many_or_too_long_are_refused_early(asking, tmp_path):
    asking(("p", "a", "b"))
    person = come_in(tmp_path)
    for path, most in (("/answer", guard.PERSON_BYTES), ("/learner/post", guard.LEARNER_BYTES)):
        with socket.create_connection((person.host, int(person.port)), timeout=10) as connection:
            head = f"POST {path} HTTP/1.1\r\nHost: {person.host}:{person.port}\r\nContent-Type: application/json\r\n"
            connection.sendall(f"{head}Content-Length: {2**30}\r\n\r\n".encode())  # none of which is ever sent
            assert b"413" in connection.recv(100)
        assert most < 2**30
    with socket.create_connection((person.host, int(person.port)), timeout=10) as connection:
        headers = f"X-CSRF-Token: {person.csrf}\r\nCookie: {person.cookie}\r\nTransfer-Encoding: chunked\r\n\r\n"
        connection.sendall(f"{head.replace('/learner/post', '/answer')}{headers}".encode())
        connection.sendall((b"1000\r\n" + b"x" * 4096 + b"\r\n") * 5)  # it says nothing of its length and has no end
        connection.settimeout(5)
        reply = b""
        while data := connection.recv(4096):
            reply += data
        assert b"413" in reply.split(b"\r\n")[0], reply
    statuses = [person.ask("GET", "/state")[0] for _ in range(100)]
    assert statuses.count(429) > 20
    assert statuses[0] == 200
    time.sleep(1.1)
    assert person.ask("GET", "/state")[0] == 200


def test_an_allowance_refills_and_is_each_visitors_own():
    now = [0.0]
    allowance = guard.Allowance(3, 2, clock=lambda: now[0])
    assert [allowance.admits("a") for _ in range(4)] == [True, True, True, False]
    assert allowance.admits("b")
    now[0] = 0.5
    assert [allowance.admits("a") for _ in range(2)] == [True, False]
    now[0] = 100
    assert [allowance.admits("a") for _ in range(4)] == [True, True, True, False]


def test_over_tls_the_cookie_is_kept_to_it(opened, tmp_path):
    certificate, key = tmp_path / "certificate.pem", tmp_path / "key.pem"
    made = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    try:
        subprocess.run(
            [*made, "-keyout", str(key), "-out", str(certificate), "-days", "2", "-subj", "/CN=label.example"],
            check=True,
            capture_output=True,
        )
    except FileNotFoundError:
        pytest.skip("no openssl to make a certificate with")
    oracle = opened(tls_certificate=str(certificate), tls_key=str(key))
    assert links(tmp_path / "run")["whoever labels"].startswith("https://127.0.0.1:")
    assert len(oracle.collect(["never posted"]).rows) == 1  # the learner speaks TLS, too


def test_what_keeps_a_page_from_opening_is_one_line(opened, tmp_path, capfd):
    bad = tmp_path / "checks.jsonl"
    bad.write_text('{"prompt": "p", "chosen": "c"}\n')
    with pytest.raises(
        ValueError, match=r"the page could not be opened: .*checks.jsonl, line 1: KeyError: 'rejected'; a check is"
    ):
        opened(checks=str(bad))
    assert "Traceback" not in capfd.readouterr().out
