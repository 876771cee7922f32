"""An oracle nobody trained: the similarity of an encoder's embeddings of a response and of its prompt or reference."""

from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float32, Float64, Int32

from sea_jax.data import batching
from sea_jax.models import encoder, tokenizer
from sea_jax.models.checkpoints import hf
from sea_jax.models.config import EncoderConfig
from sea_jax.repetition import distinct_words
from sea_jax.types import Array, Reward

ENCODER_BUCKET = 32  # tokens; texts are padded to a multiple of it
ENCODER_BATCH = 16  # texts encoded at a time, sorted by length so that short ones pay for short ones

# What a response is compared with -> how much the human reference counts, from the weight that a mixture gives it.
AGAINST: Mapping[str, Callable[[float], float]] = {
    "prompt": lambda weight: 0.0,
    "reference": lambda weight: 1.0,
    "mixture": lambda weight: weight,
}


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


def embedding_similarity(source: str, on_reference: float = 0.0, references: Mapping[str, str] | None = None) -> Reward:
    """A reward nobody trained: cosine, in [-1, 1], of the embeddings of a response and of what it is compared with.

    Args:
      source: the encoder, anything that `hf.load` takes.
      on_reference: how much the cosine with the human reference counts, from 0 to 1; that with the prompt has the rest.
      references: prompt -> the human reference; NaN is the reward where one is needed and not there.
    """
    embed = embed_texts(source)
    seen: dict[str | None, np.ndarray] = {}  # prompts and references come again in every candidate and evaluation
    known = {} if references is None else references

    def reward(prompts: Sequence[str], responses: Sequence[str]) -> Float64[np.ndarray, " N"]:
        anchors_by_weight: list[tuple[float, Sequence[str | None]]] = [
            (1 - on_reference, prompts),
            (on_reference, [known.get(prompt) for prompt in prompts]),
        ]
        compared = [(weight, anchors) for weight, anchors in anchors_by_weight if weight]
        wanted = dict.fromkeys(text for _, anchors in compared for text in anchors)
        new = [text for text in wanted if text is not None and text not in seen]
        vectors = embed([*new, *responses])
        seen.update(zip(new, vectors, strict=False))
        seen[None] = np.full(vectors.shape[-1], np.nan, np.float32)  # there is no reference
        total = np.zeros(len(responses))
        for weight, anchors in compared:
            cosine = (np.stack([seen[text] for text in anchors]) * vectors[len(new) :]).sum(-1)
            total += weight * cosine.astype(np.float64)
        return total

    return reward


def less_repetition(reward: Reward, penalty: float) -> Reward:
    """Takes the penalty times the share of words that repeat an earlier one of the response off a reward."""

    def penalised(prompts: Sequence[str], responses: Sequence[str]) -> Float64[np.ndarray, " N"]:
        repeated = np.array([1 - distinct_words(response) for response in responses])
        return reward(prompts, responses) - penalty * repeated

    return penalised
