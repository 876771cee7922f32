"""The policy step on groups: literal numbers, and the gradient of an objective that is written out here."""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sea_jax import group_learner, learner
from sea_jax.group_learner import GroupBatch, GroupLoss
from sea_jax.types import Array, Params
from tests.support import tiny

VALID = jnp.array([[[True, True], [True, False]]])
WRITTEN = jnp.array([[[-1.0, -0.5], [-2.0, 0.0]]])


def test_reinforce_weighs_each_response_by_its_advantage():
    found = group_learner.reinforce(WRITTEN, WRITTEN, jnp.array([[0.5, -0.5]]), VALID)
    np.testing.assert_allclose(found, [-(0.5 * -1.5 - 0.5 * -2.0) / 2])


def test_ppo_counts_a_ratio_only_up_to_the_clip_and_always_what_makes_it_worse():
    ratios = jnp.array([[[1.5, 0.5], [0.5, 1.0]]])
    logprobs = WRITTEN + jnp.log(ratios)
    loss = partial(group_learner.ppo, clip=0.2)
    found = loss(logprobs, WRITTEN, jnp.array([[2.0, -1.0]]), VALID)
    np.testing.assert_allclose(found, [-((1.2 * 2 + 0.5 * 2) + 0.8 * -1) / 2], rtol=1e-6)
    gradient = jax.grad(lambda x: loss(x, WRITTEN, jnp.array([[2.0, -1.0]]), VALID).sum())(logprobs)
    np.testing.assert_allclose(gradient, [[[0.0, -0.5 * 2 / 2], [0.0, 0.0]]], rtol=1e-6)


def test_the_first_step_of_ppo_is_that_of_reinforce():
    advantages = jnp.array([[2.0, -1.0]])

    def gradient(loss: GroupLoss) -> Array:
        return jax.grad(lambda x: loss(x, WRITTEN, advantages, VALID).sum())(WRITTEN)

    one, other = gradient(group_learner.reinforce), gradient(partial(group_learner.ppo, clip=0.2))
    np.testing.assert_allclose(jnp.where(VALID, one, 0), other)


def test_an_advantage_is_what_a_reward_is_above_the_mean_of_the_others():
    np.testing.assert_allclose(group_learner.advantages_in_group(jnp.array([[1.0, 2.0, 6.0]])), [[-3.0, -1.5, 4.5]])


@pytest.mark.parametrize(
    ("pessimism", "expected"), [(0.0, 1.0), (1e-3, 1.0), (1.0, -np.log((1 + np.exp(-2)) / 2)), (80.0, 0.0)]
)
def test_pessimism_leads_from_the_mean_of_the_heads_to_the_least(pessimism: float, expected: float):
    heads = jnp.array([[[0.0]], [[2.0]]])
    np.testing.assert_allclose(group_learner.pessimistic(heads, pessimism), [[expected]], atol=1e-2)


def batch(frozen: Any = None) -> GroupBatch:
    rng = np.random.default_rng(3)
    lengths = jnp.array([[6, 2, 3], [1, 5, 4]], jnp.int32)
    logprobs = jnp.where(jnp.arange(6) < lengths[..., None], jnp.asarray(-rng.random((2, 3, 6))), 0.0)
    return GroupBatch(
        prompts=tiny.prompts(8, 3),
        tokens=jnp.asarray(rng.integers(0, tiny.CONFIG.vocab_size, (2, 3, 6)), jnp.int32),
        lengths=lengths,
        logprobs=logprobs.astype(jnp.float32),
        rewards=jnp.array([[0.3, -0.2, 1.1], [0.0, 0.7, -0.4]]),
        weights=jnp.ones(2),
        frozen=frozen,
    )


@pytest.mark.parametrize("name", ["reinforce", "ppo"])
def test_a_step_follows_the_gradient_of_the_reward_less_the_divergence(name: str):
    loss = {"reinforce": group_learner.reinforce, "ppo": partial(group_learner.ppo, clip=0.2)}[name]
    policy, reference, kl, groups = tiny.params(1), tiny.params(0), 0.3, batch()
    config = tiny.learner_config(learning_rate=1e-3, clip_norm=1e9, microbatch_size=1, dtype="float32")

    def logprobs(params: Params, row: int, index: int) -> Array:
        length = int(groups.lengths[row, index])
        response = np.asarray(groups.tokens)[row, index, :length].tolist()
        return jnp.asarray(tiny.response_logprobs(params, tiny.prompt_ids(groups.prompts, row), response))

    expected = []
    for row in range(2):
        kept = [
            float(groups.rewards[row, i])
            - kl * float(groups.logprobs[row, i].sum() - logprobs(reference, row, i).sum())
            for i in range(3)
        ]
        for i in range(3):
            advantage = kept[i] - (sum(kept) - kept[i]) / 2
            new = logprobs(policy, row, i)
            ratio = np.exp(new - groups.logprobs[row, i, : len(new)])
            clipped = np.clip(ratio, 0.8, 1.2)
            gain = {
                "reinforce": advantage * new.sum(),
                "ppo": np.minimum(ratio * advantage, clipped * advantage).sum(),
            }
            expected.append(-float(gain[name]))
    state = learner.init(policy, config)
    after, report = group_learner.update(
        state, {"stacks": ()}, reference, groups, loss=loss, kl=kl, config=tiny.CONFIG, learner_config=config
    )
    np.testing.assert_allclose(report["loss"], np.mean(expected), rtol=1e-4)
    np.testing.assert_allclose(report["reward"], groups.rewards.mean(), rtol=1e-6)
    assert int(after.step) == 1
    again = learner.Learner(after.trained, after.opt_state, after.step)
    _, better = group_learner.update(
        again, {"stacks": ()}, reference, groups, loss=loss, kl=kl, config=tiny.CONFIG, learner_config=config
    )
    assert float(better["loss"]) < float(report["loss"])


def test_groups_without_weight_leave_the_policy_as_it_is():
    config = tiny.learner_config(clip_norm=1e9, microbatch_size=1, dtype="float32")
    state = learner.init(tiny.params(1), config)
    before = jax.tree.map(np.array, state.trained)
    groups = dataclasses.replace(batch(), weights=jnp.zeros(2))
    after, _ = group_learner.update(
        state,
        {"stacks": ()},
        tiny.params(0),
        groups,
        loss=group_learner.reinforce,
        kl=0.1,
        config=tiny.CONFIG,
        learner_config=config,
    )
    jax.tree.map(np.testing.assert_array_equal, before, after.trained)
