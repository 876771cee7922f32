"""Direct alignment from two plain samples, all labelled by the oracle, without an ERM: offline, iterative, online, optimistic.

They differ in how old the policy is that writes: k policy steps (1: online; without end: offline), SEA paper, App. E.
"""

from collections.abc import Mapping
from dataclasses import replace

from sea_jax import sampling
from sea_jax.agent import Agent, FillSlots
from sea_jax.config import RunSettings
from sea_jax.methods.limits import check, exactly
from sea_jax.policy import Policy
from sea_jax.settings import Check
from sea_jax.types import Array, Candidates, Params, Prompts

WITHOUT_REWARD_MODEL: Mapping[str, Check] = {
    "exploration.rule": exactly("passive"),
    "exploration.width": exactly(None),
    "exploration.gamma": exactly(1),
    "exploration.planning_steps": exactly(0),
    "eval.best_of_n": exactly(0),
    "exploration.asked_prompts": exactly(0),
}


def online(settings: RunSettings) -> FillSlots:
    """The newest policy writes (https://arxiv.org/abs/2402.04792); variant 1 of the SEA paper's Table 1."""
    check(settings, "has no reward model", WITHOUT_REWARD_MODEL)
    return passive


def iterative(settings: RunSettings) -> FillSlots:
    """A policy writes that is given the new weights every `actor.sync_every` steps (https://arxiv.org/abs/2312.11456)."""
    needs: Mapping[str, Check] = {"actor.sync_every": (lambda v: v > 1, "2 or more (1 is method=online)")}
    check(settings, "has a policy write that is some steps old", needs)
    return online(settings)


def offline(settings: RunSettings) -> FillSlots:
    """The initial policy writes, as if all pairs had been collected before (https://arxiv.org/abs/2305.18290)."""
    check(settings, "never gives the new weights to who writes", {"actor.sync_every": exactly(1)})
    check(settings, "has no reward model", WITHOUT_REWARD_MODEL)

    def fill(agent: Agent, policy: Policy) -> Agent:
        def respond(
            number: int, trained: Params, prompts: Prompts, key: Array, version: int
        ) -> tuple[Candidates, Mapping[str, float]]:
            return agent.respond(number, policy.reference, prompts, key, 0)

        return replace(passive(agent, policy), respond=respond)

    return fill


def selm(settings: RunSettings) -> FillSlots:
    """Online, with a loss that raises the implicit reward of the policy's own responses (https://arxiv.org/abs/2405.19332)."""
    check(settings, "is optimistic in its loss", {"loss.name": exactly("selm")})
    return online(settings)


def passive(agent: Agent, policy: Policy) -> Agent:
    """Fills the slots: the first two responses that differ, and no ERM."""
    return replace(agent, rule=sampling.build("passive"), learn_rewards=None, standardise=False)
