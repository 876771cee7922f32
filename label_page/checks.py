"""Pairs with a known answer, which are mixed in to see how people answer."""

import hashlib
import json
from pathlib import Path

from label_page.store import Ask


def read_checks(path: Path) -> list[tuple[Ask, float]]:
    """Reads checks, one object a line with "prompt", "chosen" and "rejected"; which stands left is drawn from its texts.

    Returns:
      Pairs, and the label that left wins.

    Raises:
      OSError: the file cannot be read.
      ValueError: a line is no check.
    """
    checks = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            texts = tuple(record[name] for name in ("prompt", "chosen", "rejected"))
            if not all(isinstance(text, str) and text.strip() for text in texts) or texts[1] == texts[2]:
                raise ValueError("three texts are needed, and two different responses")
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{path}, line {number}: {type(error).__name__}: {error}; a check is an object with the texts "
                '"prompt", "chosen" and "rejected"'
            ) from error
        name = hashlib.sha256("\0".join(texts).encode()).hexdigest()
        swapped = int(name, 16) % 2 == 1
        left, right = reversed(texts[1:]) if swapped else texts[1:]
        checks.append((Ask(f"check/{name[:32]}", texts[0], left, right, swapped), 0.0 if swapped else 1.0))
    return checks
