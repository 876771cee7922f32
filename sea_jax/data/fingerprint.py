"""What tells the prompts of a run, and how its policy reads them, from others."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from sea_jax.data.prompts import Rendered
from sea_jax.data.records import Record, digest
from sea_jax.models.tokenizer import Tokenizer

PROMPTS_FILE = "prompts_id"  # in a work directory


@dataclass(frozen=True)
class Fingerprint:
    """Digests, in the order of the prompts.

    Attributes:
      num_training: prompts to train on.
      training_texts: of all of these, with their ids and references.
      training_tokens: of what the policy reads of them.
      heldout_texts, heldout_tokens: of each held-out prompt, since an evaluation may take fewer or more of them.
      vocabulary: of the tokens and their numbers, by which responses are read.
    """

    num_training: int
    training_texts: str
    training_tokens: str
    heldout_texts: list[str]
    heldout_tokens: list[str]
    vocabulary: str


def fingerprint(train: Sequence[Rendered], heldout: Sequence[Rendered], tokenizer: Tokenizer) -> Fingerprint:
    """Returns what tells prompts, rendered with a tokenizer, from others."""
    known = sorted((number, token) for token, number in tokenizer.backend.get_vocab().items())
    return Fingerprint(
        num_training=len(train),
        training_texts=of_records([prompt.record for prompt in train]),
        training_tokens=short_digest("".join(map(of_tokens, train))),
        heldout_texts=[digest_of_record(prompt.record) for prompt in heldout],
        heldout_tokens=[of_tokens(prompt) for prompt in heldout],
        vocabulary=short_digest(json.dumps([known, tokenizer.eos_id, tokenizer.pad_id])),
    )


def of_records(*parts: Sequence[Record]) -> str:
    """Returns a digest of records, whoever reads them."""
    return short_digest("".join(digest_of_record(record) for part in parts for record in part))


def digest_of_record(record: Record) -> str:
    """Returns a digest of a record's texts."""
    return short_digest(json.dumps([record["id"], record["prompt"], record["reference"]]))


def of_tokens(prompt: Rendered) -> str:
    """Returns a digest of the token ids of a prompt."""
    return hashlib.sha256(np.array(prompt.tokens, np.int32).tobytes()).hexdigest()[:16]


def short_digest(text: str) -> str:
    """Returns the first 16 hexadecimal digits of a text's sha256."""
    return digest(text)[:16]


def other_training(then: Fingerprint, now: Fingerprint) -> str:
    """Returns in what the training prompts are others than they were; "": in nothing."""
    if (then.num_training, then.training_texts) == (now.num_training, now.training_texts):
        return ""
    return (
        f"to train on there were {then.num_training} and are {now.num_training}, not all the same or in another order"
    )


def other_heldout(then: Fingerprint, now: Fingerprint) -> str:
    """Returns in what the held-out prompts are others than they were, as far as both go; "": in nothing."""
    pairs = list(zip(then.heldout_texts, now.heldout_texts, strict=False))
    differing = sum(before != after for before, after in pairs)
    return f"{differing} of {len(pairs)} held-out ones are others" if differing else ""


def otherwise_read(then: Fingerprint, now: Fingerprint) -> bool:
    """Returns whether the same prompts are other tokens, or the same tokens other texts, than they were."""
    before = dict(zip(then.heldout_texts, then.heldout_tokens, strict=True))
    after = dict(zip(now.heldout_texts, now.heldout_tokens, strict=True))
    same_training = then.training_texts == now.training_texts
    return (
        then.vocabulary != now.vocabulary
        or (same_training and then.training_tokens != now.training_tokens)
        or any(before[text] != after[text] for text in before.keys() & after.keys())
    )
