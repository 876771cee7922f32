"""Reward models: a decoder or DeBERTa that ends in one score, ...ForSequenceClassification in transformers."""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Bool, Float32, Int

from sea_jax.models import deberta, decoder, objectives, partition
from sea_jax.models.config import Config, DebertaConfig, ModelConfig
from sea_jax.models.layers import ACTIVATIONS, linear
from sea_jax.types import AnyArray, Array, Params


def check(config: Config) -> ModelConfig | DebertaConfig:
    """Returns a reward model's configuration; refuses any other.

    Raises:
      ValueError: the model has no scalar head.
    """
    if isinstance(config, ModelConfig | DebertaConfig) and config.scalar_head:
        return config
    found = "a decoder with an unembedding" if isinstance(config, ModelConfig) else "an encoder"
    raise ValueError(
        "expected a reward model, whose config.json field 'architectures' names LlamaForSequenceClassification or the "
        f"like, with one label, found {found}"
    )


def reads_left_padded(config: ModelConfig | DebertaConfig) -> bool:
    """Returns whether sequences are padded on the left, so that all end together, or on the right, so that all begin so."""
    return isinstance(config, ModelConfig)


def apply(
    params: Params,
    config: ModelConfig | DebertaConfig,
    tokens: Int[AnyArray, "N S"],
    valid: Bool[AnyArray, "N S"],
    *,
    dtype: Any,
    header: tuple[int, ...] = (),
) -> Float32[Array, " N"]:
    """Scores sequences by what the model says at their last token (https://arxiv.org/abs/2203.02155, section 3.5).

    DeBERTa says it at the first, behind a layer that is made for it. One that weighs objectives by the prompt reads this where
    the header of the last answer begins.

    Args:
      params: the reward model's, see `hf.abstract`.
      config: its configuration, with a scalar head.
      tokens: padded as `reads_left_padded` says.
      valid: False on padding.
      dtype: in which the layers compute; the score is float32, and what is made of several objectives too.
      header: tokens that stand between a prompt and its answer; only a model with `gating` looks for them.
    """
    tokens, valid = partition.batches((tokens, valid))
    if isinstance(config, DebertaConfig):
        first = deberta.apply(params, config, tokens, valid, dtype=dtype)[:, 0]
        pooled = ACTIVATIONS[config.pooler_activation](linear(first, params["pooler"])).astype(jnp.float32)
        head = params["classifier"]
        scores = pooled @ head["kernel"].astype(jnp.float32) + head["bias"].astype(jnp.float32)
        return partition.whole(scores[:, 0])
    hidden = decoder.hidden_states(params, config, tokens, valid, dtype=dtype)
    last = decoder.final(params, config, hidden[:, -1])
    if config.gating:
        where = objectives.starts(tokens, header)[:, None, None]
        prompt = decoder.final(params, config, jnp.take_along_axis(hidden, where, axis=1)[:, 0])
        return partition.whole(objectives.score(params, config.gating, last, prompt))
    return partition.whole(last.astype(jnp.float32) @ params["score"].astype(jnp.float32))
