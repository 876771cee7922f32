"""Online direct alignment: two plain samples, the oracle labels every pair, the policy learns from it; there is no ERM.

Guo et al., "Direct Language Model Alignment from Online AI Feedback" (https://arxiv.org/abs/2402.04792); variant 1 of the SEA
paper's Table 1.
"""

from collections.abc import Iterator
from dataclasses import replace

from sea_jax import sampling
from sea_jax.agent import Agent, FillSlots
from sea_jax.config import RunSettings
from sea_jax.policy import Policy


def online(settings: RunSettings) -> FillSlots:
    """Passive duels; refuses what would need a reward model."""
    if faults := list(needs_a_reward_model(settings)):
        raise ValueError("\n".join(faults))

    def fill(agent: Agent, policy: Policy) -> Agent:
        return replace(agent, rule=sampling.build("passive"), learn_rewards=None, standardise=False)

    return fill


def needs_a_reward_model(settings: RunSettings) -> Iterator[str]:
    """One line per setting that asks for an ERM."""
    exploration = settings.exploration
    for name, found, only in (
        ("exploration.rule", exploration.rule, "passive"),
        ("exploration.width", exploration.width, None),
        ("exploration.gamma", exploration.gamma, 1),
        ("exploration.planning_steps", exploration.planning_steps, 0),
        ("eval.best_of_n", settings.eval.best_of_n, 0),
    ):
        if found != only:
            yield f"config.{name}={found}: method=online has no reward model and takes only {only}"
