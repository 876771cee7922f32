"""A decoder small enough for any test, and the plain way to run it: one sequence at a time, no padding, every logit."""

import jax
import jax.numpy as jnp
import numpy as np

from sea_jax.models import decoder
from sea_jax.models.config import ModelConfig
from sea_jax.types import Array, Params, Prompts

CONFIG = ModelConfig(
    family="llama",
    vocab_size=37,
    d_model=16,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=4,
    d_ff=24,
    activation="silu",
    norm_eps=1e-5,
    max_positions=64,
    tie_embeddings=True,
    init_std=0.3,  # far from uniform: a wrong token, mask or position shows
)


def params(seed: int = 0, cuts: tuple[int, ...] = ()) -> Params:
    """Random parameters with their layers divided at the cuts."""
    return decoder.init(CONFIG, jax.random.key(seed), cuts)


def prompts(*lengths: int, length: int = 8, seed: int = 0) -> Prompts:
    """Random prompts of the given lengths, padded on the left with a token that must not matter."""
    tokens = np.random.default_rng(seed).integers(0, CONFIG.vocab_size, (len(lengths), length))
    valid = np.arange(length)[None] >= length - np.array(lengths)[:, None]
    return Prompts(jnp.asarray(tokens, jnp.int32), jnp.asarray(valid))


def prompt_ids(batch: Prompts, row: int) -> list[int]:
    """The tokens of one prompt without padding."""
    return np.asarray(batch.tokens)[row][np.asarray(batch.valid)[row]].tolist()


def hidden_states(whole: Params, tokens: list[int], num_stacks: int | None = None) -> Array:
    """Hidden states [S, d] of one sequence behind so many stacks; None: behind the last norm."""
    ids = jnp.asarray(tokens, jnp.int32)[None]
    streams = decoder.embed(whole, CONFIG, ids, jnp.ones(ids.shape, bool), dtype="float32")
    for stack in whole["stacks"][:num_stacks]:
        streams, _ = decoder.run_stack(stack, CONFIG, streams)
    return decoder.final(whole, CONFIG, streams.prompt[0]) if num_stacks is None else streams.prompt[0]


def logits(whole: Params, tokens: list[int]) -> Array:
    """Logits [S, V] of the token after each token of one sequence."""
    return hidden_states(whole, tokens) @ decoder.unembedding(whole).T


def response_logprobs(whole: Params, prompt: list[int], response: list[int]) -> Array:
    """Log-probs [T] of the tokens of one response."""
    logprobs = jax.nn.log_softmax(logits(whole, prompt + response), axis=-1)
    return logprobs[jnp.arange(len(response)) + len(prompt) - 1, jnp.asarray(response, jnp.int32)]
