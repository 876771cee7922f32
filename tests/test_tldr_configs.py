"""The TL;DR configurations: the paper's numbers in one, the authors' code's departures in the other, and what they mean."""

import dataclasses
import math
from dataclasses import replace
from fractions import Fraction
from types import ModuleType, SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from configs import tldr, tldr_oat
from sea_jax import config as configuration
from sea_jax import sampling
from sea_jax.agent import ExplorationSettings, named_keys
from sea_jax.ensemble import EnsembleSettings
from sea_jax.methods.sea import shared

SIZES = ("1b", "2.8b", "6.9b")

PAPER = {
    "max_queries": 50_000,
    "policy.dtype": "bfloat16",
    "data.path": "lkevinzc/tldr-with-sft-reference",
    "data.num_prompts": 50_000,
    "data.max_prompt_tokens": 1024,
    "data.batch_size": 128,
    "sampling.num_samples": 20,
    "sampling.max_new_tokens": 53,
    "sampling.temperature": 0.7,
    "sampling.top_k": 0,
    "sampling.top_p": 1.0,
    "exploration.rule": "bai_ts",
    "exploration.gamma": 0.7,
    "exploration.burn_in_queries": 1000,
    "exploration.erm_share": "drawn",
    "exploration.erm_pair": "duel",
    "exploration.erm_label": "head",
    "exploration.planning_steps": 0,
    "erm.trunk": "llm-blender/PairRM-hf",
    "erm.standardise": False,
    "erm.num_heads": 20,
    "erm.hidden_size": 128,
    "erm.learning_rate": 1e-3,
    "erm.weight_decay": 5e-5,
    "erm.anchor_strength": 0.5,
    "erm.anchor": "prior",
    "erm.nll": "sum",
    "erm.steps": 5,
    "erm.batch_size": 128,
    "erm.replay_capacity": 50_000,
    "loss.name": "dpo",
    "loss.beta": None,  # DPO's own default, 0.1
    "loss.length_averaged": None,
    "learner.learning_rate": 5e-7,
    "learner.warmup_fraction": 0.03,
    "learner.final_fraction": 0.1,
    "learner.b1": 0.9,
    "learner.b2": 0.95,
    "learner.weight_decay": 0.0,
    "learner.clip_norm": 1.0,
    "oracle.kind": "reward_model",
    "oracle.reward_model": "Skywork/Skywork-Reward-Llama-3.1-8B",
    "oracle.scale": 1.0,
    "oracle.label": "bradley_terry",
    "oracle.flip_probability": 0.0,
    "eval.num_prompts": 1000,
}

DEPARTURES = {
    "exploration.rule": "bai_ts_oat",
    "oracle.label": "deterministic",
    "exploration.erm_share": "fixed",
    "exploration.erm_pair": "max_margin",
    "erm.anchor": "mean",
    "erm.nll": "mean",
}


def fields(module: ModuleType, *size: str) -> dict[str, Any]:
    return configuration.flatten(module.get_config(*size).to_dict())


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("module", [tldr, tldr_oat])
def test_every_size_is_valid_and_names_its_policy_and_that_policys_responses(module: ModuleType, size: str) -> None:
    config = module.get_config(size)
    configuration.resolve(config)
    assert config.policy.source == f"trl-lib/pythia-{size}-deduped-tldr-sft"
    assert config.data.reference_field == f"pythia-{size}-reference"


@pytest.mark.parametrize("module", [tldr, tldr_oat])
def test_an_unknown_size_is_one_error_that_names_those_there_are(module: ModuleType) -> None:
    with pytest.raises(ValueError, match=r"^configs/tldr.*:13b: the sizes are 1b, 2\.8b, 6\.9b$"):
        module.get_config("13b")


@pytest.mark.parametrize("size", SIZES)
def test_the_numbers_are_the_papers(size: str) -> None:
    found = fields(tldr, size)
    assert {name: found[name] for name in PAPER} == PAPER
    assert found["eval.max_new_tokens"] > 53  # longer than in training


@pytest.mark.parametrize("size", SIZES)
def test_the_authors_code_departs_in_these_fields_and_no_others(size: str) -> None:
    paper, authors = fields(tldr, size), fields(tldr_oat, size)
    assert paper.keys() == authors.keys()
    differing = {name: value for name, value in authors.items() if value != paper[name]}
    assert differing == DEPARTURES | {"name": f"tldr-oat-{size}"}
    assert fields(tldr)["name"] == "tldr-1b"
    assert fields(tldr_oat)["name"] == "tldr-oat-1b"


def test_the_departures_reach_the_parts_of_a_run() -> None:
    paper, authors = tldr.get_config(), tldr_oat.get_config()
    heads = [field.name for field in dataclasses.fields(EnsembleSettings)]
    for config, departures in ((paper, {}), (authors, {"anchor": "mean", "nll": "mean"})):
        found = {name: getattr(configuration.resolve(config).erm, name) for name in heads}
        assert found == dataclasses.asdict(EnsembleSettings()) | departures
    departing: dict[str, Any] = {"erm_share": "fixed", "erm_pair": "max_margin", "rule": "bai_ts_oat"}
    assert exploration(authors) == replace(exploration(paper), **departing)


def exploration(config: Any) -> ExplorationSettings:
    return configuration.resolve(config).exploration


def left_to_the_erm(config: ExplorationSettings, num_prompts: int, queries: int, seed: int) -> np.ndarray:
    """Which prompts [B] the ERM labels after so many queries; the oracle labels all others."""
    distinct = np.broadcast_to(~np.eye(3, dtype=bool), (num_prompts, 3, 3))
    rewards = jnp.zeros((1, num_prompts, 3))
    proposal: Any = SimpleNamespace(distinct=jnp.asarray(distinct), rewards=rewards)
    duel = sampling.passive(rewards, proposal.distinct, jax.random.key(0))
    assignment = shared(config)(proposal, duel, queries, named_keys(jax.random.key(seed)))
    np.testing.assert_array_equal(assignment.to_oracle, ~assignment.to_erm)
    return np.asarray(assignment.to_erm)


@settings(max_examples=50, deadline=None)
@given(num_prompts=st.sampled_from([7, 20]), percent=st.integers(1, 100), seed=st.integers(0, 2**31 - 1))
def test_a_fixed_share_is_a_fixed_number_after_the_burn_in_and_none_before(num_prompts, percent, seed):
    config = replace(exploration(tldr.get_config()), gamma=percent / 100, erm_share="fixed")
    assert not left_to_the_erm(config, num_prompts, 999, seed).any()
    expected = math.floor(Fraction(100 - percent, 100) * num_prompts)
    assert left_to_the_erm(config, num_prompts, 1000, seed).sum() == expected


def test_of_128_prompts_the_erm_gets_38_at_random_where_its_share_is_fixed_and_more_or_fewer_where_it_is_drawn() -> (
    None
):
    fixed, drawn = (
        np.array([left_to_the_erm(exploration(config), 128, 1000, seed) for seed in range(20)])
        for config in (tldr_oat.get_config(), tldr.get_config())
    )
    assert set(fixed.sum(1)) == {38}
    assert fixed.any(0).mean() > 0.95  # a prompt misses all 20 with probability 0.0009
    assert len(set(drawn.sum(1))) > 3
    assert drawn.mean() == pytest.approx(0.3, abs=0.04)
