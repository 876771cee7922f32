"""What stands in a store, for reading alone: a page may be writing it."""

import sqlite3
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from label_page.store import FILE


@dataclass(frozen=True)
class Said:
    """What one person said of a pair.

    Attributes:
      verdict: one of the store's.
      label: that left wins; None: it was skipped.
      reason: of a skip.
      seconds: from the first sight of the pair.
    """

    verdict: str
    label: float | None
    reason: str
    seconds: float


@dataclass(frozen=True)
class Record:
    """A pair and all that was said of it.

    Attributes:
      name: of the ask.
      prompt, left, right: texts.
      known: of a check, the label that it should get; None: it is none.
      said: by person.
    """

    name: str
    prompt: str
    left: str
    right: str
    known: float | None
    said: Mapping[str, Said]

    def label(self) -> float | None:
        """Returns the mean over those who did not skip it; None: there is nobody."""
        labels = [one.label for one in self.said.values() if one.label is not None]
        return sum(labels) / len(labels) if labels else None


def read_records(workdir: Path, without: Collection[str] = ()) -> list[Record]:
    """Reads the pairs of a run in the order in which they were asked.

    Args:
      workdir: of the run.
      without: people whose answers are left out.

    Raises:
      ValueError: people were asked nothing there, or nobody of such a name was.
    """
    path = workdir / "people" / FILE
    if not path.is_file():
        raise ValueError(f"{workdir} holds no people/{FILE}: people were asked nothing there")
    database = sqlite3.connect(f"file:{path}?mode=ro", uri=True)
    try:
        names = {name for (name,) in database.execute("SELECT name FROM people")}
        if strangers := sorted(set(without) - names):
            raise ValueError(f"--without={','.join(strangers)}: there answered {', '.join(sorted(names)) or 'nobody'}")
        said: dict[int, dict[str, Said]] = {}
        query = "SELECT ask, person, verdict, label, reason, seconds FROM answers ORDER BY number"
        for ask, person, *rest in database.execute(query):
            if person not in without:
                said.setdefault(ask, {})[person] = Said(*rest)
        query = "SELECT name, prompt, left, right, known, number FROM asks ORDER BY number"
        return [
            Record(name, prompt, left, right, known, said.get(number, {}))
            for name, prompt, left, right, known, number in database.execute(query)
        ]
    finally:
        database.close()
