"""What the ERM sees of a response: hidden states of a transformer that is never trained."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sea_jax import generation, tokenizer
from sea_jax.generation import SamplingConfig
from sea_jax.models import encoder, hf
from sea_jax.models.config import EncoderConfig, ModelConfig
from sea_jax.types import Array, Candidates, Params, Prompts

Texts = Sequence[Sequence[str]]  # B lists of M responses
Featurize = Callable[[Mapping[str, Any], Candidates, Texts], Array]
"""A batch of prompts, its candidates and their texts -> [B, M, d] float32."""

BUCKET = 64  # tokens; sequences of a trunk are padded to a multiple of it


def from_sampler(batch: Mapping[str, Any], candidates: Candidates, texts: Texts) -> Array:
    """Features that the sampler read on its way through layers that are frozen: they cost nothing.

    Args:
      batch: not used.
      candidates: Candidates, [B, M, T].
      texts: not used.

    Returns:
      [B, M, d] float32.
    """
    return candidates.features


def of_reference(reference: Params, config: ModelConfig, sampling: SamplingConfig) -> Featurize:
    """Features are hidden states of the frozen reference policy, run again over what the trained policy wrote.

    Args:
      reference: the reference policy's parameters.
      config: ModelConfig.
      sampling: SamplingConfig; its feature_stack and dtype are used.

    Returns:
      Featurize.
    """

    def featurize(batch: Mapping[str, Any], candidates: Candidates, texts: Texts) -> Array:
        return generation.response_features(
            reference,
            Prompts(batch["tokens"], batch["valid"]),
            candidates.tokens,
            candidates.lengths,
            config=config,
            feature_stack=sampling.feature_stack,
            dtype=sampling.dtype,
        )

    return featurize


def of_trunk(source: str) -> Featurize:
    """Features are hidden states of a separate encoder that reads prompt and response as a pair of sentences.

    Args:
      source: a BERT encoder, anything that `hf.load` takes.

    Returns:
      Featurize: mean of the last hidden states over the response's tokens, the closing separator included. Where both do
      not fit the encoder's positions, the prompt's beginning is cut.

    Raises:
      ValueError: the source is not an encoder.
    """
    loaded = hf.load(source)
    if not isinstance(loaded.config, EncoderConfig):
        raise ValueError(f"config.erm.trunk={source}: expected a BERT encoder, found a decoder")
    config, words, params = loaded.config, tokenizer.load(loaded.directory), jax.device_put(loaded.params)

    @jax.jit
    def pooled(tokens: Array, valid: Array, in_response: Array) -> Array:
        types = in_response.astype(jnp.int32)
        hidden = encoder.apply(params, config, tokens, valid, token_types=types, dtype="float32")
        return encoder.mean_pool(hidden, in_response)

    def featurize(batch: Mapping[str, Any], candidates: Candidates, texts: Texts) -> Array:
        rows = []
        for prompt, responses in zip(batch["prompt"], texts, strict=True):
            prompt_ids = words.encode(prompt)  # [CLS] ... [SEP]
            for response in responses:
                response_ids = words.encode(response)[1:][: config.max_positions // 2]
                room = config.max_positions - len(response_ids)
                kept = prompt_ids if len(prompt_ids) <= room else [prompt_ids[0], *prompt_ids[1 - room :]]
                rows.append((kept, response_ids))
        length = -(-max(len(p) + len(r) for p, r in rows) // BUCKET) * BUCKET
        length = min(length, config.max_positions)
        tokens = np.full((len(rows), length), words.pad_id, np.int32)
        valid, in_response = np.zeros((2, len(rows), length), bool)
        for row, (prompt_ids, response_ids) in enumerate(rows):
            end = len(prompt_ids) + len(response_ids)
            tokens[row, :end] = prompt_ids + response_ids
            valid[row, :end] = True
            in_response[row, len(prompt_ids) : end] = True
        return pooled(tokens, valid, in_response).reshape(len(texts), -1, config.d_model)

    return featurize
