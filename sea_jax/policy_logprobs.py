"""The learner's own log-probs of responses, whoever wrote them: for rules that ask, and to hold an engine against."""

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
def token_logprobs(
    frozen: Params,
    trained: tuple[Params, ...],
    prompts: Prompts,
    tokens: Array,
    lengths: Array,
    *,
    config: ModelConfig,
    dtype: str,
) -> tuple[Array, ...]:
    """Returns the log-prob of each token, [B, m, T] float32, 0 on padding, under policies that share their frozen part."""
    found = learner.response_logprobs(
        frozen, trained, prompts, tokens, lengths, config=config, remat=False, dtype=dtype
    )
    return tuple(partition.whole(each) for each in found)


def under_policy(policy: Policy, dtype: str) -> Callable[[Params, Prompts, Array, Array], Array]:
    """Returns trained parameters, Prompts, tokens [B, m, T], lengths [B, m] -> log-probs [B, m, T]."""

    def read(trained: Params, prompts: Prompts, tokens: Array, lengths: Array) -> Array:
        (own,) = token_logprobs(policy.frozen, (trained,), prompts, tokens, lengths, config=policy.config, dtype=dtype)
        return own

    return read


def under_policy_and_reference(
    policy: Policy, dtype: str, batch_size: int
) -> Callable[[Params, Prompts, Candidates], tuple[Array, Array]]:
    """Returns what an agent's rules are shown of log-probs.

    Args:
      policy: Policy.
      dtype: compute dtype.
      batch_size: prompts whose responses are read at a time, which bounds the memory of their activations; 0: all.

    Returns:
      Trained parameters, Prompts, Candidates -> log pi(y | x) [B, M] under the policy, and [B, M] under the reference.
    """

    def read(trained: Params, prompts: Prompts, candidates: Candidates) -> tuple[Array, Array]:
        parts = [
            token_logprobs(
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
        own, reference = (jnp.concatenate([each.sum(-1) for each in column]) for column in zip(*parts, strict=True))
        return own, reference

    return read
