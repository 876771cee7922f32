"""Efficient Exploration at Scale: labels teach the reward model alone, which teaches the policy (https://arxiv.org/abs/2603.17378)."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import jax
import jax.numpy as jnp

from sea_jax import ensemble, sampling
from sea_jax.agent import Agent, Experience, FillSlots, Planning, Proposal, take_duel
from sea_jax.config import RunSettings
from sea_jax.methods.limits import check, exactly
from sea_jax.methods.sea import planner
from sea_jax.policy import Policy
from sea_jax.settings import Check
from sea_jax.types import Array, Duel, PreferenceBatch

TAKES: Mapping[str, Check] = {
    "exploration.gamma": exactly(1),
    "exploration.asked_prompts": exactly(0),
    "exploration.unfinished": (
        lambda v: v != "lose",
        "asked or left_out, as the policy learns from no labels but the ERM's",
    ),
    "sampling.num_samples": (lambda v: v >= 4, "4 or more, for a second best and a second worst"),
    "learner.anchor_decay": (lambda v: v > 0, "numbers above 0, the average that the policy is held to"),
}


def information_directed(settings: RunSettings) -> FillSlots:
    """One pair per prompt goes to the oracle; the ERM, once it has learnt, labels what the policy learns from.

    On the prompts that were asked about these are the asked pair and best against worst; in the `planning_steps` behind it, on
    fresh prompts, best against worst and second best against second worst.
    """
    check(settings, "has the policy learn from the ERM's labels under a moving reference", TAKES)
    exploration = settings.exploration
    rule = sampling.build(exploration.rule, exploration.width)

    def fill(agent: Agent, policy: Policy) -> Agent:
        fresh = replace(planner(agent), lessons=of_fresh_prompts)
        planning = Planning(fresh, exploration.planning_steps, exploration.planning_after_queries)
        return replace(agent, rule=rule, lessons=of_asked_prompts, policy_learns_late=False, planning=planning)

    return fill


def of_asked_prompts(experience: Experience) -> PreferenceBatch:
    """The asked pair and the ERM's best against its worst."""
    proposal = experience.proposal
    rewards = ensemble.rewards(experience.reward_model, proposal.candidates.features)
    return labelled_by_erm(proposal, rewards, (experience.duel, extremes(rewards, proposal.distinct)))


def of_fresh_prompts(experience: Experience) -> PreferenceBatch:
    """The ERM's best against its worst, and the second best against the second worst."""
    proposal = experience.proposal
    rewards = ensemble.rewards(experience.reward_model, proposal.candidates.features)
    best = extremes(rewards, proposal.distinct)
    return labelled_by_erm(proposal, rewards, (best, extremes(rewards, without(best, proposal.distinct))))


def extremes(rewards: Array, distinct: Array) -> Duel:
    """The best against the worst by the mean of the heads [K, B, M], of those that distinct [B, M, M] lets meet."""
    mean = rewards.mean(0)
    return sampling.best_pair(mean[:, :, None] - mean[:, None, :], distinct)


def without(duel: Duel, distinct: Array) -> Array:
    """Which responses [B, M, M] may meet when a duel's two and their twins no longer do."""
    rows = jnp.arange(distinct.shape[0])
    left = distinct[rows, duel.first] & distinct[rows, duel.second]
    return distinct & left[:, :, None] & left[:, None, :]


def labelled_by_erm(proposal: Proposal, rewards: Array, duels: Sequence[Duel]) -> PreferenceBatch:
    """Several pairs of each prompt, [N B], with the mean over heads of P(first wins); two equal texts teach nothing."""
    candidates, rows = proposal.candidates, jnp.arange(rewards.shape[1])
    differ = [proposal.distinct[rows, duel.first, duel.second] for duel in duels]
    return PreferenceBatch(
        prompts=jax.tree.map(lambda x: jnp.concatenate([x] * len(duels)), proposal.prompts),
        tokens=jnp.concatenate([take_duel(candidates.tokens, duel) for duel in duels]),
        lengths=jnp.concatenate([take_duel(candidates.lengths, duel) for duel in duels]),
        labels=jnp.concatenate([sampling.mean_label(rewards, duel) for duel in duels]),
        weights=jnp.concatenate(differ).astype(jnp.float32),
    )
