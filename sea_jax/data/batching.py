"""Token sequences of many lengths as padded batches of few shapes: little is computed for padding, and little compiled."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int, Int32


class Padded(NamedTuple):
    """Some of the sequences, side by side; valid: False on padding.

    Attributes:
      rows: which sequences the first n rows hold; what is left of the batch is padding.
    """

    rows: Int[np.ndarray, " n"]
    tokens: Int32[np.ndarray, "B S"]
    valid: Bool[np.ndarray, "B S"]


def rounded(length: int, bucket: int) -> int:
    """Returns a length rounded up to a multiple of a bucket, both in tokens."""
    return -(-length // bucket) * bucket


def portions(count: int, batch_size: int) -> list[slice]:
    """Returns which of `count` >= 1 rows are worked on at a time: `batch_size` of them, or all if that is 0."""
    size = batch_size or count
    return [slice(start, min(start + size, count)) for start in range(0, count, size)]


def pad(
    sequences: Sequence[Sequence[int]], shape: tuple[int, int], pad_id: int, left: bool = False
) -> tuple[Int32[np.ndarray, "B S"], Bool[np.ndarray, "B S"]]:
    """Puts sequences below each other.

    Args:
      sequences: at most B, of at most S tokens.
      shape: (B, S).
      pad_id: the token id of the padding.
      left: it stands before the tokens, not behind them.

    Returns:
      Tokens, and what is False on padding.
    """
    tokens, valid = np.full(shape, pad_id, np.int32), np.zeros(shape, bool)
    for row, sequence in enumerate(sequences):
        place = slice(shape[1] - len(sequence), None) if left else slice(len(sequence))
        tokens[row, place], valid[row, place] = sequence, True
    return tokens, valid


def by_length(
    sequences: Sequence[Sequence[int]],
    *,
    batch_size: int,
    bucket: int,
    pad_id: int,
    longest: int | None = None,
    left: bool = False,
) -> Iterator[Padded]:
    """Yields all sequences, short ones first, so that they pay for short ones.

    Args:
      sequences: any number.
      batch_size: B, of every batch.
      bucket: tokens; S is the longest sequence of a batch, rounded up to a multiple of it.
      pad_id: the token id of the padding.
      longest: S is never more; None: no limit.
      left: the padding stands before the tokens, not behind them.
    """
    order = np.argsort([len(sequence) for sequence in sequences], kind="stable")
    for start in range(0, len(sequences), batch_size):
        rows = order[start : start + batch_size]
        length = rounded(len(sequences[rows[-1]]), bucket)
        shape = (batch_size, length if longest is None else min(length, longest))
        yield Padded(rows, *pad([sequences[row] for row in rows], shape, pad_id, left))
