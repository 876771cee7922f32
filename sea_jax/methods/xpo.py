"""XPO: the policy's response meets the reference policy's, with an optimistic loss (https://arxiv.org/abs/2405.21046)."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp

from sea_jax.agent import Agent, FillSlots
from sea_jax.config import RunSettings
from sea_jax.methods.limits import check, exactly
from sea_jax.methods.online import online, passive
from sea_jax.policy import Policy
from sea_jax.types import Array, Candidates, Duel, Params, Prompts


def xpo(settings: RunSettings) -> FillSlots:
    """Algorithm 1; of the DPO losses only, as the paper derives it."""
    check(settings, "is derived from DPO", {"loss.name": exactly("xpo")})
    check(settings, "has the reference policy write in this process", {"actor.kind": exactly("in_process")})
    check(settings, "has the newest policy write", {"actor.sync_every": exactly(1)})
    online(settings)  # what that cannot take, this cannot

    def fill(agent: Agent, policy: Policy) -> Agent:
        def respond(
            number: int, trained: Params, prompts: Prompts, key: Array, version: int
        ) -> tuple[Candidates, Mapping[str, float]]:
            own, metrics = agent.respond(number, trained, prompts, key, version)
            reference, _ = agent.respond(number, policy.reference, prompts, jax.random.fold_in(key, 1), 0)
            return side_by_side(own, reference), metrics

        return replace(passive(agent, policy), respond=respond, rule=policy_against_reference)

    return fill


def side_by_side(own: Candidates, others: Candidates) -> Candidates:
    """Responses to the same prompts, one half behind the other."""

    def join(first: Any, second: Any) -> Any:
        return jax.tree.map(lambda *each: jnp.concatenate(each, axis=1), first, second)

    frozen = None
    if own.frozen is not None and others.frozen is not None:  # of the prompts it is the same
        frozen = replace(own.frozen, responses=join(own.frozen.responses, others.frozen.responses))
    return replace(join(replace(own, frozen=None), replace(others, frozen=None)), frozen=frozen)


def policy_against_reference(rewards: Array, distinct: Array, key: Array) -> Duel:
    """The policy's first response against the first of the reference's, which are the second half, that differs."""
    first = jnp.zeros(distinct.shape[0], jnp.int32)
    differs = distinct[:, 0].at[:, : distinct.shape[1] // 2].set(False)
    return Duel(first=first, second=differs.argmax(-1).astype(jnp.int32))
