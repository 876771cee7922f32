"""How methods fill the slots of an agent, and what they refuse: nothing is loaded or compiled."""

import dataclasses
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import quickstart
from sea_jax import config as configuration
from sea_jax import ensemble, sampling, wiring
from sea_jax.agent import Agent, Experience, Proposal, labelled_duels
from sea_jax.config import RunSettings
from sea_jax.ensemble import EnsembleSettings
from sea_jax.methods import information_directed
from sea_jax.types import Candidates, Duel

WRITTEN: list[Any] = []


def respond(number: int, trained: Any, prompts: Any, key: Any, version: int) -> Any:
    WRITTEN.append((trained, version))
    return "candidates", {}


def filled(name: str, **fields: Any) -> Agent:
    """A method's agent, of slots that are not called."""
    empty: dict[str, Any] = {field.name: None for field in dataclasses.fields(Agent)}
    passive = Agent(**empty | {"respond": respond, "learn_rewards": "the ERM", "learn_policy": "the policy"})
    policy: Any = SimpleNamespace(reference="reference")
    return wiring.method(settings(name, **fields))(dataclasses.replace(passive, lessons=labelled_duels), policy)


def settings(name: str, **fields: Any) -> RunSettings:
    config = quickstart.get_config(name)
    config.update_from_flattened_dict({field.replace("__", "."): value for field, value in fields.items()})
    return configuration.resolve(config)


@pytest.mark.parametrize(
    ("name", "writes", "reward_model", "policy_learns", "planning_steps"),
    [
        ("online", ("newest", 7), False, True, 0),
        ("offline", ("reference", 0), False, True, 0),
        ("iterative", ("newest", 7), False, True, 0),
        ("selm", ("newest", 7), False, True, 0),
        ("apl", ("newest", 7), False, True, 0),
        ("sea", ("newest", 7), True, True, 0),
        ("dyna", ("newest", 7), True, True, 3),
        ("information_directed", ("newest", 7), True, True, 1),
        ("reinforce", ("newest", 7), True, True, 0),
        ("ppo", ("newest", 7), True, True, 0),
        ("variant1", ("newest", 7), False, True, 0),
        *((f"variant{number}", ("newest", 7), True, True, 0) for number in range(2, 7)),
        ("variant7", ("newest", 7), True, False, 0),
    ],
)
def test_who_writes_and_what_learns(name, writes, reward_model, policy_learns, planning_steps):
    agent: Any = filled(name)
    WRITTEN.clear()
    agent.respond(3, "newest", None, jax.random.key(0), 7)
    assert [writes] == WRITTEN
    assert (agent.learn_rewards is not None) == reward_model
    assert (agent.learn_policy is not None) == policy_learns
    assert (agent.planning.steps if agent.planning else 0) == planning_steps
    if agent.planning:
        assert agent.planning.agent.learn_rewards is None


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        (
            "offline",
            {"actor__sync_every": 2},
            r"config\.actor\.sync_every=2: method=offline never gives .* takes only 1",
        ),
        (
            "iterative",
            {"actor__sync_every": 1},
            r"config\.actor\.sync_every=1: .* takes only 2 or more \(1 is method=online\)",
        ),
        (
            "apl",
            {"exploration__asked_prompts": 24},
            r"config\.exploration\.asked_prompts=24: .* multiples of .*=16",
        ),
        (
            "apl",
            {"loss__name": "ipo"},
            r"config\.loss\.name=ipo: method=apl reads DPO's implicit reward and takes only dpo",
        ),
        ("xpo", {"loss__name": "dpo"}, r"config\.loss\.name=dpo: method=xpo is derived from DPO and takes only xpo"),
        (
            "online",
            {"loss__name": "xpo"},
            r"config\.loss\.name=xpo: method=online has no responses of the reference policy",
        ),
        (
            "selm",
            {"loss__name": "slic"},
            r"config\.loss\.name=slic: method=selm is optimistic in its loss and takes only selm",
        ),
        (
            "reinforce",
            {"loss__name": "ipo", "exploration__unfinished": "lose"},
            r"config\.exploration\.unfinished=lose: .* rewards alone\nconfig\.loss\.name=ipo: .* takes only dpo",
        ),
        (
            "ppo",
            {"actor__sync_every": 2},
            r"config\.actor\.sync_every=2: method=ppo takes several policy steps at a time",
        ),
        ("dyna", {"exploration__gamma": 0.7}, r"config\.exploration\.gamma=0\.7: method=dyna plans and takes only 1"),
        (
            "sea",
            {"exploration__asked_prompts": 8},
            r"config\.exploration\.asked_prompts=8: method=sea asks about every prompt",
        ),
        (
            "information_directed",
            {"sampling__num_samples": 3, "learner__anchor_decay": 0.0},
            r"config\.sampling\.num_samples=3: .* 4 or more, .*\nconfig\.learner\.anchor_decay=0\.0: .* above 0",
        ),
        (
            "variant7",
            {"exploration__rule": "passive", "eval__best_of_n": 0},
            r"config\.exploration\.rule=passive: method=variant7 is row 7 .*\nconfig\.eval\.best_of_n=0: .* 2 or more",
        ),
        (
            "information_directed",
            {"exploration__unfinished": "lose"},
            r"config\.exploration\.unfinished=lose: .* left_out",
        ),
        ("variant3", {"exploration__gamma": 1.0}, r"config\.exploration\.gamma=1\.0: .*row 3 of Table 1.* below 1"),
        ("variant2", {"eval__best_of_n": 4}, r"config\.eval\.best_of_n=4: .* takes only 0"),
    ],
)
def test_what_a_method_cannot_take_is_one_line_each(name, fields, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        wiring.method(settings(name, **fields))


# ---- The information-directed method's lessons


def experience(rewards: np.ndarray, distinct: np.ndarray, duel: Duel) -> Experience:
    """What one head that reads its reward off the features makes of [B, M] rewards; token m everywhere in response m."""
    num_prompts, num_candidates = rewards.shape
    erm = ensemble.init(EnsembleSettings(num_heads=1, hidden_size=2), 1, jax.random.key(0))
    heads = {  # relu(x) - relu(-x) = x
        "w1": jnp.array([[[1.0, -1.0]]]),
        "b1": jnp.zeros((1, 2)),
        "w2": jnp.eye(2)[None],
        "b2": jnp.zeros((1, 2)),
        "w3": jnp.array([[1.0, -1.0]]),
        "b3": jnp.zeros(1),
    }
    numbers = jnp.broadcast_to(jnp.arange(num_candidates, dtype=jnp.int32), rewards.shape)
    candidates = Candidates(
        tokens=numbers[..., None],
        lengths=numbers + 1,
        logprobs=jnp.zeros((*rewards.shape, 1)),
        features=jnp.asarray(rewards)[..., None],
    )
    proposal = Proposal(
        batch={"tokens": jnp.arange(num_prompts, dtype=jnp.int32)[:, None], "valid": jnp.ones((num_prompts, 1), bool)},
        candidates=candidates,
        texts=[],
        distinct=jnp.asarray(distinct),
        finished=jnp.ones(rewards.shape, bool),
        rewards=jnp.zeros((1, *rewards.shape)),  # what the ERM thought before it learnt is not what it teaches
        seen={},
    )
    nobody = jnp.zeros(num_prompts)
    return Experience(proposal, duel, nobody, nobody > 0, dataclasses.replace(erm, heads=heads))


REWARDS = np.array([[0.0, 3.0, 1.0, -2.0], [1.0, 1.0, 0.0, 1.0]], np.float32)
GROUPS = np.array([[0, 1, 2, 3], [5, 5, 6, 5]])  # all that the second prompt has is two texts
DISTINCT = GROUPS[:, :, None] != GROUPS[:, None, :]
ASKED = Duel(first=jnp.array([0, 2], jnp.int32), second=jnp.array([2, 3], jnp.int32))


def sigmoid(x: float) -> float:
    return float(1 / (1 + np.exp(-x)))


def test_asked_prompts_teach_the_asked_pair_and_best_against_worst_as_the_erm_now_labels_them():
    lessons = information_directed.of_asked_prompts(experience(REWARDS, DISTINCT, ASKED))
    np.testing.assert_array_equal(lessons.tokens[..., 0], [[0, 2], [2, 3], [1, 3], [0, 2]])
    np.testing.assert_array_equal(lessons.lengths, [[1, 3], [3, 4], [2, 4], [1, 3]])
    np.testing.assert_array_equal(lessons.prompts.tokens[:, 0], [0, 1, 0, 1])
    np.testing.assert_allclose(lessons.labels, [sigmoid(-1), sigmoid(-1), sigmoid(5), sigmoid(1)], rtol=1e-6)
    np.testing.assert_array_equal(lessons.weights, [1, 1, 1, 1])


def test_fresh_prompts_teach_best_against_worst_and_the_second_of_either():
    lessons = information_directed.of_fresh_prompts(experience(REWARDS, DISTINCT, ASKED))
    np.testing.assert_array_equal(lessons.tokens[:3, :, 0], [[1, 3], [0, 2], [2, 0]])
    np.testing.assert_allclose(lessons.labels[:3], [sigmoid(5), sigmoid(1), sigmoid(1)], rtol=1e-6)
    np.testing.assert_array_equal(lessons.weights, [1, 1, 1, 0])  # the second prompt has no third text


def test_the_agent_of_fresh_prompts_asks_nobody():
    planning = filled("information_directed").planning
    assert planning is not None
    proposal = experience(REWARDS, DISTINCT, ASKED).proposal
    assignment = planning.agent.assign(proposal, ASKED, 0, {})
    assert not bool(assignment.to_oracle.any())
    assert planning.agent.rule is sampling.best_against_worst
