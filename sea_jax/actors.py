"""Who writes the responses: the policy itself, in this process."""

from collections.abc import Callable

from sea_jax import generation, learner
from sea_jax.generation import SamplingConfig
from sea_jax.models.config import ModelConfig
from sea_jax.types import Array, Candidates, Params, Prompts

Generate = Callable[[Params, Prompts, Array], Candidates]


def in_process(frozen: Params, config: ModelConfig, sampling: SamplingConfig) -> Generate:
    """The policy writes in this process.

    Args:
      frozen: the frozen part of the policy's parameters.
      config: ModelConfig.
      sampling: SamplingConfig.

    Returns:
      A function of the trained parameters, Prompts and a key to Candidates.
    """

    def generate(trained: Params, prompts: Prompts, key: Array) -> Candidates:
        return generation.generate(learner.join(frozen, trained), prompts, key, config=config, sampling=sampling)

    return generate
