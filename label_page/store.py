"""What people are asked and what they say, in one SQLite file with one writer: a click is on disk before it is confirmed."""

import contextlib
import fcntl
import os
import secrets
import sqlite3
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FILE = "answers.sqlite"
LOCK_WAIT_S = 20.0  # for a page whose run was killed to end
UNDO_LAST = 5  # answers of a person, the newest first, that can be taken back

SCHEMA = """
CREATE TABLE IF NOT EXISTS people (name TEXT PRIMARY KEY, joined REAL NOT NULL) STRICT;
CREATE TABLE IF NOT EXISTS invitations (token TEXT PRIMARY KEY, name TEXT NOT NULL) STRICT;
CREATE TABLE IF NOT EXISTS sessions (digest TEXT PRIMARY KEY, person TEXT NOT NULL) STRICT;
CREATE TABLE IF NOT EXISTS asks (
    number INTEGER PRIMARY KEY,
    name TEXT NOT NULL UNIQUE,
    prompt TEXT NOT NULL,
    left TEXT NOT NULL,
    right TEXT NOT NULL,
    swapped INTEGER NOT NULL,
    foreseen REAL,          -- what the ensemble thinks that left wins with
    known REAL,             -- of a check, the label that it should get
    posted REAL NOT NULL,
    state TEXT NOT NULL CHECK (state IN ('open', 'withdrawn', 'taken')),
    label REAL              -- as the learner has taken it; NULL: nobody answered
) STRICT;
CREATE INDEX IF NOT EXISTS asks_by_state ON asks (state, number);
CREATE TABLE IF NOT EXISTS leases (
    ask INTEGER NOT NULL,
    person TEXT NOT NULL,
    ticket TEXT NOT NULL,
    begun REAL NOT NULL,
    until REAL NOT NULL,
    PRIMARY KEY (ask, person)
) STRICT;
CREATE TABLE IF NOT EXISTS answers (
    number INTEGER PRIMARY KEY AUTOINCREMENT,
    ask INTEGER NOT NULL,
    person TEXT NOT NULL,
    ticket TEXT NOT NULL,
    verdict TEXT NOT NULL,
    label REAL,             -- that left wins; NULL: skipped
    reason TEXT NOT NULL,
    given REAL NOT NULL,
    seconds REAL NOT NULL,  -- from the first sight of the pair
    UNIQUE (ask, person)
) STRICT;
CREATE INDEX IF NOT EXISTS answers_by_person ON answers (person, number);
"""

LEFT, RIGHT, TIE, BOTH_BAD, SKIP = "left", "right", "tie", "both_bad", "skip"
SLIGHTLY_LEFT, SLIGHTLY_RIGHT = "slightly_left", "slightly_right"


class Refused(Exception):
    """What a person or the learner wants cannot be done; the text says why."""


@dataclass(frozen=True)
class Rules:
    """How pairs go to people.

    Attributes:
      redundancy: people who answer each pair.
      lease_s: seconds for which a pair is kept for whoever was shown it.
      undo_s: seconds for which an answer can be taken back, and is not given to the learner.
      slightly: label of a left response that is slightly better; 0: nobody can say so.
      check_every: of a person's pairs, every so many is a check, as long as there are some.
    """

    redundancy: int
    lease_s: float
    undo_s: float
    slightly: float
    check_every: int

    def labels(self) -> dict[str, float | None]:
        """Returns what can be said of a pair -> the label that left wins; None: there is none."""
        labels: dict[str, float | None] = {LEFT: 1.0, RIGHT: 0.0, TIE: 0.5, BOTH_BAD: 0.5, SKIP: None}
        if self.slightly:
            labels |= {SLIGHTLY_LEFT: self.slightly, SLIGHTLY_RIGHT: 1 - self.slightly}
        return labels


@dataclass(frozen=True)
class Pair:
    """What a person is shown.

    Attributes:
      number: of the ask.
      ticket: comes back with the answer, which is taken once.
      prompt, left, right: texts.
    """

    number: int
    ticket: str
    prompt: str
    left: str
    right: str


@dataclass(frozen=True)
class Ask:
    """A pair that the learner wants to have labelled.

    Attributes:
      name: of the ask, unique over all runs.
      prompt, left, right: texts.
      swapped: left is the second response.
      foreseen: what the ensemble thinks that left wins with; None: nobody knows.
    """

    name: str
    prompt: str
    left: str
    right: str
    swapped: bool
    foreseen: float | None = None


@dataclass(frozen=True)
class Taken:
    """An ask that is done with.

    Attributes:
      name: of the ask.
      label: that left wins, the mean over people; None: nobody will answer it.
      swapped: left is the second response.
      verdicts: who said what, skips included.
    """

    name: str
    label: float | None
    swapped: bool
    verdicts: Mapping[str, str]


class Store:
    """The file and its one writer.

    Attributes:
      rules: Rules.
    """

    def __init__(self, directory: Path, rules: Rules) -> None:
        """Opens the store of a run, or makes it; readable for nobody else.

        Raises:
          OSError: another page has it, or the disk is full or gone.
        """
        self.rules = rules
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._lock = _locked(directory / "lock")
        os.close(os.open(directory / FILE, os.O_CREAT | os.O_RDWR, 0o600))
        self._db = connected(directory / FILE)
        self._db.execute("PRAGMA journal_mode=WAL")
        self._db.execute("PRAGMA synchronous=FULL")
        self._db.executescript(SCHEMA)

    def close(self) -> None:
        """Lets another process have it."""
        self._db.close()
        os.close(self._lock)

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """Everything inside is on disk (fsync) behind it, or nothing."""
        self._db.execute("BEGIN IMMEDIATE")
        try:
            yield
        except BaseException:
            self._db.execute("ROLLBACK")
            raise
        self._db.execute("COMMIT")

    def _one(self, query: str, *values: Any) -> sqlite3.Row | None:
        row: sqlite3.Row | None = self._db.execute(query, values).fetchone()
        return row

    # ------------------------------------------------------------------------------------------------------------- Who

    def invitations(self, names: Sequence[str]) -> dict[str, str]:
        """Returns an invitation for each name that nobody has used yet, making those that are missing; others are void.

        Args:
          names: of people; "": of whoever.

        Returns:
          name -> secret.
        """
        with self._writing():
            there = {row["name"]: row["token"] for row in self._db.execute("SELECT name, token FROM invitations")}
            for name in there.keys() - set(names):
                self._db.execute("DELETE FROM invitations WHERE name = ?", (name,))
            for name in names:
                if name not in there:
                    there[name] = secrets.token_urlsafe(24)
                    self._db.execute("INSERT INTO invitations VALUES (?, ?)", (there[name], name))
        return {name: there[name] for name in names}

    def invited(self, token: str) -> str | None:
        """Returns whom an invitation is for, "" for whoever; None: it is none, or was used."""
        row = self._one("SELECT name FROM invitations WHERE token = ?", token)
        return None if row is None else row["name"]

    def join(self, token: str, name: str, session_digest: str) -> str:
        """Uses up an invitation.

        Args:
          token: of the invitation.
          name: that is said, where the invitation is for whoever.
          session_digest: of the secret by which the person is known from now on.

        Returns:
          The person's name.

        Raises:
          Refused: there is no such invitation any more.
        """
        with self._writing():
            invited = self.invited(token)
            if invited is None:
                raise Refused("this link was used already, or is not of this run: ask for a new one")
            person = invited or name
            self._db.execute("DELETE FROM invitations WHERE token = ?", (token,))
            self._db.execute("INSERT OR IGNORE INTO people VALUES (?, ?)", (person, time.time()))
            self._db.execute("INSERT INTO sessions VALUES (?, ?)", (session_digest, person))
        return person

    def person(self, session_digest: str) -> str | None:
        """Returns whose session it is; None: there is none."""
        row = self._one("SELECT person FROM sessions WHERE digest = ?", session_digest)
        return None if row is None else row["person"]

    # ----------------------------------------------------------------------------------------------------- The learner

    def post(self, asks: Iterable[Ask]) -> None:
        """Takes in pairs to be labelled; one that is here already is left as it is.

        Raises:
          Refused: another pair is here under the same name.
        """
        with self._writing():
            for ask in asks:
                self._post(ask, None)

    def post_checks(self, asks: Iterable[tuple[Ask, float]]) -> None:
        """Takes in pairs whose label is known, and goes on without those that it had and that are not among them."""
        with self._writing():
            self._db.execute("UPDATE asks SET state = 'withdrawn' WHERE known IS NOT NULL")
            for ask, known in asks:
                self._post(ask, known)
                self._db.execute("UPDATE asks SET state = 'open' WHERE name = ?", (ask.name,))

    def _post(self, ask: Ask, known: float | None) -> None:
        texts = (ask.prompt, ask.left, ask.right)
        row = self._one("SELECT prompt, left, right FROM asks WHERE name = ?", ask.name)
        if row is None:
            self._db.execute(
                "INSERT INTO asks (name, prompt, left, right, swapped, foreseen, known, posted, state) "
                "VALUES (?, ?, ?, ?, ?, ?, ?, ?, 'open')",
                (ask.name, *texts, int(ask.swapped), ask.foreseen, known, time.time()),
            )
        elif tuple(row) != texts:
            raise Refused(f"another pair was asked under the name {ask.name}")

    def take(self, names: Sequence[str]) -> list[Taken]:
        """Gives those of some asks to the learner that are answered or that nobody will answer; again, if it asks again.

        An answer that can still be taken back is not among them. One of which nothing is known will not be answered.
        """
        taken, now = [], time.time()
        with self._writing():
            people = self._db.execute("SELECT COUNT(*) FROM people").fetchone()[0]
            for name in names:
                ask = self._one("SELECT number, state, swapped, label FROM asks WHERE name = ?", name)
                if ask is None:
                    taken.append(Taken(name, None, False, {}))
                    continue
                answers = self._db.execute(
                    "SELECT person, verdict, label, given FROM answers WHERE ask = ? ORDER BY number", (ask["number"],)
                ).fetchall()
                label = ask["label"]
                if ask["state"] != "taken":
                    labels = [row["label"] for row in answers if row["label"] is not None]
                    done = len(labels) >= self.rules.redundancy or (answers and len(answers) >= people)
                    settled = all(row["given"] + self.rules.undo_s <= now for row in answers)
                    if ask["state"] == "open" and not (done and settled):
                        continue
                    label = sum(labels) / len(labels) if labels else None
                    self._db.execute(
                        "UPDATE asks SET state = 'taken', label = ? WHERE number = ?", (label, ask["number"])
                    )
                    self._db.execute("DELETE FROM leases WHERE ask = ?", (ask["number"],))
                verdicts = {row["person"]: row["verdict"] for row in answers}
                taken.append(Taken(name, label, bool(ask["swapped"]), verdicts))
        return taken

    def withdraw(self, names: Sequence[str]) -> None:
        """Lets nobody be asked about these any more."""
        with self._writing():
            for name in names:
                self._db.execute("UPDATE asks SET state = 'withdrawn' WHERE name = ? AND state = 'open'", (name,))

    # -------------------------------------------------------------------------------------------------------- A person

    def next_pair(self, person: str) -> Pair | None:
        """Returns what a person is to be shown, kept for this one for a while: what was shown before, or the oldest pair."""
        now = time.time()
        with self._writing():
            ask = self._leased(person, now) or self._check(person) or self._oldest(person, now)
            if ask is None:
                return None
            number = ask["number"]
            lease = self._one(
                "SELECT ticket FROM leases WHERE ask = ? AND person = ? AND until > ?", number, person, now
            )
            ticket = lease["ticket"] if lease else secrets.token_urlsafe(12)
            if lease is None:
                until = now + self.rules.lease_s
                self._db.execute(
                    "INSERT OR REPLACE INTO leases VALUES (?, ?, ?, ?, ?)", (number, person, ticket, now, until)
                )
        return Pair(number, ticket, ask["prompt"], ask["left"], ask["right"])

    def _leased(self, person: str, now: float) -> sqlite3.Row | None:
        """What a person was shown and has not answered, if it is still to be answered."""
        return self._one(
            "SELECT a.* FROM leases l JOIN asks a ON a.number = l.ask WHERE l.person = ? AND l.until > ? "
            "AND a.state = 'open' AND (a.known IS NOT NULL OR "
            "(SELECT COUNT(*) FROM answers WHERE ask = a.number AND label IS NOT NULL) < ?) "
            "ORDER BY l.until DESC LIMIT 1",
            person,
            now,
            self.rules.redundancy,
        )

    def _check(self, person: str) -> sqlite3.Row | None:
        """A check that a person has not seen, if it is time for one."""
        (given,) = self._db.execute("SELECT COUNT(*) FROM answers WHERE person = ?", (person,)).fetchone()
        if (given + 1) % self.rules.check_every:
            return None
        return self._one(
            "SELECT * FROM asks a WHERE state = 'open' AND known IS NOT NULL "
            "AND NOT EXISTS (SELECT 1 FROM answers WHERE ask = a.number AND person = ?) ORDER BY number LIMIT 1",
            person,
        )

    def _oldest(self, person: str, now: float) -> sqlite3.Row | None:
        """The oldest pair that a person has not answered, and that not enough others answer or look at."""
        return self._one(
            "SELECT * FROM asks a WHERE state = 'open' AND known IS NULL "
            "AND NOT EXISTS (SELECT 1 FROM answers WHERE ask = a.number AND person = ?) "
            "AND (SELECT COUNT(*) FROM answers WHERE ask = a.number AND label IS NOT NULL) + "
            "(SELECT COUNT(*) FROM leases WHERE ask = a.number AND person <> ? AND until > ?) < ? "
            "ORDER BY number LIMIT 1",
            person,
            person,
            now,
            self.rules.redundancy,
        )

    def answer(self, person: str, number: int, ticket: str, verdict: str, reason: str = "") -> float | None:
        """Writes down what a person said of a pair; the same once more changes nothing.

        Args:
          person: who.
          number: of the ask.
          ticket: that came with the pair.
          verdict: one of `Rules.labels`.
          reason: of a skip.

        Returns:
          What the ensemble thought that left wins with; None: nobody knows.

        Raises:
          Refused: the pair was not shown to this person, or is not to be answered any more.
        """
        labels = self.rules.labels()
        if verdict not in labels:
            raise Refused(f"{verdict!r} is none of {', '.join(labels)}")
        now = time.time()
        with self._writing():
            ask = self._one("SELECT state, foreseen, known FROM asks WHERE number = ?", number)
            former = self._one("SELECT ticket, verdict FROM answers WHERE ask = ? AND person = ?", number, person)
            if ask is not None and former is not None and tuple(former) == (ticket, verdict):
                foreseen: float | None = ask["foreseen"]
                return foreseen
            lease = self._one("SELECT ticket, begun FROM leases WHERE ask = ? AND person = ?", number, person)
            if ask is None or former is not None or lease is None or lease["ticket"] != ticket:
                raise Refused("this pair is not yours to answer, or you have answered it")
            (answered,) = self._db.execute(
                "SELECT COUNT(*) FROM answers WHERE ask = ? AND label IS NOT NULL", (number,)
            ).fetchone()
            if ask["state"] != "open" or (ask["known"] is None and answered >= self.rules.redundancy):
                raise Refused("this pair is not needed any more")
            self._db.execute("DELETE FROM leases WHERE ask = ? AND person = ?", (number, person))
            self._db.execute(
                "INSERT INTO answers (ask, person, ticket, verdict, label, reason, given, seconds) "
                "VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
                (number, person, ticket, verdict, labels[verdict], reason, now, now - lease["begun"]),
            )
        return ask["foreseen"]

    def undo(self, person: str) -> None:
        """Takes back a person's last answer, who is shown that pair again.

        Raises:
          Refused: there is none, or the learner has it.
        """
        now = time.time()
        with self._writing():
            last = self._undoable(person)
            if not last:
                raise Refused("nothing can be taken back: the model has learnt from it")
            number, begun = last[0]["ask"], last[0]["given"] - last[0]["seconds"]
            self._db.execute("DELETE FROM answers WHERE number = ?", (last[0]["number"],))
            self._db.execute(
                "INSERT OR REPLACE INTO leases VALUES (?, ?, ?, ?, ?)",
                (number, person, secrets.token_urlsafe(12), begun, now + self.rules.lease_s),
            )

    def _undoable(self, person: str) -> list[sqlite3.Row]:
        """The last answers of a person, the newest first, up to the first that the learner has."""
        rows = self._db.execute(
            "SELECT n.*, a.state FROM answers n JOIN asks a ON a.number = n.ask WHERE person = ? "
            "ORDER BY n.number DESC LIMIT ?",
            (person, UNDO_LAST),
        ).fetchall()
        kept = next((index for index, row in enumerate(rows) if row["state"] != "open"), len(rows))
        return rows[:kept]

    def can_undo(self, person: str) -> bool:
        """Returns whether a person's last answer can be taken back."""
        return bool(self._undoable(person))

    def counts(self, person: str) -> dict[str, int]:
        """Returns how many pairs have a label, how many wait, and how many this person has answered."""
        answered = "(SELECT COUNT(*) FROM answers n WHERE n.ask = a.number AND n.label IS NOT NULL)"
        row = self._one(
            "SELECT (SELECT COUNT(*) FROM asks WHERE state = 'taken' AND label IS NOT NULL AND known IS NULL) "
            f"+ COALESCE(SUM({answered} >= ?1), 0) AS labelled, COALESCE(SUM({answered} < ?1), 0) AS waiting, "
            "(SELECT COUNT(*) FROM answers WHERE person = ?2 AND label IS NOT NULL) AS mine "
            "FROM asks a WHERE state = 'open' AND known IS NULL",
            self.rules.redundancy,
            person,
        )
        assert row is not None
        return dict(row)

    def is_needed(self, person: str, number: int) -> bool:
        """Returns whether a pair that a person was shown can still be answered."""
        return bool(
            self._one(
                "SELECT 1 FROM leases l JOIN asks a ON a.number = l.ask WHERE l.person = ? AND l.ask = ? "
                "AND a.state = 'open' AND (a.known IS NOT NULL OR "
                "(SELECT COUNT(*) FROM answers WHERE ask = a.number AND label IS NOT NULL) < ?)",
                person,
                number,
                self.rules.redundancy,
            )
        )


def connected(path: Path) -> sqlite3.Connection:
    """Returns a connection whose transactions are begun and ended by hand, and whose rows know their columns."""
    connection = sqlite3.connect(path, isolation_level=None, timeout=LOCK_WAIT_S)
    connection.row_factory = sqlite3.Row
    return connection


def _locked(path: Path) -> int:
    """A file that this process alone holds."""
    descriptor = os.open(path, os.O_CREAT | os.O_RDWR, 0o600)
    until = time.monotonic() + LOCK_WAIT_S
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return descriptor
        except BlockingIOError:
            if time.monotonic() > until:
                os.close(descriptor)
                raise BlockingIOError(f"{path}: another page has it; end the run that started that") from None
            time.sleep(0.05)
