"""Who writes the responses: the policy itself, in this process."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from sea_jax import generation, learner
from sea_jax.generation import SamplingConfig
from sea_jax.models.config import ModelConfig
from sea_jax.types import Array, Candidates, Params, Prompts

Generate = Callable[[Params, Prompts, Array, int], Candidates]
"""Trained parameters, prompts, key, and how many policy steps made the parameters -> candidates."""


def in_process(frozen: Params, config: ModelConfig, sampling: SamplingConfig, batch_size: int = 0) -> Generate:
    """The policy writes in this process.

    Args:
      frozen: the frozen part of the policy's parameters.
      config: ModelConfig.
      sampling: SamplingConfig.
      batch_size: prompts that are answered at a time, which bounds the memory of keys and values; 0: all.

    Returns:
      Generate; the number of policy steps is not used.
    """

    def generate(trained: Params, prompts: Prompts, key: Array, version: int) -> Candidates:
        params = learner.join(frozen, trained)
        count = len(prompts.tokens)
        if not 0 < batch_size < count:
            return generation.generate(params, prompts, key, config=config, sampling=sampling)
        parts = [
            generation.generate(
                params,
                jax.tree.map(lambda x, start=start: x[start : start + batch_size], prompts),
                jax.random.fold_in(key, start),
                config=config,
                sampling=sampling,
            )
            for start in range(0, count, batch_size)
        ]
        return jax.tree.map(lambda *part: jnp.concatenate(part), *parts)

    return generate
