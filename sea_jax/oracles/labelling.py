"""One way from a duel to its label: asked on disk first, then by the oracle or the ERM, and on disk before anyone learns."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from sea_jax.oracles.ledger import Ledger, LedgerError
from sea_jax.runtime import processes
from sea_jax.types import Array, Oracle


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
    """

    key: str
    step: int
    prompt_id: str
    prompt: str
    first: str
    second: str
    erm_label: float | None

    def entry(self) -> dict[str, Any]:
        """Returns what the ledger holds of the question, without the label."""
        labeller = "oracle" if self.erm_label is None else "erm"
        content = "\0".join((self.prompt_id, self.prompt, self.first, self.second, labeller))
        return {
            "key": self.key,
            "step": self.step,
            "prompt_id": self.prompt_id,
            "first": self.first,
            "second": self.second,
            "digest": hashlib.sha256(content.encode()).hexdigest()[:16],
            "labeller": labeller,
        }


def label(questions: Sequence[Question], oracle: Oracle, ledger: Ledger, keys: Array) -> list[float]:
    """Labels every question; a question that the ledger already answers is not asked again.

    Args:
      questions: N pairs.
      oracle: asked about those that neither the ledger nor the ERM has answered.
      ledger: every ask is on disk (fsync) when the oracle is asked, every new label when this returns.
      keys: [N] random keys, one per question.

    Returns:
      N probabilities that the first response wins.

    Raises:
      LedgerError: the ledger holds another pair under a question's key.
      OSError: the oracle's service is gone, or the disk is full or gone; started again, the run asks under the same keys.
    """
    entries = [question.entry() for question in questions]
    known = [_known(ledger, entry) for entry in entries]
    asked = [i for i, question in enumerate(questions) if known[i] is None and question.erm_label is None]
    for question, entry in zip(questions, entries, strict=True):
        if question.erm_label is not None:
            entry |= {"probability": question.erm_label, "label": question.erm_label, "counted": False}
    if asked:
        processes.together(lambda: ledger.ask(entries[i] for i in asked), "the ledger")
        try:
            judgement = oracle(
                [questions[i].prompt for i in asked],
                [questions[i].first for i in asked],
                [questions[i].second for i in asked],
                jax.numpy.stack([keys[i] for i in asked]),
                [f"{ledger.run_id}/{questions[i].key}" for i in asked],
            )
        except OSError as error:
            raise OSError(
                f"the oracle did not answer: {str(error) or type(error).__name__}. What it was asked, {len(asked)} pairs, "
                f"stands in {ledger.path}: start the same command again, and it is asked again under the same keys"
            ) from error
        for i, probability, value in zip(asked, judgement.probability, judgement.label, strict=True):
            entries[i] |= {"probability": float(probability), "label": float(value), "counted": True}
    new = [entry for entry, line in zip(entries, known, strict=True) if line is None]
    processes.together(lambda: ledger.record(new), "the ledger")
    return [float(np.float32((line or entry)["label"])) for entry, line in zip(entries, known, strict=True)]


def _known(ledger: Ledger, entry: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """What the ledger holds of this pair, if it was labelled before a restart."""
    line = ledger.find(entry["key"])
    former = line or ledger.asked(entry["key"])
    if former is not None and former["digest"] != entry["digest"]:
        raise LedgerError(
            f"{ledger.path}: the line with key {entry['key']} is about another pair than the one this run came to, or for "
            "another labeller: the machine, a library or the data changed since the run was interrupted; go on where it "
            "ran, or start anew with another --workdir"
        )
    return line
