"""A decoder small enough for any test, and the plain way to run it: one sequence at a time, every logit."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from scipy import special

from sea_jax.actors.generation import GenerationConfig
from sea_jax.learner import LearnerConfig
from sea_jax.models import decoder
from sea_jax.models.config import ModelConfig
from sea_jax.models.parameters import ParamSpec
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
)


def draw(abstract: Params, seed: int) -> Params:
    """Random numpy parameters for an abstract tree, large enough for a wrong mask to show; nothing to compile."""
    rng = np.random.default_rng(seed)

    def leaf(path: tuple[Any, ...], spec: ParamSpec) -> np.ndarray:
        noise = rng.normal(size=spec.shape).astype(np.float32)
        return 1 + 0.1 * noise if path[-1].key == "scale" else 0.3 * noise

    return jax.tree_util.tree_map_with_path(leaf, abstract)


def params(seed: int = 0, cuts: tuple[int, ...] = ()) -> Params:
    """Random parameters with their layers divided at the cuts."""
    return jax.device_put(decoder.recut(draw(decoder.abstract(CONFIG), seed), cuts))


def prompts(*lengths: int, length: int = 8, seed: int = 0) -> Prompts:
    """Random prompts of the given lengths, padded on the left with a token that must not matter."""
    tokens = np.random.default_rng(seed).integers(0, CONFIG.vocab_size, (len(lengths), length))
    valid = np.arange(length)[None] >= length - np.array(lengths)[:, None]
    return Prompts(jnp.asarray(tokens, jnp.int32), jnp.asarray(valid))


def prompt_ids(batch: Prompts, row: int) -> list[int]:
    """The tokens of one prompt without padding."""
    return np.asarray(batch.tokens)[row][np.asarray(batch.valid)[row]].tolist()


LENGTH = 24  # sequences are filled up to it behind their end, where nothing before can see it: one program for all


def fill(*sequences: list[int]) -> np.ndarray:
    """Sequences as one array [N, LENGTH]."""
    filled = np.zeros((len(sequences), LENGTH), np.int32)
    for row, tokens in enumerate(sequences):
        filled[row, : len(tokens)] = tokens
    return filled


@partial(jax.jit, static_argnames="num_stacks")
def run(whole: Params, tokens: np.ndarray, num_stacks: int | None = None) -> Array:
    """Hidden states [N, LENGTH, d] of plain sequences behind so many stacks; None: behind the last norm."""
    streams = decoder.embed(whole, CONFIG, jnp.asarray(tokens), jnp.ones(tokens.shape, bool), dtype="float32")
    for stack in whole["stacks"][:num_stacks]:
        streams, _ = decoder.run_stack(stack, CONFIG, streams)
    return decoder.final(whole, CONFIG, streams.prompt) if num_stacks is None else streams.prompt


def hidden_states(whole: Params, tokens: list[int], num_stacks: int | None = None) -> np.ndarray:
    """Hidden states [S, d] of one sequence."""
    return np.asarray(run(whole, fill(tokens), num_stacks))[0, : len(tokens)]


def logits(whole: Params, tokens: list[int]) -> np.ndarray:
    """Logits [S, V] of the token after each token of one sequence."""
    return hidden_states(whole, tokens) @ np.asarray(decoder.unembedding(whole)).T


def response_logprobs(whole: Params, prompt: list[int], response: list[int]) -> np.ndarray:
    """Log-probs [T] of the tokens of one response."""
    logprobs = special.log_softmax(logits(whole, prompt + response), axis=-1)
    return logprobs[np.arange(len(response)) + len(prompt) - 1, response]


def generation_config(**fields: Any) -> GenerationConfig:
    """How responses are drawn in tests: from all tokens, at temperature 1, in float32, features behind the last norm."""
    plain: dict[str, Any] = {
        "temperature": 1.0,
        "top_k": 0,
        "top_p": 1.0,
        "feature_stack": None,
        "frozen_stacks": 0,
        "dtype": "float32",
    }
    return GenerationConfig(**plain | fields)


def learner_config(**fields: Any) -> LearnerConfig:
    """How a policy is optimised in tests: in float32, activations kept, on a schedule of a thousand steps."""
    plain: dict[str, Any] = {"total_steps": 1000, "dtype": "float32", "remat": False, "microbatch_size": 16}
    return LearnerConfig(**plain | fields)
