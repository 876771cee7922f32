"""One way from a duel to its label: asked on disk first, then by the oracle or the ERM, and on disk before anyone learns."""

import functools
import hashlib
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np

from sea_jax.oracles.ledger import Ledger, LedgerError
from sea_jax.oracles.preferences import drawn_order, takes
from sea_jax.runtime import processes
from sea_jax.types import Array, Judgement, LateOracle, Oracle

# Who labels a pair; CUT: nobody needs to, one response was cut and the other ended by itself.
ORACLE, ERM, CUT = "oracle", "erm", "cut"


@dataclass(frozen=True)
class Question:
    """A pair to label.

    Attributes:
      key: names the pair within the run, the same when a resumed run comes past it again.
      step: the step it belongs to.
      prompt_id: of the prompt.
      prompt: text shown to the oracle.
      first: text of the first response.
      second: text of the second response.
      erm_label: None: the oracle is asked and the query counted; else the label that the ERM gives.
      cut: that label is not the ERM's: one response ended by itself, the other was cut.
      finished: whether the first and the second response ended by themselves; None: nobody knows.
      foreseen: the ERM's probability that the first wins; None: there is no ERM.
    """

    key: str
    step: int
    prompt_id: str
    prompt: str
    first: str
    second: str
    erm_label: float | None
    cut: bool = False
    finished: tuple[bool, bool] | None = None
    foreseen: float | None = None

    @property
    def labeller(self) -> str:
        """ORACLE, ERM or CUT."""
        return ORACLE if self.erm_label is None else CUT if self.cut else ERM

    def entry(self) -> dict[str, Any]:
        """Returns what the ledger holds of the question, without the label."""
        content = "\0".join((self.prompt_id, self.prompt, self.first, self.second, self.labeller))
        return {
            "key": self.key,
            "step": self.step,
            "prompt_id": self.prompt_id,
            "first": self.first,
            "second": self.second,
            "digest": hashlib.sha256(content.encode()).hexdigest()[:16],
            "labeller": self.labeller,
        }


def label(questions: Sequence[Question], oracle: Oracle, ledger: Ledger, keys: Array) -> list[float]:
    """Labels every question that is answered; one that the ledger knows of is not asked again.

    Args:
      questions: N pairs.
      oracle: asked about those that neither the ledger nor the ERM has answered; each is shown in a random order.
      ledger: every ask is on disk (fsync) when the oracle is asked, every answer as soon as it comes; what is not answered
        stands there when this returns, as an abstention, or as open if the oracle may answer later.
      keys: [N] random keys, one per question.

    Returns:
      N probabilities that the first response wins; NaN where the oracle has no answer, which costs nothing.

    Raises:
      LedgerError: the ledger holds another pair under a question's key.
      OSError: the oracle's service is gone, or the disk is full or gone; started again, the run asks under the same keys
        what it has no answer to.
    """
    entries = [question.entry() for question in questions]
    known = [_look_up(ledger, entry) for entry in entries]
    asked = [
        row
        for row, question in enumerate(questions)
        if known[row] is None and question.erm_label is None and not ledger.left_open(question.key)
    ]
    ready: set[int] = set()  # rows that are labelled and not yet on disk
    refused: set[int] = set()  # rows that nobody will ever label
    for row, question in enumerate(questions):
        if known[row] is None and question.erm_label is not None:
            entries[row] |= {"probability": question.erm_label, "label": question.erm_label, "counted": False}
            ready.add(row)

    def record() -> None:
        processes.together(lambda: ledger.record([entries[row] for row in sorted(ready)]), "the ledger")
        for row in ready:
            known[row] = entries[row]
        ready.clear()

    if asked:
        asked_keys = jnp.stack([keys[row] for row in asked])
        swapped = drawn_order(asked_keys)
        for row, swap in zip(asked, swapped.tolist(), strict=True):
            entries[row]["swapped"] = swap
        processes.together(lambda: ledger.ask(entries[row] for row in asked), "the ledger")
        told = {name: [getattr(questions[row], name) for row in asked] for name in ("finished", "foreseen")}
        tells = {name: values for name, values in told.items() if takes(oracle, name) and None not in values}
        judgements = oracle(
            [questions[row].prompt for row in asked],
            [questions[row].first for row in asked],
            [questions[row].second for row in asked],
            swapped,
            asked_keys,
            [_name(ledger, questions[row].key) for row in asked],
            **tells,
        )
        for judgement in _name_failures(judgements, len(asked), ledger):
            for number, paid in _answers(judgement):
                row = asked[number]
                if paid is None:
                    refused.add(row)
                    continue
                entries[row] |= paid
                ready.add(row)
            record()
        silent = {row for row in asked if known[row] is None}
        if not isinstance(oracle, LateOracle):
            refused = silent
        processes.together(lambda: ledger.abstain([entries[row] for row in sorted(refused)]), "the ledger")
        processes.together(lambda: ledger.leave_open([entries[row] for row in sorted(silent - refused)]), "the ledger")
    record()
    lines = [None if ledger.left_open(question.key) else line for question, line in zip(questions, known, strict=True)]
    return [_label_of(line) for line in lines]


def label_late(
    keys: Sequence[str],
    oracle: LateOracle,
    ledger: Ledger,
    step: int,
    stale: Sequence[str],
    enough: Callable[[int, int], bool],
) -> dict[str, float]:
    """Takes what has become of pairs that steps before left open; a resumed run takes the same at the same step.

    Args:
      keys: of the pairs.
      oracle: was asked about them.
      ledger: every answer is on disk (fsync) when this returns.
      step: learns from them.
      stale: keys of those that are withdrawn.
      enough: how many are answered, how many never will be -> whether the run can go on; until then it waits.

    Returns:
      The labels of those that are no longer open, by their keys; NaN where there will be none.
    """

    def on_record() -> dict[str, float]:
        lines = {key: ledger.find(key) or ledger.abstained(key) for key in keys}
        return {key: _label_of(line) for key, line in lines.items() if line is not None and line.get("taken") == step}

    if ledger.has_taken(step):
        return on_record()
    oracle.withdraw([_name(ledger, key) for key in stale])
    while True:
        still_open = [key for key in keys if key not in on_record()]
        judgement = oracle.collect([_name(ledger, key) for key in still_open])
        labelled, refused = [], []
        for number, paid in _answers(judgement):
            entry = {"key": still_open[number], "taken": step}
            if paid is None:
                refused.append(entry)
            else:
                labelled.append(entry | paid)
        processes.together(functools.partial(ledger.record, labelled), "the ledger")
        processes.together(functools.partial(ledger.abstain, refused), "the ledger")
        found = on_record()
        never = sum(math.isnan(value) for value in found.values())
        if enough(len(found) - never, never):
            processes.together(lambda: ledger.take_up_to(step), "the ledger")
            return found
        time.sleep(POLL_S)


POLL_S = 0.5  # between two looks at what has been answered, where there is nothing else to do


def _name(ledger: Ledger, key: str) -> str:
    """The name under which a pair is asked about, which no other run uses."""
    return f"{ledger.run_id}/{key}"


def _answers(judgement: Judgement) -> Iterator[tuple[int, dict[str, Any] | None]]:
    """Which pairs are judged, with what the ledger holds of the answer; None: there will be none."""
    people = judgement.people or [()] * len(judgement.rows)
    columns = (judgement.rows, judgement.probability, judgement.label, people)
    for number, probability, value, who in zip(*columns, strict=True):
        if math.isnan(value):
            yield int(number), None
        else:
            paid = {"probability": float(probability), "label": float(value), "counted": True}
            yield int(number), paid | ({"people": list(who)} if who else {})


def _label_of(line: Mapping[str, Any] | None) -> float:
    """The label of a line of the ledger, NaN if there is none."""
    return float(np.float32(line["label"])) if line and "label" in line else math.nan


def _name_failures(judgements: Iterator[Judgement], count: int, ledger: Ledger) -> Iterator[Judgement]:
    """The judgements of an oracle as they come; a service that is gone is named, and what becomes of its questions."""
    while True:
        try:
            judgement = next(judgements, None)
        except OSError as error:
            raise OSError(
                f"the oracle did not answer: {str(error) or type(error).__name__}. What it was asked, {count} pairs, "
                f"stands in {ledger.path}: start the same command again, and it is asked again under the same keys"
            ) from error
        if judgement is None:
            return
        yield judgement


def _look_up(ledger: Ledger, entry: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """What the ledger holds of this pair, if it was labelled, or not answered, before a restart."""
    line = ledger.find(entry["key"]) or ledger.abstained(entry["key"])
    former = line or ledger.asked(entry["key"])
    if former is not None and former["digest"] != entry["digest"]:
        raise LedgerError(
            f"{ledger.path}: the line with key {entry['key']} is about another pair than the one this run came to, or for "
            "another labeller: the machine, a library or the data changed since the run was interrupted; go on where it "
            "ran, or start anew with another --workdir"
        )
    return line
