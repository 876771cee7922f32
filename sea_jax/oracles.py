"""Who labels a duel. A preference is noise-free taste; an oracle turns it into labels, and wrappers add noise to any oracle."""

import bisect
import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from scipy.special import expit

from sea_jax import batching, tokenizer
from sea_jax.models import decoder, encoder, hf, partition
from sea_jax.models import reward as reward_models
from sea_jax.models.config import EncoderConfig, ModelConfig
from sea_jax.tokenizer import Tokenizer
from sea_jax.types import Array, Judgement, Oracle, Preference

Reward = Callable[[Sequence[str], Sequence[str]], np.ndarray]  # N prompts, N responses -> [N] float64
Labels = Callable[[np.ndarray, Array], np.ndarray]  # P(first wins) [N], keys [N] -> label [N]

ENCODER_BUCKET = 32  # tokens; texts are padded to a multiple of it
ENCODER_BATCH = 16  # texts encoded at a time, sorted by length so that short ones pay for short ones
REWARD_BUCKET = 64  # tokens; texts of a reward model are padded to a multiple of it


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
        raise ValueError(f"expected a BERT encoder, found a {loaded.config.family}")
    config, words = loaded.config, tokenizer.load(loaded.directory)
    params, most = jax.device_put(loaded.params), config.max_positions

    @jax.jit
    def embed(tokens: Array, valid: Array) -> Array:
        pooled = encoder.mean_pool(encoder.apply(params, config, tokens, valid, dtype="float32"), valid)
        return pooled / jnp.linalg.norm(pooled, axis=-1, keepdims=True)

    def apply(texts: Sequence[str]) -> np.ndarray:
        ids = [words.encode(text, max_length=most) for text in texts]
        result = np.zeros((len(ids), config.d_model), np.float32)
        for rows, tokens, valid in batching.by_length(
            ids, batch_size=ENCODER_BATCH, bucket=ENCODER_BUCKET, pad_id=words.pad_id, longest=most
        ):
            valid[:, 0] = True  # rows that hold no text still divide by one token
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


def conversation_encoder(directory: Path, words: Tokenizer, max_tokens: int) -> Callable[[str, str], list[int]]:
    """Returns how a prompt and its response become what a reward model reads.

    They become the turns of user and assistant in its tokenizer's chat template; without a template, one text with a
    space between them, unless there is one, and the EOS behind it (TL;DR models). It ends with the last token that is
    not the padding token of its config.json: there transformers reads the score.

    Args:
      directory: holds the reward model's config.json.
      words: its tokenizer.
      max_tokens: of prompt and response together; the beginning of a longer prompt is cut. A response that alone is
        longer stays whole.

    Returns:
      A function of prompt and response to token ids.
    """
    padding = json.loads((directory / "config.json").read_text(encoding="utf-8")).get("pad_token_id")

    def encode(prompt: str, response: str) -> list[int]:
        def without(dropped: int) -> list[int]:
            return _conversation(words, prompt[dropped:], response)

        ids = without(0)
        if len(ids) > max_tokens:
            # By characters rather than tokens, since a token may be a part of a character.
            ids = without(bisect.bisect_left(range(len(prompt)), True, key=lambda n: len(without(n)) <= max_tokens))
        end = max((i for i, token in enumerate(ids) if token != padding), default=0)
        return ids[: end + 1]

    return encode


def reward_model(source: str, *, dtype: str, batch_size: int, max_tokens: int) -> Reward:
    """The scores of a reward model, a decoder with a scalar head such as Skywork-Reward-Llama-3.1-8B.

    Args:
      source: the reward model, anything that `hf.load` takes.
      dtype: of its matrices and its computation.
      batch_size: texts scored at a time, sorted by length.
      max_tokens: of prompt and response together, see `conversation_encoder`.

    Returns:
      A function of N prompts and N responses to [N] float64.

    Raises:
      ValueError: the source is not a reward model, or its tokenizer does not fit it.
    """
    directory = hf.locate(source)
    config, words = _read(directory)
    params = partition.put(hf.load(directory).params, decoder.abstract(config), dtype)
    encode = conversation_encoder(directory, words, max_tokens)
    score = jax.jit(partial(reward_models.apply, config=config, dtype=dtype))

    def apply(prompts: Sequence[str], responses: Sequence[str]) -> np.ndarray:
        ids = [encode(prompt, response) for prompt, response in zip(prompts, responses, strict=True)]
        result = np.zeros(len(ids), np.float64)
        for rows, tokens, valid in batching.by_length(
            ids, batch_size=batch_size, bucket=REWARD_BUCKET, pad_id=words.pad_id, left=True
        ):
            result[rows] = np.asarray(score(params, tokens=tokens, valid=valid))[: len(rows)]
        return result

    return apply


def remote_reward(score: Callable[[list[list[int]]], np.ndarray], source: str, max_tokens: int) -> Reward:
    """The scores of a reward model that somebody else runs; what it reads is encoded here.

    Args:
      score: token ids of N conversations, without padding -> [N] scores.
      source: the reward model's config.json and tokenizer, found as `hf.load` does; its weights are not needed.
      max_tokens: of prompt and response together, see `conversation_encoder`.

    Returns:
      A function of N prompts and N responses to [N] float64.

    Raises:
      ValueError: the source is not a reward model, or its tokenizer does not fit it.
    """
    directory = hf.locate(source, weights=False)
    _, words = _read(directory)
    encode = conversation_encoder(directory, words, max_tokens)

    def apply(prompts: Sequence[str], responses: Sequence[str]) -> np.ndarray:
        ids = [encode(prompt, response) for prompt, response in zip(prompts, responses, strict=True)]
        scores = np.asarray(score(ids), np.float64)
        if scores.shape != (len(ids),) or not np.isfinite(scores).all():
            raise ValueError(f"the reward model was asked for {len(ids)} finite scores and returned {scores}")
        return scores

    return apply


def _read(directory: Path) -> tuple[ModelConfig, Tokenizer]:
    """Reads what a reward model is, and its tokenizer, which must fit it."""
    config, words = reward_models.check(hf.read_config(directory)), tokenizer.load(directory)
    tokenizer.check(words, config.vocab_size)
    return config, words


def _conversation(words: Tokenizer, prompt: str, response: str) -> list[int]:
    """The token ids of a prompt and its response as a reward model reads them."""
    if words.backend.chat_template:
        turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]
        # The template writes the BOS.
        return words.encode(words.chat(turns, generation_prompt=False), add_special=False)
    apart = prompt[-1:].isspace() or response[:1].isspace()
    ids = words.encode(f"{prompt}{'' if apart else ' '}{response}")
    return ids if ids[-1:] == [words.eos_id] else [*ids, words.eos_id]


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


def probabilities(
    preference: Preference, prompts: Sequence[str], first: Sequence[str], second: Sequence[str]
) -> np.ndarray:
    """Returns what a preference says, which may be anybody's code.

    Args:
      preference: Preference.
      prompts: N.
      first: N responses.
      second: N responses.

    Returns:
      P(first wins), [N] float64.

    Raises:
      ValueError: it returns another number of values, or one outside [0, 1].
    """
    probability = np.asarray(preference(prompts, first, second), np.float64)
    if probability.shape != (len(prompts),):
        raise ValueError(f"the oracle was asked about {len(prompts)} pairs and returned shape {probability.shape}")
    if not ((probability >= 0) & (probability <= 1)).all():
        raise ValueError(f"the oracle's probabilities must lie in [0, 1]; found {probability}")
    return probability


def labelled(preference: Preference, labels: Labels) -> Oracle:
    """Makes an oracle of a preference and a way to label.

    Args:
      preference: Preference; if it has a parameter `keys`, it is given the names of the asks there.
      labels: one of LABELS.

    Returns:
      Oracle.

    Raises:
      ValueError: the preference's `keys` has no default; or (by the oracle) the preference returns a wrong number of
        values, or one outside [0, 1].
    """
    wants_keys = _wants_keys(preference)

    def oracle(
        prompts: Sequence[str], first: Sequence[str], second: Sequence[str], keys: Array, asks: Sequence[str]
    ) -> Judgement:
        names: dict[str, Any] = {"keys": list(asks)} if wants_keys else {}
        probability = probabilities(partial(preference, **names), prompts, first, second)
        return Judgement(probability, labels(probability, keys))

    return oracle


def _wants_keys(preference: Preference) -> bool:
    """Whether a preference takes the names of the asks."""
    try:
        keys = inspect.signature(preference).parameters.get("keys")
    except ValueError:  # some callables written in C tell nothing of their parameters
        return False
    if keys is not None and keys.default is inspect.Parameter.empty:
        raise ValueError(
            f"the oracle's function {getattr(preference, '__name__', preference)}: its parameter `keys` needs a default of "
            "None, since win rates are measured without"
        )
    return keys is not None


def flipped(oracle: Oracle, flip_probability: float) -> Oracle:
    """Wraps any oracle so that each label is exchanged (z -> 1 - z) with a given probability (SEA paper, App. G.4).

    Args:
      oracle: Oracle.
      flip_probability: in [0, 1].

    Returns:
      Oracle whose probabilities are the noise-free ones and whose labels are noisy.
    """

    def noisy(
        prompts: Sequence[str], first: Sequence[str], second: Sequence[str], keys: Array, asks: Sequence[str]
    ) -> Judgement:
        own, inner = jnp.unstack(jax.vmap(jax.random.split)(keys), axis=1)
        judgement = oracle(prompts, first, second, inner, asks)
        flip = np.asarray(jax.vmap(jax.random.uniform)(own)) < flip_probability
        return judgement._replace(label=np.where(flip, 1 - judgement.label, judgement.label))

    return noisy
