"""APL: prompts by predictive entropy, pairs by the gap of the implicit reward (https://arxiv.org/abs/2402.08114)."""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial

import jax

from sea_jax import sampling
from sea_jax.agent import Agent, FillSlots
from sea_jax.config import RunSettings
from sea_jax.methods.limits import check, exactly
from sea_jax.methods.online import WITHOUT_REWARD_MODEL, passive
from sea_jax.policy import Policy
from sea_jax.settings import Check
from sea_jax.types import Array, Duel


def apl(settings: RunSettings) -> FillSlots:
    """Active preference learning; with `exploration.asked_prompts` at 0 it chooses pairs alone."""
    asked, batch_size = settings.exploration.asked_prompts, settings.data.batch_size
    size = settings.learner.microbatch_size
    prompts: Mapping[str, Check] = {
        "exploration.asked_prompts": (
            lambda v: v <= batch_size and v % size == 0,
            f"multiples of learner.microbatch_size={size} up to data.batch_size={batch_size}, or 0 for all",
        )
    }
    check(settings, "has no reward model", {**WITHOUT_REWARD_MODEL, **prompts})
    check(settings, "reads DPO's implicit reward", {"loss.name": exactly("dpo")})

    def fill(agent: Agent, policy: Policy) -> Agent:
        select = jax.jit(partial(most_uncertain, count=asked)) if asked else None
        return replace(passive(agent, policy), select=select, rule=jax.jit(widest_implicit_gap))

    return fill


def most_uncertain(rewards: Array, distinct: Array, key: Array, *, logprobs: Array, count: int = 0) -> Array:
    """The prompts with the highest predictive entropy, the mean over responses of -log pi(y | x)."""
    return jax.lax.top_k(-logprobs.mean(-1), count)[1]


def widest_implicit_gap(
    rewards: Array, distinct: Array, key: Array, *, logprobs: Array, reference_logprobs: Array
) -> Duel:
    """The pair whose implicit rewards, beta (log pi - log pi_ref), lie furthest apart, whatever beta is."""
    implicit = logprobs - reference_logprobs
    return sampling.best_pair(implicit[:, :, None] - implicit[:, None, :], distinct)
