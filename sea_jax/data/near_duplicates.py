"""Prompts that repeat a held-out one: but for case and white space, or nearly, by the runs of words that they share."""

import itertools
from collections import Counter, defaultdict
from collections.abc import Sequence

import numpy as np
from scipy import sparse

from sea_jax.data import docstrings
from sea_jax.data.records import Record

# A run of words that more than this share of the held-out prompts, and more than so many of them, have is a template's.
BOILERPLATE_SHARE, BOILERPLATE_TIMES = 0.05, 4
PROMPTS_COMPARED = 256  # with all others at a time: keeps the table of what they share small


def exact_repeats(records: Sequence[Record], others: Sequence[Record]) -> dict[int, int]:
    """Returns which records have the prompt of one of the others but for case and white space: row -> the other's."""
    row_of_other = {folded(other["prompt"]): row for row, other in enumerate(others)}
    rows = ((row, row_of_other.get(folded(record["prompt"]))) for row, record in enumerate(records))
    return {row: other for row, other in rows if other is not None}


def folded(text: str) -> str:
    """Returns a text without what case and white space tell apart."""
    return " ".join(text.casefold().split())


def near_repeats(records: Sequence[Record], others: Sequence[Record], share: float) -> dict[int, int]:
    """Returns which records have nearly the prompt of one of the others: row -> the other's.

    A wording that many of the others share, such as that of a template, is no sign of nearness.

    Args:
      records, others: any.
      share: two texts are near-duplicates if they share this share of the shorter one's runs of four words; above 0.
    """
    column_of: dict[tuple[str, ...], int] = defaultdict(itertools.count().__next__)
    shingles_of_others = [word_shingles(other["prompt"]) for other in others]
    times = Counter(itertools.chain.from_iterable(shingles_of_others))
    max_times = max(BOILERPLATE_TIMES, BOILERPLATE_SHARE * len(others))
    boilerplate = {shingle for shingle, count in times.items() if count > max_times}
    columns_of_others = [[column_of[shingle] for shingle in own - boilerplate] for own in shingles_of_others]
    sizes_of_others = np.array([len(columns) for columns in columns_of_others])
    known = set(column_of)
    with_shingle = incidence(columns_of_others, len(known)).T.tocsr()
    found: dict[int, int] = {}
    for start in range(0, len(records), PROMPTS_COMPARED):
        part = records[start : start + PROMPTS_COMPARED]
        shingles_of_part = [word_shingles(record["prompt"]) - boilerplate for record in part]
        sizes = np.array([len(shingles) for shingles in shingles_of_part])
        columns_of_part = [[column_of[shingle] for shingle in shingles & known] for shingles in shingles_of_part]
        shared = (incidence(columns_of_part, len(known)) @ with_shingle).tocoo()
        near = shared.data >= share * np.minimum(sizes[shared.row], sizes_of_others[shared.col])
        found |= dict(zip((start + shared.row[near]).tolist(), shared.col[near].tolist(), strict=True))
    return found


def incidence(columns_of_rows: Sequence[Sequence[int]], num_columns: int) -> sparse.csr_array:
    """Returns a sparse int32 matrix with ones in the given columns of each row."""
    ends = np.cumsum([0, *map(len, columns_of_rows)])
    columns = np.fromiter(itertools.chain.from_iterable(columns_of_rows), np.int32, ends[-1])
    return sparse.csr_array((np.ones(len(columns), np.int32), columns, ends), shape=(len(columns_of_rows), num_columns))


def word_shingles(text: str) -> set[tuple[str, ...]]:
    """Returns all runs of four words of a text, in lower case; a shorter text is one run."""
    words = docstrings.bare(text).split()
    return set(zip(words, words[1:], words[2:], words[3:], strict=False)) or {tuple(words)}
