"""Candidates as people and oracles read them: learning uses the ids as they were sampled."""

from collections.abc import Callable, Sequence

import numpy as np

from sea_jax.actors import stop
from sea_jax.actors.generation import SamplingSettings
from sea_jax.models.tokenizer import Tokenizer
from sea_jax.types import Candidates


def texts_of(tokenizer: Tokenizer, settings: SamplingSettings) -> Callable[[Candidates], list[list[str]]]:
    """Returns the function that decodes candidates.

    Special tokens are left out, thoughts and what a stop string begins too, and the texts stripped.
    """

    def text(ids: Sequence[int]) -> str:
        said = without_thoughts(ids, tokenizer, settings.thoughts) if settings.thoughts else tokenizer.decode(ids)
        return stop.before(said, settings.stop).strip()

    def decode(candidates: Candidates) -> list[list[str]]:
        tokens, lengths = np.asarray(candidates.tokens), np.asarray(candidates.lengths)
        return [
            [text(ids[:length].tolist()) for ids, length in zip(*row, strict=True)]
            for row in zip(tokens, lengths, strict=True)
        ]

    return decode


def without_thoughts(ids: Sequence[int], tokenizer: Tokenizer, marks: Sequence[str]) -> str:
    """Returns the text behind the last end of thoughts; of thoughts that never end, what stands before them.

    Args:
      ids: of a response, which may begin within thoughts that its prompt has begun.
      tokenizer: the policy's.
      marks: what begins thoughts and what ends them, in writing or as special tokens.
    """
    begin, end = marks
    hidden = {token for piece, token in tokenizer.special_tokens.items() if piece not in marks}
    text = tokenizer.decode([token for token in ids if token not in hidden], skip_special=False)
    return text.rpartition(end)[2].partition(begin)[0]
