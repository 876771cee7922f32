"""An oracle for tests, in a module of its own so that the commands that they start can import it."""

import zlib
from collections.abc import Sequence

import numpy as np


def arbitrary(prompts: Sequence[str], first: Sequence[str], second: Sequence[str]) -> np.ndarray:
    """A taste without rhyme or reason, so that no two different texts are equally good."""

    def liking(text: str) -> float:
        return zlib.crc32(text.encode()) / 2**32

    return np.array([0.5 + (liking(a) - liking(b)) / 2 for a, b in zip(first, second, strict=True)])
