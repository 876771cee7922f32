"""SEA: Thompson sampling picks the duel, the oracle and the ERM share the labelling (https://arxiv.org/abs/2411.01493)."""

import math
from collections.abc import Mapping
from dataclasses import replace

import jax
import jax.numpy as jnp

from sea_jax import sampling
from sea_jax.agent import Agent, Assign, Assignment, ExplorationSettings, FillSlots, Planning, Proposal
from sea_jax.config import RunSettings
from sea_jax.methods.limits import check, exactly
from sea_jax.policy import Policy
from sea_jax.settings import Check
from sea_jax.types import Array, Duel


def sea(settings: RunSettings) -> FillSlots:
    """Algorithm 2 with any duel rule, and policy steps in between that only the ERM labels (Dyna)."""
    check(settings, "asks about every prompt", {"exploration.asked_prompts": exactly(0)})
    exploration = settings.exploration
    rule = sampling.build(exploration.rule, exploration.width)

    def fill(agent: Agent, policy: Policy) -> Agent:
        asking = replace(agent, rule=rule, assign=shared(exploration))
        if not exploration.planning_steps:
            return asking
        return replace(
            asking, planning=Planning(planner(agent), exploration.planning_steps, exploration.planning_after_queries)
        )

    return fill


def dyna(settings: RunSettings) -> FillSlots:
    """Planning in place of mixing: the oracle labels every duel, and the ERM the policy steps behind it (SEA paper, App. C)."""
    steps: Check = (lambda v: v > 0, "1 or more")
    check(settings, "plans", {"exploration.gamma": exactly(1), "exploration.planning_steps": steps})
    return sea(settings)


def planner(agent: Agent) -> Agent:
    """Nobody is asked, the ERM learns nothing: its mean's best response against its worst, softly labelled by its heads."""
    return replace(agent, rule=sampling.best_against_worst, assign=all_to_erm, learn_rewards=None, standardise=False)


def all_to_erm(proposal: Proposal, duel: Duel, queries: int, keys: Mapping[str, Array]) -> Assignment:
    """Every duel is labelled by the mean over heads of P(first wins)."""
    everybody = jnp.ones(duel.first.shape, bool)
    return Assignment(duel, ~everybody, everybody, sampling.mean_label(proposal.rewards, duel))


def shared(exploration: ExplorationSettings) -> Assign:
    """Mixed preference learning (Eq. 9): the oracle labels a duel with probability gamma, else the ERM labels a pair."""

    def assign(proposal: Proposal, duel: Duel, queries: int, keys: Mapping[str, Array]) -> Assignment:
        gamma = exploration.gamma if queries >= exploration.burn_in_queries else 1.0
        draws = jax.random.uniform(keys["gamma"], duel.first.shape)
        if exploration.erm_share == "fixed":
            num_erm = math.floor((1 - gamma) * len(draws) + 1e-9)  # a tenth of ten is one, also in binary
            num_oracle = len(draws) - num_erm
            oracle_turn = draws.argsort().argsort() < num_oracle
        else:
            oracle_turn = draws < gamma
        erm_duel, erm_labels = erm_pair(exploration, proposal, duel, keys["head"])
        chosen = jax.tree.map(lambda own, erm: jnp.where(oracle_turn, own, erm), duel, erm_duel)
        return Assignment(chosen, oracle_turn, ~oracle_turn, erm_labels)

    return assign


def erm_pair(exploration: ExplorationSettings, proposal: Proposal, duel: Duel, key: Array) -> tuple[Duel, Array]:
    """The pair that the ERM labels in each row, and its label [B]."""
    rewards = proposal.rewards
    if exploration.erm_pair == "max_margin":
        duel = sampling.max_margin(rewards, proposal.distinct, key)
        label = jnp.ones(duel.first.shape, jnp.float32)  # the head that chose the pair prefers its first response
    else:
        label = sampling.head_label(rewards, duel, key)
    return duel, sampling.mean_label(rewards, duel) if exploration.erm_label == "mean" else label
