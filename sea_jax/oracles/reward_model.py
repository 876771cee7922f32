"""The scores of a reward model, in this process or served by another."""

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import datetime
from functools import partial
from pathlib import Path

import jax
import numpy as np
from jaxtyping import Float64, Real

from sea_jax.data import batching
from sea_jax.data.conversations import conversation_encoder
from sea_jax.models import partition, tokenizer
from sea_jax.models import reward as reward_models
from sea_jax.models.checkpoints import hf
from sea_jax.models.config import DebertaConfig, ModelConfig
from sea_jax.models.tokenizer import Tokenizer
from sea_jax.types import Reward

REWARD_BUCKET = 64  # tokens; texts of a reward model are padded to a multiple of it


def reward_model_scores(
    source: str, *, dtype: str, batch_size: int, max_tokens: int, now: datetime | None = None
) -> Reward:
    """The scores of a reward model, such as Skywork-Reward-Llama-3.1-8B or OpenAssistant's reward-model-deberta-v3-large-v2.

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
    config, own_tokenizer, encode = read_conversations(directory, max_tokens, now, weights=True)
    header = answer_header(own_tokenizer) if isinstance(config, ModelConfig) and config.gating else ()
    params = partition.put(hf.load(directory).params, hf.abstract(config), dtype)
    left = reward_models.reads_left_padded(config)
    score = jax.jit(partial(reward_models.apply, config=config, dtype=dtype, header=header))

    def apply(prompts: Sequence[str], responses: Sequence[str]) -> Float64[np.ndarray, " N"]:
        ids = [encode(prompt, response) for prompt, response in zip(prompts, responses, strict=True)]
        result = np.zeros(len(ids), np.float64)
        for rows, tokens, valid in batching.by_length(
            ids, batch_size=batch_size, bucket=REWARD_BUCKET, pad_id=own_tokenizer.pad_id, left=left
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
    *_, encode = read_conversations(hf.locate(source, weights=False), max_tokens, now, weights=False)

    def apply(prompts: Sequence[str], responses: Sequence[str]) -> Float64[np.ndarray, " N"]:
        ids = [encode(prompt, response) for prompt, response in zip(prompts, responses, strict=True)]
        scores = np.asarray(score(ids), np.float64)
        if scores.shape != (len(ids),) or not np.isfinite(scores).all():
            raise ValueError(f"the reward model was asked for {len(ids)} finite scores and returned {scores}")
        return scores

    return apply


def read_conversations(
    directory: Path, max_tokens: int, now: datetime | None = None, *, weights: bool
) -> tuple[ModelConfig | DebertaConfig, Tokenizer, Callable[[str, str], list[int]]]:
    """Reads what a reward model is, without its weights, and how it reads conversations.

    Args:
      directory: holds its config.json and tokenizer.
      max_tokens: of prompt and response together, see `conversation_encoder`.
      now: the time that its chat template is told; None: that of the clock.
      weights: they will be read here.

    Returns:
      Its configuration, its tokenizer and the encoder.

    Raises:
      ValueError: it is no reward model, its tokenizer does not fit it, its chat template takes no conversation, or it was
        made for shorter ones.
    """
    config = reward_models.check(hf.read_config(directory, weights=weights))
    if max_tokens > config.longest_sequence:
        raise ValueError(
            f"it was made for sequences of up to {config.longest_sequence} tokens, but oracle.max_tokens={max_tokens}: set it "
            "to no more than that"
        )
    own_tokenizer = replace(tokenizer.fitted(tokenizer.load(directory), config.vocab_size), now=now)
    as_pair = isinstance(config, DebertaConfig)
    encode = conversation_encoder(directory, own_tokenizer, max_tokens, as_pair=as_pair)
    ids = encode("Q", "A")  # a template that takes no conversation says so now
    if isinstance(config, ModelConfig) and config.gating:
        _check_gated(ids, answer_header(own_tokenizer), here=weights)
    return config, own_tokenizer, encode


HEADER = "<|eot_id|><|start_header_id|>assistant<|end_header_id|>"  # what Llama 3 puts between a prompt and its answer


def answer_header(tokenizer: Tokenizer) -> tuple[int, ...]:
    """Returns the tokens of what stands between a prompt and its answer; a model with gating reads the prompt at the first.

    The published code looks for two line breaks behind them too, which an answer that begins with another would hide.

    Raises:
      ValueError: the tokenizer does not know them.
    """
    if missing := [piece for piece in re.findall(r"<\|\w+\|>", HEADER) if piece not in tokenizer.special_tokens]:
        raise ValueError(
            f"the tokenizer in {tokenizer.backend.name_or_path} has no special token {' and no '.join(missing)}: a model that "
            f"weighs objectives by the prompt reads it at {HEADER}; put its own tokenizer beside it"
        )
    return tuple(tokenizer.encode(HEADER, add_special=False))


def _check_gated(ids: Sequence[int], header: tuple[int, ...], *, here: bool) -> None:
    """Refuses a model with gating whose chat template has no header before an answer, or that servers are to run."""
    if not here:
        raise ValueError(
            "it weighs several objectives by the prompt, which no server here can do: set the field's kind to reward_model, "
            "and it scores in this process"
        )
    if header not in zip(*(ids[i:] for i in range(len(header))), strict=False):
        raise ValueError(
            f"its chat template does not put {HEADER} before an answer, where its gating network reads the prompt; take the "
            "template that it was published with"
        )
