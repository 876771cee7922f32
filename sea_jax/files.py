"""Files that are there whole or not at all, whenever a run is killed."""

import os
from pathlib import Path


def write_whole(path: Path, content: str | bytes) -> None:
    """Writes a file beside its place, and puts it there when it is on disk (fsync).

    Args:
      path: the file; an older one is replaced.
      content: what it will hold; a text in UTF-8.

    Raises:
      OSError: the disk is full or gone; what stood at the path stands there still.
    """
    unfinished = path.with_name(f"{path.name}.unfinished")
    with unfinished.open("wb") as file:
        file.write(content.encode() if isinstance(content, str) else content)
        file.flush()
        os.fsync(file.fileno())
    unfinished.replace(path)
