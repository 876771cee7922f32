"""Reward models: a decoder whose last norm is followed by one score, ...ForSequenceClassification in transformers."""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Bool, Float32, Int

from sea_jax.models import decoder, partition
from sea_jax.models.config import Config, ModelConfig
from sea_jax.types import AnyArray, Array, Params


def check(config: Config) -> ModelConfig:
    """Returns a reward model's configuration; refuses any other.

    Raises:
      ValueError: the model has no scalar head.
    """
    if isinstance(config, ModelConfig) and config.scalar_head:
        return config
    found = "a decoder with an unembedding" if isinstance(config, ModelConfig) else "an encoder"
    raise ValueError(
        "expected a reward model, whose config.json field 'architectures' names LlamaForSequenceClassification or the "
        f"like, found {found}"
    )


def apply(
    params: Params, config: ModelConfig, tokens: Int[AnyArray, "N S"], valid: Bool[AnyArray, "N S"], *, dtype: Any
) -> Float32[Array, " N"]:
    """Scores sequences by what the model says at their last token (https://arxiv.org/abs/2203.02155, section 3.5).

    Args:
      params: the reward model's, see `decoder.abstract`.
      config: its configuration, with a scalar head.
      tokens: padded on the left.
      valid: False on padding.
      dtype: in which the layers compute; the score is float32.
    """
    tokens, valid = partition.batches((tokens, valid))
    streams = decoder.embed(params, config, tokens, valid, dtype=dtype)
    for stack in params["stacks"]:
        streams, _ = decoder.run_stack(stack, config, streams)
    last = decoder.final(params, config, streams.prompt[:, -1])
    return partition.whole(last.astype(jnp.float32) @ params["score"].astype(jnp.float32))
