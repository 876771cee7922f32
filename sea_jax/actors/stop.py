"""Responses that end where their text holds one of some strings, whoever writes them."""

import bisect
from collections.abc import Sequence
from dataclasses import replace

import jax.numpy as jnp
import numpy as np
from jaxtyping import PRNGKeyArray

from sea_jax.models.tokenizer import Tokenizer
from sea_jax.types import Candidates, Generate, Params, Prompts


def before(text: str, stop: Sequence[str]) -> str:
    """Returns what stands before the first of some strings, or the whole text."""
    return text[: min((text.index(string) for string in stop if string in text), default=len(text))]


def ending(generate: Generate, tokenizer: Tokenizer, stop: Sequence[str]) -> Generate:
    """Cuts responses behind the token that completes the first stop string.

    What was drawn up to there does not depend on what was drawn behind it, so that it makes no difference who cuts when.

    Args:
      generate: writes them.
      tokenizer: the policy's.
      stop: strings; none: nothing is cut.
    """
    if not stop:
        return generate

    def generate_and_cut(trained: Params, prompts: Prompts, key: PRNGKeyArray, version: int) -> Candidates:
        return cut(generate(trained, prompts, key, version), tokenizer, stop)

    return generate_and_cut


def cut(candidates: Candidates, tokenizer: Tokenizer, stop: Sequence[str]) -> Candidates:
    """Returns candidates that end with the token that completes a stop string; without features, which saw more of them."""
    tokens, lengths, logprobs = (
        np.array(part) for part in (candidates.tokens, candidates.lengths, candidates.logprobs)
    )
    for row in np.ndindex(*lengths.shape):
        lengths[row] = _length(tokens[row][: lengths[row]].tolist(), tokenizer, stop)
    behind = np.arange(tokens.shape[-1]) >= lengths[..., None]
    tokens[behind], logprobs[behind] = tokenizer.pad_id, 0.0
    return replace(
        candidates,
        tokens=jnp.asarray(tokens),
        lengths=jnp.asarray(lengths),
        logprobs=jnp.asarray(logprobs),
        features=candidates.features[..., :0],
    )


def _length(ids: Sequence[int], tokenizer: Tokenizer, stop: Sequence[str]) -> int:
    """The fewest tokens whose text holds a stop string, or all."""

    def holds(count: int) -> bool:
        text = tokenizer.decode(ids[:count])
        return any(string in text for string in stop)

    return bisect.bisect_left(range(1, len(ids) + 1), True, key=holds) + 1 if holds(len(ids)) else len(ids)
