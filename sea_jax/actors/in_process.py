"""Who writes the responses: the policy itself, in this process, or servers that are given its weights."""

import functools
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from jaxtyping import PRNGKeyArray

from sea_jax.actors import generation
from sea_jax.actors.generation import GenerationConfig
from sea_jax.data import batching
from sea_jax.models import decoder
from sea_jax.models.config import ModelConfig
from sea_jax.types import Candidates, Generate, Params, Prompts, Respond


def at_once(generate: Generate, newest: Callable[[Params, int], tuple[Params, int]]) -> Respond:
    """Answers every batch when it is asked to.

    Args:
      generate: who writes.
      newest: weights and their version -> those that are to write.
    """

    def respond(
        number: int, trained: Params, prompts: Prompts, key: PRNGKeyArray, version: int
    ) -> tuple[Candidates, Mapping[str, float]]:
        weights, of_version = newest(trained, version)
        return generate(weights, prompts, key, of_version), {}

    return respond


def in_process(frozen: Params, config: ModelConfig, sampling: GenerationConfig, batch_size: int = 0) -> Generate:
    """The policy writes in this process; the number of policy steps is not used.

    Args:
      frozen: the frozen part of the policy's parameters.
      config: ModelConfig.
      sampling: GenerationConfig.
      batch_size: prompts that are answered at a time, which bounds the memory of keys and values; 0: all.
    """

    def generate(trained: Params, prompts: Prompts, key: PRNGKeyArray, version: int) -> Candidates:
        write = functools.partial(generation.generate, decoder.join(frozen, trained), config=config, sampling=sampling)
        portions = batching.portions(len(prompts.tokens), batch_size)
        if len(portions) == 1:
            return write(prompts, key)
        parts = [
            write(Prompts(prompts.tokens[rows], prompts.valid[rows]), jax.random.fold_in(key, rows.start))
            for rows in portions
        ]
        return jax.tree.map(lambda *part: jnp.concatenate(part), *parts)

    return generate
