"""Files that are there whole or not at all, whenever a run is killed."""

import json
import os
from pathlib import Path
from typing import Any

from absl import logging


def write_whole(path: Path, content: str | bytes) -> None:
    """Writes a file, a text in UTF-8, beside its place, and puts it there, over an older one, when it is on disk (fsync).

    Raises:
      OSError: the disk is full or gone; what stood at the path stands there still.
    """
    unfinished = path.with_name(f"{path.name}.unfinished")
    with unfinished.open("wb") as file:
        file.write(content.encode() if isinstance(content, str) else content)
        file.flush()
        os.fsync(file.fileno())
    unfinished.replace(path)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSON Lines file, in its order; a last line that a killed run left torn is left out with a warning.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: a line other than the last is not a JSON object.
    """
    # Split as bytes: a torn line may end inside a character, and texts may hold line separators of Unicode's own.
    lines = path.read_bytes().split(b"\n")
    if lines[-1] == b"":
        lines.pop()
    records: list[dict[str, Any]] = []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
            if not isinstance(record, dict):
                raise ValueError(f"expected an object, found {type(record).__name__}")
        except ValueError as error:
            if number < len(lines):
                raise ValueError(f"{path}, line {number}: not a JSON object ({error})") from error
            logging.warning("%s: dropped the last line (%d), which is torn", path, number)
        else:
            records.append(record)
    return records
