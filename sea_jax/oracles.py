"""Who labels a duel. A preference is noise-free taste; an oracle turns it into labels, and wrappers add noise to any oracle."""

from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from scipy.special import expit

from sea_jax import tokenizer
from sea_jax.models import encoder, hf
from sea_jax.models.config import EncoderConfig
from sea_jax.types import Array, Judgement, Oracle, Preference

Reward = Callable[[Sequence[str], Sequence[str]], np.ndarray]  # N prompts, N responses -> [N] float64
Labels = Callable[[np.ndarray, Array], np.ndarray]  # P(first wins) [N], keys [N] -> label [N]

ENCODER_BUCKET = 32  # tokens; texts are padded to a multiple of it
ENCODER_BATCH = 16  # texts encoded at a time, sorted by length so that short ones pay for short ones


def embed_texts(source: str) -> Callable[[Sequence[str]], np.ndarray]:
    """Returns a function from texts to unit sentence embeddings: masked mean of an encoder's last hidden states.

    Args:
      source: the encoder, anything that `hf.load` takes.

    Returns:
      A function of N texts to [N, d] float32; texts beyond the encoder's positions are cut.

    Raises:
      ValueError: the source is not an encoder.
    """
    loaded = hf.load(source)
    if not isinstance(loaded.config, EncoderConfig):
        raise ValueError(f"config.oracle.encoder={source}: expected a BERT encoder, found a decoder")
    config, words = loaded.config, tokenizer.load(loaded.directory)
    params = jax.device_put(loaded.params)

    @jax.jit
    def embed(tokens: Array, valid: Array) -> Array:
        pooled = encoder.mean_pool(encoder.apply(params, config, tokens, valid, dtype="float32"), valid)
        return pooled / jnp.linalg.norm(pooled, axis=-1, keepdims=True)

    def apply(texts: Sequence[str]) -> np.ndarray:
        ids = [words.encode(text, max_length=config.max_positions) for text in texts]
        order = np.argsort([len(i) for i in ids], kind="stable")
        result = np.zeros((len(ids), config.d_model), np.float32)
        for start in range(0, len(ids), ENCODER_BATCH):
            rows = order[start : start + ENCODER_BATCH]
            length = min(-(-max(len(ids[r]) for r in rows) // ENCODER_BUCKET) * ENCODER_BUCKET, config.max_positions)
            tokens = np.full((ENCODER_BATCH, length), words.pad_id, np.int32)
            valid = np.zeros((ENCODER_BATCH, length), bool)
            valid[:, 0] = True  # rows that hold no text still divide by one token
            for row, r in enumerate(rows):
                tokens[row, : len(ids[r])], valid[row, : len(ids[r])] = ids[r], True
            result[rows] = np.asarray(embed(tokens, valid))[: len(rows)]
        return result

    return apply


def embedding_similarity(source: str) -> Reward:
    """A reward nobody trained: cosine of the embeddings of prompt and response.

    Args:
      source: the encoder, anything that `hf.load` takes.

    Returns:
      A function of N prompts and N responses to [N] float64 in [-1, 1].
    """
    embed = embed_texts(source)
    seen: dict[str, np.ndarray] = {}  # prompts come again in every candidate and evaluation

    def reward(prompts: Sequence[str], responses: Sequence[str]) -> np.ndarray:
        new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in seen]
        vectors = embed([*new, *responses])
        seen.update(zip(new, vectors, strict=False))
        prompt_vectors = np.stack([seen[prompt] for prompt in prompts])
        return (prompt_vectors * vectors[len(new) :]).sum(-1).astype(np.float64)

    return reward


def by_reward(reward: Reward, scale: float) -> Preference:
    """Bradley-Terry preference of a scalar reward: P(first wins) = sigmoid(scale (r(first) - r(second))), Eq. 3.

    Args:
      reward: N prompts and responses -> [N].
      scale: inverse temperature.

    Returns:
      Preference.
    """

    def preference(prompts: Sequence[str], first: Sequence[str], second: Sequence[str]) -> np.ndarray:
        rewards = reward([*prompts, *prompts], [*first, *second])
        count = len(prompts)
        return expit(scale * (rewards[:count] - rewards[count:]))

    return preference


def deterministic(probability: np.ndarray, keys: Array) -> np.ndarray:
    """Labels with the preferred response; exact ties stay one half.

    Args:
      probability: [N], that the first wins.
      keys: not used.

    Returns:
      [N] float64 in {0, 0.5, 1}.
    """
    return (np.sign(probability - 0.5) + 1) / 2


def bradley_terry(probability: np.ndarray, keys: Array) -> np.ndarray:
    """Draws z ~ Ber(P(first wins)).

    Args:
      probability: [N], that the first wins.
      keys: [N] random keys, one per duel, so that a duel's noise does not depend on its neighbours.

    Returns:
      [N] float64 in {0, 1}.
    """
    uniform = np.asarray(jax.vmap(jax.random.uniform)(keys))
    return (uniform < probability).astype(np.float64)


def soft(probability: np.ndarray, keys: Array) -> np.ndarray:
    """Hands the probability itself on as the label.

    Args:
      probability: [N], that the first wins.
      keys: not used.

    Returns:
      [N] float64 in [0, 1].
    """
    return probability


LABELS: Mapping[str, Labels] = {"deterministic": deterministic, "bradley_terry": bradley_terry, "soft": soft}


def labelled(preference: Preference, labels: Labels) -> Oracle:
    """Makes an oracle of a preference and a way to label.

    Args:
      preference: Preference.
      labels: one of LABELS.

    Returns:
      Oracle.

    Raises:
      ValueError (by the oracle): the preference returns a wrong number of values, or one outside [0, 1].
    """

    def oracle(prompts: Sequence[str], first: Sequence[str], second: Sequence[str], keys: Array) -> Judgement:
        probability = np.asarray(preference(prompts, first, second), np.float64)
        if probability.shape != (len(prompts),):
            raise ValueError(f"the oracle was asked about {len(prompts)} pairs and returned shape {probability.shape}")
        if not ((probability >= 0) & (probability <= 1)).all():
            raise ValueError(f"the oracle's probabilities must lie in [0, 1]; found {probability}")
        return Judgement(probability, labels(probability, keys))

    return oracle


def flipped(oracle: Oracle, flip_probability: float) -> Oracle:
    """Wraps any oracle so that each label is exchanged (z -> 1 - z) with a given probability (SEA paper, App. G.4).

    Args:
      oracle: Oracle.
      flip_probability: in [0, 1].

    Returns:
      Oracle whose probabilities are the noise-free ones and whose labels are noisy.
    """

    def noisy(prompts: Sequence[str], first: Sequence[str], second: Sequence[str], keys: Array) -> Judgement:
        own, inner = jnp.unstack(jax.vmap(jax.random.split)(keys), axis=1)
        judgement = oracle(prompts, first, second, inner)
        flip = np.asarray(jax.vmap(jax.random.uniform)(own)) < flip_probability
        return judgement._replace(label=np.where(flip, 1 - judgement.label, judgement.label))

    return noisy
