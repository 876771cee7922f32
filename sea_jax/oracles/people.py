"""People label: pairs go to a page that they have open in a browser, and come back as they are answered."""

import contextlib
import http.client
import importlib.util
import ipaddress
import json
import math
import os
import secrets
import ssl
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import logging
from jaxtyping import Bool

from sea_jax.oracles.preferences import Keys
from sea_jax.settings import AT_LEAST_1, FRACTION, NOT_NEGATIVE, POSITIVE, Check, setting
from sea_jax.types import Judgement

KIND = "people"  # oracle.kind
DIRECTORY = (
    "people"  # in the work directory: what people were asked and said, the links, what the page complained about
)
NAMES: Check = (
    lambda v: all(name and name == name.strip() and len(name) <= 64 for name in v) and len(set(v)) == len(v),
    "different names of 1 to 64 characters",
)
SLIGHTLY: Check = (lambda v: v == 0 or 0.5 < v < 1, "0, or a number between 0.5 and 1")
PORT: Check = (lambda v: 0 <= v < 2**16, "a port, or 0: any that is free")
POLL_S = 0.2
ANSWER_S = 30.0  # what the page may take for an answer, and to come up
FILES = ("guidelines", "checks", "tls_certificate", "tls_key")  # settings that name one
SKIP = "skip"  # as the page calls it
RESTARTS = 10  # of a page that ended, in a row


@dataclass(frozen=True)
class PeopleSettings:
    """People who label, with oracle.kind=people: docs/people.md."""

    names: tuple[str, ...] = setting(
        (), "who may label, with a link each; (): whoever has the link, and says a name", NAMES
    )
    redundancy: int = setting(1, "people who label each pair; the label is the mean of theirs", AT_LEAST_1)
    enough: float = setting(
        1.0,
        "share of a step's pairs that is waited for; what is said of the others later is learnt from then",
        FRACTION,
    )
    max_staleness: int = setting(
        4, "after which nobody is asked about a pair any more", NOT_NEGATIVE, unit="policy steps"
    )
    slightly: float = setting(
        0.0, "label of a response that is slightly better; 0: people only say which one is better", SLIGHTLY
    )
    lease_s: float = setting(600.0, "after which a pair goes to somebody else, too", POSITIVE, unit="seconds")
    undo_s: float = setting(
        8.0, "for which an answer can be taken back; the run learns from it after that", NOT_NEGATIVE, unit="seconds"
    )
    guidelines: str = setting("", "Markdown file with what people are to look at")
    checks: str = setting(
        "",
        'JSON Lines file of pairs with a known answer ("prompt", "chosen", "rejected"), mixed in and not learnt from',
    )
    check_every: int = setting(10, "one of so many pairs is a check, while there are some", AT_LEAST_1)
    host: str = setting("127.0.0.1", "where the page listens; 0.0.0.0: on every network of this machine")
    port: int = setting(8600, "likewise", PORT)
    tls_certificate: str = setting("", "PEM file with the certificate and those that vouch for it; with tls_key: https")
    tls_key: str = setting("", "PEM file with its key")

    def faults(self) -> Iterator[str]:
        """Yields a line for everything that does not go together."""
        if self.names and self.redundancy > len(self.names):
            yield (
                f"config.people.redundancy={self.redundancy}: config.people.names has {len(self.names)}, and nobody is asked "
                "about a pair twice; name more, or lower it"
            )
        if bool(self.tls_certificate) != bool(self.tls_key):
            missing = "tls_key" if self.tls_certificate else "tls_certificate"
            yield f"config.people.{missing}='': https needs both people.tls_certificate and people.tls_key"
        for field in FILES:
            path = getattr(self, field)
            if path and not Path(path).expanduser().is_file():
                yield f"config.people.{field}={path}: there is no such file"


class People:
    """Who labels, behind their page; `open` starts it.

    An answer is on the page's disk before the page confirms it, and given again if this process is killed before it has
    written it down.
    """

    def __init__(self, settings: PeopleSettings) -> None:
        """Makes an oracle that nobody answers yet.

        Raises:
          ValueError: this run has several processes.
        """
        if jax.process_count() > 1:
            raise ValueError(
                "config.oracle.kind=people: the run has several processes; people can be asked by one alone"
            )
        self._settings = settings
        self._page: _Page | None = None
        self._stopping: Callable[[], bool] = lambda: False
        self._in_vain: dict[str, int] = {}  # what was last collected, if there was nothing

    @contextlib.contextmanager
    def open(self, workdir: Path, budget: int, stopping: Callable[[], bool]) -> Iterator[None]:
        """Has the page open inside.

        Args:
          workdir: of the run.
          budget: labels that the run pays for.
          stopping: whether the run was told to stop; who waits for an answer stops at once then.

        Raises:
          OSError: the page ended at once.
          ValueError: it cannot use a file, listen or write.
        """
        self._stopping = stopping
        with _Page(self._settings, workdir, budget) as self._page:
            yield

    def __call__(
        self,
        prompts: Sequence[str],
        first: Sequence[str],
        second: Sequence[str],
        swapped: Bool[np.ndarray, " N"],
        keys: Keys,
        asks: Sequence[str],
        foreseen: Sequence[float] | None = None,
    ) -> Iterator[Judgement]:
        """Asks people about N pairs and yields what they say, until there is enough of it; NaN: nobody will answer."""
        assert self._page is not None
        told: Sequence[float | None] = [None] * len(asks) if foreseen is None else foreseen
        columns = zip(prompts, first, second, swapped.tolist(), asks, told, strict=True)
        self._page.request("post", asks=[_shown(*columns_of_one) for columns_of_one in columns])
        rows = {name: row for row, name in enumerate(asks)}
        may_stay = len(asks) - math.ceil(self._settings.enough * len(asks))
        while len(rows) > may_stay:
            taken = self._page.request("take", names=list(rows))["taken"]
            if taken:
                yield _judgement(taken, rows)
                for one in taken:
                    del rows[one["name"]]
            else:
                self._pause(len(rows))

    def _pause(self, waiting: int) -> None:
        """Waits a little for people, or ends the run that was told to stop: what is open stays so."""
        if self._stopping():
            logging.warning(
                "stopped while people had %d pairs before them: these stay open, and the same command goes on", waiting
            )
            sys.exit(130)
        time.sleep(POLL_S)

    @property
    def max_staleness(self) -> int:
        """Policy steps after which nobody is to be asked about an open pair any more."""
        return self._settings.max_staleness

    def collect(self, asks: Sequence[str]) -> Judgement:
        """Returns, without waiting, what has become of N pairs that were asked about; NaN: nobody will answer."""
        assert self._page is not None
        rows = {name: row for row, name in enumerate(asks)}
        taken = self._page.request("take", names=list(asks))["taken"] if rows else []
        if self._in_vain == rows and rows and not taken:  # somebody waits for these
            self._pause(len(rows))
        self._in_vain = {} if taken else rows
        return _judgement(taken, rows)

    def withdraw(self, asks: Sequence[str]) -> None:
        """Has nobody asked about these any more; `collect` says NaN of each, unless somebody was faster."""
        assert self._page is not None
        self._page.request("withdraw", names=list(asks))


def _shown(prompt: str, first: str, second: str, swapped: bool, name: str, foreseen: float | None) -> dict[str, Any]:
    """A pair as the page shows it."""
    left, right = (second, first) if swapped else (first, second)
    if foreseen is not None and swapped:
        foreseen = 1 - foreseen
    return {"name": name, "prompt": prompt, "left": left, "right": right, "swapped": swapped, "foreseen": foreseen}


def _judgement(taken: Sequence[Mapping[str, Any]], rows: Mapping[str, int]) -> Judgement:
    """What people said, turned back."""

    def first_wins(one: Mapping[str, Any]) -> float:
        if one["label"] is None:
            return math.nan
        return 1 - one["label"] if one["swapped"] else one["label"]

    labels = np.array([first_wins(one) for one in taken], np.float64)
    answered = np.array([rows[one["name"]] for one in taken], np.int64)
    return Judgement(answered, labels, labels, people=[_labellers(one["verdicts"]) for one in taken])


def _labellers(verdicts: Mapping[str, str]) -> list[str]:
    """Who gave a label; a skip gives none."""
    return sorted(person for person, verdict in verdicts.items() if verdict != SKIP)


class _Page:
    """The page's process, which ends with this one however that ends, and the way to it."""

    def __init__(self, settings: PeopleSettings, workdir: Path, budget: int) -> None:
        self._settings, self._workdir, self._budget = settings, workdir.absolute(), budget
        self._token = secrets.token_urlsafe(32)
        self._process: subprocess.Popen[bytes] | None = None
        self._address, self._port = settings.host, settings.port
        self._told_links: list[str] = []

    def __enter__(self) -> "_Page":
        self._start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()

    def _start(self) -> None:
        """Starts the process and waits until it listens."""
        directory = self._workdir / DIRECTORY
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        told = asdict(self._settings) | {
            "directory": str(directory),
            "run": str(self._workdir),
            "token": self._token,
            "budget": self._budget,
            "port": self._port,
        }
        found = importlib.util.find_spec("label_page")
        if found is None or found.origin is None:
            raise ValueError("config.oracle.kind=people: the package label_page is not installed beside sea_jax")
        paths = os.pathsep.join([str(Path(found.origin).parents[1]), os.environ.get("PYTHONPATH", "")])
        with (directory / "page.log").open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "label_page.serve"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env=os.environ | {"PYTHONPATH": paths},
                start_new_session=True,  # Ctrl-C is this process's to handle
            )
        assert process.stdin is not None
        assert process.stdout is not None
        self._process = process
        with contextlib.suppress(BrokenPipeError):  # its end is told below
            process.stdin.write(json.dumps(told).encode() + b"\n")
            process.stdin.flush()
        line = process.stdout.readline()
        if not line:
            self._stop()
            raise OSError(f"the page where people label ended at once; {directory / 'page.log'} says why")
        answer = json.loads(line)
        if "error" in answer:
            self._stop()
            raise ValueError(f"config.oracle.kind=people: the page could not be opened: {answer['error']}")
        self._address, self._port = answer["host"], answer["port"]
        if answer["links"] != self._told_links:
            self._told_links = answer["links"]
            print(
                "\nPeople label here. Each link lets one browser in, once; the next ones stand in "
                f"{answer['file']}\n" + "".join(f"  {link}\n" for link in answer["links"]),
                flush=True,
            )
        if not self._settings.tls_certificate and not ipaddress.ip_address(self._address).is_loopback:
            logging.warning(
                "config.people.host=%s: the page can be reached from other machines, and what it shows is not encrypted; set "
                "people.tls_certificate and people.tls_key",
                self._settings.host,
            )

    def _stop(self) -> None:
        if self._process is not None:
            assert self._process.stdin is not None
            with contextlib.suppress(BrokenPipeError):
                self._process.stdin.close()
            self._process.wait()
            if self._process.stdout is not None:
                self._process.stdout.close()
            self._process = None

    def request(self, path: str, **message: Any) -> Any:
        """Returns what the page answers to the learner; one that has ended is started again, and has everything still.

        Raises:
          OSError: it does not come up again.
          ValueError: it refuses the message.
        """
        body = json.dumps(message).encode()
        for attempt in range(RESTARTS + 1):
            try:
                if self._process is None:
                    self._start()
                status, answer = self._sent(f"/learner/{path}", body)
                break
            except (OSError, http.client.HTTPException) as error:
                if attempt == RESTARTS:
                    raise OSError(f"the page where people label does not answer: {error}") from error
                logging.warning("the page where people label does not answer (%s); it is started again", error)
                self._kill()
        if status != 200:
            raise ValueError(f"the page where people label refused what it was told: {answer.get('error', status)}")
        return answer

    def _kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._stop()

    def _sent(self, path: str, body: bytes) -> tuple[int, Any]:
        connection = self._connection()
        try:
            headers = {"Authorization": f"Bearer {self._token}", "Content-Type": "application/json"}
            connection.request("POST", path, body, headers)
            reply = connection.getresponse()
            return reply.status, json.loads(reply.read())
        finally:
            connection.close()

    def _connection(self) -> http.client.HTTPConnection:
        """A connection to the page; over TLS to whoever has the certificate that is set, and nobody else."""
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self._address, self._address)
        if not self._settings.tls_certificate:
            return http.client.HTTPConnection(host, self._port, timeout=ANSWER_S)
        context = ssl.create_default_context(cafile=self._settings.tls_certificate)
        context.check_hostname = False
        context.verify_flags |= (
            ssl.VERIFY_X509_PARTIAL_CHAIN
        )  # the certificate itself is trusted, whoever vouches for it
        return http.client.HTTPSConnection(host, self._port, timeout=ANSWER_S, context=context)
