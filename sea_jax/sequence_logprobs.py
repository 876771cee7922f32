"""Log-probs of whole responses under the policy and the reference, for the rules that ask for them."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp

from sea_jax import learner
from sea_jax.data import batching
from sea_jax.models import partition
from sea_jax.models.config import ModelConfig
from sea_jax.policy import Policy
from sea_jax.types import Array, Candidates, Params, Prompts


@partial(jax.jit, static_argnames=("config", "dtype"))
def sequence_logprobs(
    frozen: Params,
    trained: tuple[Params, ...],
    prompts: Prompts,
    tokens: Array,
    lengths: Array,
    *,
    config: ModelConfig,
    dtype: str,
) -> tuple[Array, ...]:
    """Returns log pi(y | x) of each response, [B, M] float32, under policies that share their frozen part."""
    token_logprobs = learner.response_logprobs(
        frozen, trained, prompts, tokens, lengths, config=config, remat=False, dtype=dtype
    )
    return tuple(partition.whole(each.sum(-1)) for each in token_logprobs)


def under_policy_and_reference(
    policy: Policy, dtype: str, batch_size: int
) -> Callable[[Params, Prompts, Candidates], tuple[Array, Array]]:
    """Returns what an agent's rules are shown of log-probs.

    Args:
      policy: Policy.
      dtype: compute dtype.
      batch_size: prompts whose responses are read at a time, which bounds the memory of their activations; 0: all.

    Returns:
      Trained parameters, Prompts, Candidates -> [B, M] under the policy and [B, M] under the reference.
    """

    def read(trained: Params, prompts: Prompts, candidates: Candidates) -> tuple[Array, Array]:
        parts = [
            sequence_logprobs(
                policy.frozen,
                (trained, policy.reference),
                Prompts(prompts.tokens[rows], prompts.valid[rows]),
                candidates.tokens[rows],
                candidates.lengths[rows],
                config=policy.config,
                dtype=dtype,
            )
            for rows in batching.portions(len(candidates.tokens), batch_size)
        ]
        own, reference = (jnp.concatenate(column) for column in zip(*parts, strict=True))
        return own, reference

    return read
