"""Methods that a test watches or brings, each a function of the settings: what they need of the step that SEA does not."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from configs import tiny_random
from sea_jax import ensemble, learner, train
from sea_jax.agent import Agent, Experience, FillSlots
from sea_jax.config import RunSettings
from sea_jax.learner import Learner
from sea_jax.methods.apl import apl
from sea_jax.methods.xpo import xpo
from sea_jax.policy import Policy
from sea_jax.types import Array, Candidates, Duel, Params, Prompts

SEEN: list[dict[str, Any]] = []  # what the guest of the running test noted


def run(workdir: Path, method: Callable[..., Any], **fields: Any) -> list[dict[str, Any]]:
    """Trains the tiny configuration with a guest; returns the ledger's lines."""
    SEEN.clear()
    config = tiny_random.get_config()
    config.max_queries, config.eval.every_queries, config.eval.best_of_n = 8, 1000, 0
    config.exploration.planning_steps, config.exploration.gamma = 0, 1.0
    config.oracle.label = "bradley_terry"  # no ties: every pair teaches
    config.method = f"{__name__}:{method.__name__}"
    config.update_from_flattened_dict({name.replace("__", "."): value for name, value in fields.items()})
    train.train(config, workdir)
    return [json.loads(line) for line in (workdir / "queries.jsonl").read_text().splitlines()]


# ---- APL, watched: prompts by predictive entropy, the pair by the implicit reward


def watched_apl(settings: RunSettings) -> FillSlots:
    fill = apl(settings)

    def watched(agent: Agent, policy: Policy) -> Agent:
        def compared(trained: Params, prompts: Prompts, candidates: Candidates) -> tuple[Array, Array]:
            own, reference = agent.logprobs(trained, prompts, candidates)
            np.testing.assert_allclose(own, candidates.logprobs.sum(-1), atol=1e-3)  # the policy wrote them
            return own, reference

        filled = fill(replace(agent, logprobs=compared), policy)
        select, rule = filled.select, filled.rule
        assert select is not None

        def most_uncertain(rewards: Array, distinct: Array, key: Array, *, logprobs: Array) -> Array:
            rows = select(rewards, distinct, key, logprobs=logprobs)
            SEEN.append({"logprobs": np.asarray(logprobs), "rows": np.asarray(rows)})
            return rows

        def widest_gap(
            rewards: Array, distinct: Array, key: Array, *, logprobs: Array, reference_logprobs: Array
        ) -> Duel:
            duel = rule(rewards, distinct, key, logprobs=logprobs, reference_logprobs=reference_logprobs)
            implicit = np.asarray(logprobs - reference_logprobs)
            SEEN[-1] |= {"chosen_from": implicit, "distinct": np.asarray(distinct), "duel": duel}
            return duel

        return replace(filled, select=most_uncertain, rule=widest_gap)

    return watched


@pytest.mark.slow
def test_apl_asks_about_two_of_four_prompts_and_the_widest_implicit_gap(tmp_path: Path) -> None:
    lines = run(tmp_path, watched_apl, exploration__rule="passive", exploration__asked_prompts=2)
    asks = [line for line in lines if line["event"] == "ask"]
    assert len(asks) == 8
    assert len(SEEN) == 4  # steps of two queries each
    for step in SEEN:
        assert step["logprobs"].shape == (4, 4)
        assert set(step["rows"]) == set(np.argsort(step["logprobs"].mean(-1))[:2])
        gap = step["chosen_from"][:, :, None] - step["chosen_from"][:, None, :]
        gap[~step["distinct"]] = -np.inf
        found = gap[np.arange(2), step["duel"].first, step["duel"].second]
        np.testing.assert_array_equal(found, gap.max((1, 2)))
    np.testing.assert_allclose(SEEN[0]["chosen_from"], 0, atol=1e-4)  # the policy is the reference at first
    assert np.abs(SEEN[-1]["chosen_from"]).max() > 1e-3


# ---- XPO, watched: the policy's response against the reference's, with a term on the latter


def watched_xpo(settings: RunSettings) -> FillSlots:
    fill = xpo(settings)

    def watched(agent: Agent, policy: Policy) -> Agent:
        def respond(number: int, trained: Params, prompts: Prompts, key: Array, version: int) -> Any:
            candidates, row = agent.respond(number, trained, prompts, key, version)
            if trained is policy.reference:
                SEEN.append({"reference": agent.texts(candidates)})
            return candidates, row

        return fill(replace(agent, respond=respond), policy)

    return watched


@pytest.mark.slow
def test_xpo_learns_from_samples_of_the_reference(tmp_path: Path) -> None:
    named = {"exploration__rule": "passive", "loss__name": "xpo"}
    lines = run(tmp_path / "with", watched_xpo, **named, loss__alpha=0.5)
    asks = [line for line in lines if line["event"] == "ask"]
    assert len(asks) == 8
    for ask in asks:
        step, row = map(int, ask["key"].split("-"))
        assert ask["second"] in SEEN[step]["reference"][row]
    run(tmp_path / "without", watched_xpo, **named, loss__alpha=0.0)
    optimistic, plain = (
        [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("with", "without")
    )
    assert optimistic[1]["train/loss"] < plain[1]["train/loss"] - 1  # half a log-prob of some eight tokens less
    assert optimistic[1]["train/gradient_norm"] != plain[1]["train/gradient_norm"]


# ---- A policy step on all M responses, with advantages normalised within each prompt's group


def all_responses(experience: Experience) -> tuple[Prompts, Candidates, Array]:
    candidates = experience.proposal.candidates
    reward = ensemble.rewards(experience.reward_model, candidates.features).mean(0)
    return experience.proposal.prompts, candidates, (reward - reward.mean(-1, keepdims=True)) / reward.std(-1)[:, None]


def grouped(settings: RunSettings) -> FillSlots:
    def fill(agent: Agent, policy: Policy) -> Agent:
        @jax.jit
        def logprobs(trained: Params, prompts: Prompts, candidates: Candidates) -> Array:
            (each,) = learner.response_logprobs(
                policy.frozen,
                (trained,),
                prompts,
                candidates.tokens,
                candidates.lengths,
                config=policy.config,
                remat=False,
                dtype="float32",
            )
            return each.sum(-1)

        def learn(state: Learner, lessons: Any) -> tuple[Learner, dict[str, Array]]:
            prompts, candidates, advantages = lessons

            def loss(trained: Params) -> Array:
                return -(advantages * logprobs(trained, prompts, candidates)).mean()

            value, gradient = jax.value_and_grad(loss)(state.trained)
            trained = jax.tree.map(lambda w, g: w - 1e-2 * g, state.trained, gradient)
            SEEN.append({"advantages": np.asarray(advantages), "before": value, "after": loss(trained)})
            return replace(state, trained=trained, step=state.step + 1), {"loss": value}

        return replace(agent, lessons=all_responses, learn_policy=learn)

    return fill


@pytest.mark.slow
def test_a_policy_step_on_whole_groups(tmp_path: Path) -> None:
    run(tmp_path, grouped)
    assert len(SEEN) >= 2
    for step in SEEN:
        assert step["advantages"].shape == (4, 4)
        np.testing.assert_allclose(step["advantages"].mean(-1), 0, atol=1e-5)
        np.testing.assert_allclose(step["advantages"].std(-1), 1, atol=1e-3)
        assert step["after"] < step["before"]
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["misc/gradient_steps"] == len(SEEN)
