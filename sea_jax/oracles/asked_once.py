"""What evaluations ask: each pair of texts once, on disk before it is asked and when it is answered, to be read again."""

import functools
import hashlib
import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from sea_jax.oracles.ledger import Ledger
from sea_jax.oracles.preferences import answers
from sea_jax.runtime import processes
from sea_jax.types import Preference

EVALUATION_LEDGER = "evaluations.jsonl"  # what a run's evaluations asked and were answered
COMMAND_LEDGER = "evaluations-alone.jsonl"  # the same of `python -m sea_jax.evaluate`, which may run beside it


def asked_once(preference: Preference, labeller: str, ledger: Ledger, others: Sequence[Ledger]) -> Preference:
    """Returns a preference that answers from ledgers what it was asked before, in whichever order the texts stood.

    Args:
      preference: asked about the rest.
      labeller: who that is, in the ledgers.
      ledger: what is asked stands there, not counted, before it is (fsync), every answer as soon as it comes, and what is
        not answered as an abstention, unless nothing is.
      others: more ledgers to answer from.

    Raises:
      OSError: (by the preference) the disk is full or gone.
    """

    def find(key: str) -> float | None:
        for one in (ledger, *others):
            if line := one.find(key):
                return float(line["probability"])
            if one.abstained(key):
                return math.nan
        return None

    @functools.wraps(preference)  # with the attributes that say how it wants to be asked
    def ask(prompts: Sequence[str], first: Sequence[str], second: Sequence[str]) -> Iterator[tuple[int, float]]:
        rows_of: dict[str, list[int]] = {}
        for row, (prompt, a, b) in enumerate(zip(prompts, first, second, strict=True)):
            key, turned = _key(labeller, prompt, a, b), _key(labeller, prompt, b, a)
            known, opposite = find(key), find(turned)
            if known is not None:
                yield row, known
            elif opposite is not None:
                yield row, 1 - opposite
            else:
                rows_of.setdefault(key, []).append(row)
        keys = list(rows_of)
        if not keys:
            return
        entries: list[dict[str, Any]] = [{"key": key, "digest": key[-32:]} for key in keys]
        processes.together(lambda: ledger.ask(entries), "the ledger of evaluations")
        asked = [rows_of[key][0] for key in keys]
        shown, shown_first, shown_second = ([texts[row] for row in asked] for texts in (prompts, first, second))
        in_order = np.zeros(len(asked), bool)  # whoever asks here has drawn the order already
        answered: set[int] = set()
        for numbers, probabilities in answers(preference, shown, shown_first, shown_second, in_order):
            new = dict(zip(numbers.tolist(), probabilities.tolist(), strict=True))
            lines = [
                entries[number]
                | {"labeller": labeller, "probability": probability, "label": probability, "counted": False}
                for number, probability in new.items()
            ]
            processes.together(lambda lines=lines: ledger.record(lines), "the ledger of evaluations")  # type: ignore[misc]
            answered |= set(new)
            for number, probability in new.items():
                yield from ((row, probability) for row in rows_of[keys[number]])
        if answered:
            silent = [entry for number, entry in enumerate(entries) if number not in answered]
            processes.together(lambda: ledger.abstain(silent), "the ledger of evaluations")

    return ask


def _key(labeller: str, prompt: str, first: str, second: str) -> str:
    digest = hashlib.sha256("\0".join((prompt, first, second)).encode()).hexdigest()
    return f"{labeller}-{digest[:32]}"
