"""The learner's own log-probs of responses, whoever wrote them: for rules that ask, and to hold an engine against."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Float32, Int32

from sea_jax import learner
from sea_jax.data import batching
from sea_jax.models import partition
from sea_jax.models.config import ModelConfig
from sea_jax.policy import Policy
from sea_jax.types import Array, Candidates, Params, Prompts

TokenLogprobs = Float32[Array, "B m T"]
SummedLogprobs = Float32[Array, "B M"]


@partial(jax.jit, static_argnames=("config", "dtype"))
def token_logprobs(
    frozen: Params,
    trained: tuple[Params, ...],
    prompts: Prompts,
    tokens: Int32[Array, "B m T"],
    lengths: Int32[Array, "B m"],
    *,
    config: ModelConfig,
    dtype: str,
) -> tuple[TokenLogprobs, ...]:
    """Returns the log-prob of each token, 0 on padding, under policies that share their frozen part."""
    found = learner.response_logprobs(
        frozen, trained, prompts, tokens, lengths, config=config, remat=False, dtype=dtype
    )
    return tuple(partition.whole(each) for each in found)


def under_policy(
    policy: Policy, dtype: str
) -> Callable[[Params, Prompts, Int32[Array, "B m T"], Int32[Array, "B m"]], TokenLogprobs]:
    """Returns the function from trained parameters, prompts, tokens and lengths to the log-prob of each token."""

    def read(
        trained: Params, prompts: Prompts, tokens: Int32[Array, "B m T"], lengths: Int32[Array, "B m"]
    ) -> TokenLogprobs:
        (own,) = token_logprobs(policy.frozen, (trained,), prompts, tokens, lengths, config=policy.config, dtype=dtype)
        return own

    return read


def under_policy_and_reference(
    policy: Policy, dtype: str, batch_size: int
) -> Callable[[Params, Prompts, Candidates], tuple[SummedLogprobs, SummedLogprobs]]:
    """Returns what an agent's rules are shown of log-probs: log pi(y | x) under the policy, and under the reference.

    Args:
      policy: Policy.
      dtype: compute dtype.
      batch_size: prompts whose responses are read at a time, which bounds the memory of their activations; 0: all.
    """

    def read(trained: Params, prompts: Prompts, candidates: Candidates) -> tuple[SummedLogprobs, SummedLogprobs]:
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
