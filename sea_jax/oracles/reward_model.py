"""The scores of a reward model, in this process or served by another."""

import bisect
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import datetime
from functools import partial
from pathlib import Path

import jax
import numpy as np
from jaxtyping import Float64, Real

from sea_jax.data import batching
from sea_jax.data.conversations import messages_of, without_beginning
from sea_jax.models import decoder, partition, tokenizer
from sea_jax.models import reward as reward_models
from sea_jax.models.checkpoints import hf
from sea_jax.models.config import ModelConfig
from sea_jax.models.tokenizer import Tokenizer
from sea_jax.types import Reward

REWARD_BUCKET = 64  # tokens; texts of a reward model are padded to a multiple of it


def conversation_encoder(directory: Path, tokenizer: Tokenizer, max_tokens: int) -> Callable[[str, str], list[int]]:
    """Returns how a prompt and its response become the token ids that a reward model reads.

    They become the turns of user and assistant in its tokenizer's chat template, those of a conversation as they are; without
    a template, one text with a
    space between them, unless there is one, and the EOS behind it (TL;DR models). It ends with the last token that is
    not the padding token of its config.json: there transformers reads the score.

    Args:
      directory: holds the reward model's config.json.
      tokenizer: its own.
      max_tokens: of prompt and response together; the beginning of a longer prompt is cut. A response that alone is
        longer stays whole.
    """
    padding = json.loads((directory / "config.json").read_text(encoding="utf-8")).get("pad_token_id")

    def encode(prompt: str, response: str) -> list[int]:
        shown = prompt if tokenizer.backend.chat_template else str(prompt)  # of a conversation, its text

        def without(dropped: int) -> list[int]:
            return _conversation(tokenizer, without_beginning(shown, dropped), response)

        ids = without(0)
        if len(ids) > max_tokens:
            # By characters rather than tokens, since a token may be a part of a character.
            ids = without(bisect.bisect_left(range(len(prompt)), True, key=lambda n: len(without(n)) <= max_tokens))
        end = max((i for i, token in enumerate(ids) if token != padding), default=0)
        return ids[: end + 1]

    return encode


def reward_model_scores(
    source: str, *, dtype: str, batch_size: int, max_tokens: int, now: datetime | None = None
) -> Reward:
    """The scores of a reward model, a decoder with a scalar head such as Skywork-Reward-Llama-3.1-8B.

    Args:
      source: the reward model, anything that `hf.load` takes.
      dtype: of its matrices and its computation.
      batch_size: texts scored at a time, sorted by length.
      max_tokens: of prompt and response together, see `conversation_encoder`.
      now: as of `Tokenizer`.

    Raises:
      ValueError: the source is not a reward model, or its tokenizer does not fit it.
    """
    directory = hf.locate(source)
    config, own_tokenizer = _read(directory, now)
    params = partition.put(hf.load(directory).params, decoder.abstract(config), dtype)
    encode = conversation_encoder(directory, own_tokenizer, max_tokens)
    score = jax.jit(partial(reward_models.apply, config=config, dtype=dtype))

    def apply(prompts: Sequence[str], responses: Sequence[str]) -> Float64[np.ndarray, " N"]:
        ids = [encode(prompt, response) for prompt, response in zip(prompts, responses, strict=True)]
        result = np.zeros(len(ids), np.float64)
        for rows, tokens, valid in batching.by_length(
            ids, batch_size=batch_size, bucket=REWARD_BUCKET, pad_id=own_tokenizer.pad_id, left=True
        ):
            result[rows] = np.asarray(score(params, tokens=tokens, valid=valid))[: len(rows)]
        return result

    return apply


def remote_reward(
    score: Callable[[list[list[int]]], Real[np.ndarray, " N"]],
    source: str,
    max_tokens: int,
    now: datetime | None = None,
) -> Reward:
    """The scores of a reward model that somebody else runs; what it reads is encoded here.

    Args:
      score: of N conversations, as token ids without padding.
      source: the reward model's config.json and tokenizer, found as `hf.load` does; its weights are not needed.
      max_tokens: of prompt and response together, see `conversation_encoder`.
      now: as of `Tokenizer`.

    Raises:
      ValueError: the source is not a reward model, or its tokenizer does not fit it.
    """
    directory = hf.locate(source, weights=False)
    _, own_tokenizer = _read(directory, now)
    encode = conversation_encoder(directory, own_tokenizer, max_tokens)

    def apply(prompts: Sequence[str], responses: Sequence[str]) -> Float64[np.ndarray, " N"]:
        ids = [encode(prompt, response) for prompt, response in zip(prompts, responses, strict=True)]
        scores = np.asarray(score(ids), np.float64)
        if scores.shape != (len(ids),) or not np.isfinite(scores).all():
            raise ValueError(f"the reward model was asked for {len(ids)} finite scores and returned {scores}")
        return scores

    return apply


def _read(directory: Path, now: datetime | None) -> tuple[ModelConfig, Tokenizer]:
    """Reads what a reward model is, and its tokenizer, which must fit it."""
    config, own_tokenizer = reward_models.check(hf.read_config(directory)), tokenizer.load(directory)
    tokenizer.check(own_tokenizer, config.vocab_size)
    return config, replace(own_tokenizer, now=now)


def _conversation(tokenizer: Tokenizer, prompt: str, response: str) -> list[int]:
    """The token ids of a prompt and its response as a reward model reads them."""
    if tokenizer.backend.chat_template:
        turns = [*messages_of(prompt), {"role": "assistant", "content": response}]
        # The template writes the BOS.
        return tokenizer.encode(tokenizer.chat(turns, generation_prompt=False), add_special=False)
    apart = prompt[-1:].isspace() or response[:1].isspace()
    ids = tokenizer.encode(f"{prompt}{'' if apart else ' '}{response}")
    return ids if ids[-1:] == [tokenizer.eos_id] else [*ids, tokenizer.eos_id]
