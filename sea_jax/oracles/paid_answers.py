"""What a judge answered and what that cost: in SQLite, on disk before a question is sent and before its answer is used."""

import contextlib
import sqlite3
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

CALLS_FILE = "judge.sqlite"  # in a work directory
BUSY_S = 60.0  # how long is waited for another process that writes
OPEN, ANSWERED, UNUSABLE, FAILED = "open", "answered", "unusable", "failed"  # what became of a call

ANSWERS = "CREATE TABLE IF NOT EXISTS {}.answers (question TEXT PRIMARY KEY, answer TEXT NOT NULL)"
CALLS = """CREATE TABLE IF NOT EXISTS calls (
    id INTEGER PRIMARY KEY,
    judge TEXT NOT NULL,
    question TEXT NOT NULL,
    began TEXT NOT NULL DEFAULT CURRENT_TIMESTAMP,
    outcome TEXT NOT NULL,
    cost REAL NOT NULL,
    input_tokens INTEGER NOT NULL DEFAULT 0,
    output_tokens INTEGER NOT NULL DEFAULT 0
)"""
SPENT = """SELECT judge, count(*), total(outcome IN ('failed', 'open')), total(outcome = 'unusable'), total(input_tokens),
    total(output_tokens), total(cost) FROM calls GROUP BY judge"""


@dataclass(frozen=True)
class Spent:
    """What a judge was asked in a run, and what that cost.

    Attributes:
      calls: requests that were sent.
      failed_calls: of which nothing came back that can be read.
      unusable_answers: of which an answer came back that names neither response.
      input_tokens: of the questions.
      output_tokens: of the answers.
      cost: at the prices that are set; a call that broke off counts with the most that it can have cost.
    """

    calls: int = 0
    failed_calls: int = 0
    unusable_answers: int = 0
    input_tokens: int = 0
    output_tokens: int = 0
    cost: float = 0.0


class OverBudgetError(Exception):
    """The next question may cost more than is left; the text says how much is spent."""


class PaidAnswers:
    """Answers by what was asked, and the calls that a work directory's run has paid for.

    Both are opened when they are first needed. Several processes may write; a call that was begun and never ended, since its
    process was killed, counts with the most that it can have cost.
    """

    def __init__(self, directory: Path | None, judge: str, cache: Path | None = None) -> None:
        """Takes where things are kept; nothing is opened yet.

        Args:
          directory: work directory; None: in memory.
          judge: whose calls these are, among those of the directory.
          cache: a file of answers that runs share; None: they stand beside the calls.
        """
        self._calls = ":memory:" if directory is None else str(directory / CALLS_FILE)
        self._judge, self._cache = judge, cache
        self._lock = threading.Lock()
        self._connection: sqlite3.Connection | None = None

    def find(self, question: str) -> str | None:
        """Returns the answer to a question, if one was paid for."""
        with self._transaction(writes=False) as connection:
            found = connection.execute(f"SELECT answer FROM {self._answers} WHERE question = ?", [question]).fetchone()
        return None if found is None else str(found[0])

    def begin(self, question: str, most: float, limit: float) -> int:
        """Notes that a question is about to be sent, on disk (fsync) when this returns.

        Args:
          question: its name.
          most: what it may cost.
          limit: of all costs together; 0: there is none.

        Returns:
          The name of the call.

        Raises:
          OverBudgetError: the limit might be passed.
          OSError: the disk is full or gone; nothing must be sent then.
        """
        with self._transaction() as connection:
            spent = _spent(connection).get(self._judge, Spent())
            if limit and spent.cost + most > limit:
                raise OverBudgetError(
                    f"{spent.cost:.6g} is spent in {spent.calls:,} calls, and the next may cost {most:.3g}"
                )
            row = connection.execute(
                "INSERT INTO calls (judge, question, outcome, cost) VALUES (?, ?, ?, ?)",
                [self._judge, question, OPEN, most],
            )
            return int(row.lastrowid or 0)

    def fail(self, call: int, cost: float) -> None:
        """Notes that nothing came of a call, and what it may have cost all the same."""
        with self._transaction() as connection:
            connection.execute("UPDATE calls SET outcome = ?, cost = ? WHERE id = ?", [FAILED, cost, call])

    def record(
        self, call: int, question: str, answer: str, *, usable: bool, cost: float, input_tokens: int, output_tokens: int
    ) -> None:
        """Keeps an answer, on disk (fsync) when this returns.

        Raises:
          OSError: the disk is full or gone; the answer must not be used then.
        """
        with self._transaction() as connection:
            connection.execute(f"INSERT OR IGNORE INTO {self._answers} VALUES (?, ?)", [question, answer])
            connection.execute(
                "UPDATE calls SET outcome = ?, cost = ?, input_tokens = ?, output_tokens = ? WHERE id = ?",
                [ANSWERED if usable else UNUSABLE, cost, input_tokens, output_tokens, call],
            )

    def spent(self) -> Spent:
        """Returns what this judge was asked so far, and what that cost."""
        with self._transaction(writes=False) as connection:
            return _spent(connection).get(self._judge, Spent())

    @property
    def _answers(self) -> str:
        return "main.answers" if self._cache is None else "shared.answers"

    @contextlib.contextmanager
    def _transaction(self, *, writes: bool = True) -> Iterator[sqlite3.Connection]:
        """The connection inside a transaction, which is on disk behind it, or undone."""
        with self._lock, failure_named(self._calls if self._cache is None else f"{self._calls} or {self._cache}"):
            if self._connection is None:
                self._connection = self._open()
            self._connection.execute("BEGIN IMMEDIATE" if writes else "BEGIN")
            try:
                yield self._connection
            except BaseException:
                self._connection.rollback()
                raise
            self._connection.commit()

    def _open(self) -> sqlite3.Connection:
        connection = sqlite3.connect(self._calls, timeout=BUSY_S, isolation_level=None, check_same_thread=False)
        if self._cache is not None:
            self._cache.parent.mkdir(parents=True, exist_ok=True)
            connection.execute("ATTACH ? AS shared", [str(self._cache)])
        for schema in ("main",) if self._cache is None else ("main", "shared"):
            connection.execute(f"PRAGMA {schema}.synchronous = EXTRA")  # the journal's end is on disk, too
        connection.execute(ANSWERS.format(self._answers.partition(".")[0]))
        connection.execute(CALLS)
        return connection


@contextlib.contextmanager
def failure_named(place: str) -> Iterator[None]:
    """Turns what SQLite says into an OSError that names the file."""
    try:
        yield
    except sqlite3.Error as error:
        raise OSError(
            f"{place}: {error}; nothing is asked whose answer could not be kept. Make room, or put the file back, and start "
            "the same command again"
        ) from error


def _spent(connection: sqlite3.Connection) -> dict[str, Spent]:
    rows = connection.execute(SPENT).fetchall()
    return {
        judge: Spent(int(calls), int(failed), int(unusable), int(asked), int(answered), cost)
        for judge, calls, failed, unusable, asked, answered, cost in rows
    }


def read_spent(directory: Path) -> Mapping[str, Spent]:
    """Returns what the judges of a work directory were asked, and what that cost: judge -> Spent.

    Raises:
      OSError: the file is damaged.
    """
    path = directory / CALLS_FILE
    if not path.exists():
        return {}
    with (
        failure_named(str(path)),
        contextlib.closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", timeout=BUSY_S, uri=True)) as opened,
    ):
        return _spent(opened)
