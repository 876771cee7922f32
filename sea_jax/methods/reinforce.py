"""RLHF through the learned reward (SEA paper, Fig. 2a): the oracle teaches the ERM, whose rewards move the policy."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial

from sea_jax import ensemble, group_learner, learner, sampling
from sea_jax.agent import Agent, Experience, FillSlots, Planning
from sea_jax.config import RunSettings
from sea_jax.group_learner import GroupBatch, GroupLoss, GroupSettings
from sea_jax.learner import Learner
from sea_jax.methods.limits import check, exactly
from sea_jax.methods.sea import planner
from sea_jax.policy import Policy
from sea_jax.settings import Check
from sea_jax.types import Array

TAKES: Mapping[str, Check] = {
    "exploration.gamma": exactly(1),
    "exploration.asked_prompts": exactly(0),
    "exploration.unfinished": (lambda v: v != "lose", "asked or left_out, as the policy learns from rewards alone"),
    "sampling.num_samples": (lambda v: v >= 2, "2 or more, which are one another's baseline"),
    "loss.name": exactly("dpo"),  # the default: another would be passed over
}


LOSSES: Mapping[str, Callable[[GroupSettings], GroupLoss]] = {
    "reinforce": lambda _: group_learner.reinforce,
    "ppo": lambda group: partial(group_learner.ppo, clip=group.clip),
}


def reinforce(settings: RunSettings) -> FillSlots:
    """REINFORCE with the other responses to a prompt as the baseline (https://arxiv.org/abs/2402.14740)."""
    return _on_groups(settings, LOSSES["reinforce"](settings.group), epochs=1)


def ppo(settings: RunSettings) -> FillSlots:
    """PPO's clipped ratio, several policy steps on each batch (https://arxiv.org/abs/1707.06347), without a value head."""
    check(settings, "takes several policy steps at a time", {"actor.lag": exactly(0), "actor.sync_every": exactly(1)})
    return _on_groups(settings, LOSSES["ppo"](settings.group), settings.group.epochs)


def _on_groups(settings: RunSettings, loss: GroupLoss, epochs: int) -> FillSlots:
    check(settings, "has the policy learn from the rewards of all responses", TAKES)
    exploration = settings.exploration
    rule = sampling.build(exploration.rule, exploration.width)
    learner_config = learner.configured(
        settings.learner, total_steps=settings.policy_steps * epochs, dtype=settings.policy.dtype
    )

    def lessons(experience: Experience) -> GroupBatch:
        proposal, candidates = experience.proposal, experience.proposal.candidates
        rewards = ensemble.rewards(experience.reward_model, candidates.features)
        return GroupBatch(
            prompts=proposal.prompts,
            tokens=candidates.tokens,
            lengths=candidates.lengths,
            logprobs=candidates.logprobs,
            rewards=group_learner.pessimistic(rewards, settings.group.pessimism),
            weights=proposal.distinct.any((1, 2)).astype(rewards.dtype),  # M times the same text teach nothing
            frozen=candidates.frozen,
        )

    def fill(agent: Agent, policy: Policy) -> Agent:
        def learn(state: Learner, batch: GroupBatch) -> tuple[Learner, dict[str, Array]]:
            rows = learner.count_rows(batch.prompts, batch.tokens, batch.lengths, learner_config.microbatch_size)
            for _ in range(epochs):
                state, report = group_learner.update(
                    state,
                    policy.frozen,
                    policy.reference,
                    batch,
                    loss=loss,
                    kl=settings.group.kl,
                    config=policy.config,
                    learner_config=learner_config,
                    rows=rows,
                )
            return state, report

        asking = replace(agent, rule=rule, lessons=lessons, learn_policy=learn, policy_learns_late=False)
        if not exploration.planning_steps:
            return asking
        fresh = planner(asking)
        return replace(asking, planning=Planning(fresh, exploration.planning_steps, exploration.planning_after_queries))

    return fill
