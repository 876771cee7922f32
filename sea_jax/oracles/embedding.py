"""An oracle nobody trained: the similarity of an encoder's embeddings of prompt and response."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float32, Float64, Int32

from sea_jax.data import batching
from sea_jax.models import encoder, tokenizer
from sea_jax.models.checkpoints import hf
from sea_jax.models.config import EncoderConfig
from sea_jax.types import Array, Reward

ENCODER_BUCKET = 32  # tokens; texts are padded to a multiple of it
ENCODER_BATCH = 16  # texts encoded at a time, sorted by length so that short ones pay for short ones


def embed_texts(source: str) -> Callable[[Sequence[str]], Float32[np.ndarray, "N d"]]:
    """Returns a function from texts to unit sentence embeddings: masked mean of an encoder's last hidden states.

    Args:
      source: the encoder, anything that `hf.load` takes; texts beyond its positions are cut.

    Raises:
      ValueError: the source is not an encoder.
    """
    loaded = hf.load(source)
    if not isinstance(loaded.config, EncoderConfig):
        raise ValueError(f"expected a BERT encoder, found a {loaded.config.family}")
    config = loaded.config
    own_tokenizer = tokenizer.fitted(tokenizer.load(loaded.directory), config.vocab_size)
    params, max_tokens = jax.device_put(loaded.params), config.max_positions

    @jax.jit
    def embed(tokens: Int32[Array, "b S"], valid: Bool[Array, "b S"]) -> Float32[Array, "b d"]:
        pooled = encoder.mean_pool(encoder.apply(params, config, tokens, valid, dtype="float32"), valid)
        return pooled / jnp.linalg.norm(pooled, axis=-1, keepdims=True)

    def apply(texts: Sequence[str]) -> Float32[np.ndarray, "N d"]:
        ids = [own_tokenizer.encode(own_tokenizer.quoted(text), max_length=max_tokens) for text in texts]
        result = np.zeros((len(ids), config.d_model), np.float32)
        for rows, tokens, valid in batching.by_length(
            ids, batch_size=ENCODER_BATCH, bucket=ENCODER_BUCKET, pad_id=own_tokenizer.pad_id, longest=max_tokens
        ):
            valid[:, 0] = True  # rows that hold no text still divide by one token
            result[rows] = np.asarray(embed(tokens, valid))[: len(rows)]
        return result

    return apply


def embedding_similarity(source: str) -> Reward:
    """A reward nobody trained: cosine, in [-1, 1], of the embeddings of prompt and response.

    Args:
      source: the encoder, anything that `hf.load` takes.
    """
    embed = embed_texts(source)
    seen: dict[str, np.ndarray] = {}  # prompts come again in every candidate and evaluation

    def reward(prompts: Sequence[str], responses: Sequence[str]) -> Float64[np.ndarray, " N"]:
        new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in seen]
        vectors = embed([*new, *responses])
        seen.update(zip(new, vectors, strict=False))
        prompt_vectors = np.stack([seen[prompt] for prompt in prompts])
        return (prompt_vectors * vectors[len(new) :]).sum(-1).astype(np.float64)

    return reward
