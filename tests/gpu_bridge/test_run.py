"""SEA through real servers: like a run in this process, and on to the same numbers whatever is killed on the way."""

import json
from pathlib import Path
from typing import Any

import ml_collections
import pytest

from configs import tiny_random
from gpu_bridge import protocol
from sea_jax import agent, train
from sea_jax.runtime import cache
from tests.support.cut import train_and_cut
from tests.support.engines import PYTHON, TOKEN, Server, kill_engine

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not PYTHON.exists(), reason="`make bridge` has not been run"),
    pytest.mark.parametrize("policy", ["tiny-random-llama"], indirect=True),
    pytest.mark.parametrize("oracle", ["vllm"], indirect=True),
]
GAP = 1e-3  # nats per token; both compute in float32


@pytest.fixture(autouse=True)
def _token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(protocol.TOKEN_VARIABLE, TOKEN)
    cache.keep_compiled_programs()


def configured(policy: tuple[Server, Path], oracle: tuple[Server, Path], **fields: Any) -> ml_collections.ConfigDict:
    """The tiny configuration with responses and labels from the servers."""
    config = tiny_random.get_config()
    config.policy.source = str(policy[1])
    config.actor.kind, config.actor.urls, config.actor.weights_dtype = "bridge", policy[0].url, "float32"
    config.actor.max_logprob_gap = GAP
    config.oracle.kind, config.oracle.urls = "remote", oracle[0].url
    config.oracle.reward_model, config.oracle.dtype = str(oracle[1]), "float32"
    config.oracle.max_tokens = 1024  # what the model was made for
    config.eval.best_of_n = 0
    config.update_from_flattened_dict({name.replace("__", "."): value for name, value in fields.items()})
    return config


def metrics(workdir: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if not name.endswith("_time")} for line in lines]


def test_a_run_through_the_bridge_ends_like_one_in_process(
    policy: tuple[Server, Path], oracle: tuple[Server, Path], tmp_path: Path
) -> None:
    through = configured(policy, oracle)
    train.train(through, tmp_path / "bridge")
    alone = configured(policy, oracle, actor__kind="in_process", actor__urls="", oracle__kind="reward_model")
    alone.oracle.urls = ""
    train.train(alone, tmp_path / "alone")
    found, expected = metrics(tmp_path / "bridge"), metrics(tmp_path / "alone")
    assert found[0] == expected[0]  # the initial policy's greedy responses, judged: the same texts, the same scores
    assert found[-1]["misc/query_step"] == expected[-1]["misc/query_step"] == 24
    assert found[-1].keys() - expected[-1].keys() == {"actor/logprob_gap", "actor/staleness"}
    assert all(line["actor/logprob_gap"] < GAP and line["actor/staleness"] == 0 for line in found[1:])
    ledger = [json.loads(line) for line in (tmp_path / "bridge" / "queries.jsonl").read_text().splitlines()]
    assert sum(line.get("counted", False) for line in ledger) == 24


@pytest.mark.parametrize("lag", [0, 1])
def test_a_run_that_is_cut_goes_on_to_the_same_numbers(
    lag: int, policy: tuple[Server, Path], oracle: tuple[Server, Path], tmp_path: Path
) -> None:
    config = configured(policy, oracle, actor__lag=lag, exploration__planning_steps=0)
    train.train(config, tmp_path / "undisturbed")
    train_and_cut(config, tmp_path / "cut", step=2)
    train.train(config, tmp_path / "cut")
    assert metrics(tmp_path / "cut") == metrics(tmp_path / "undisturbed")
    ledgers = [(tmp_path / name / "queries.jsonl").read_bytes() for name in ("cut", "undisturbed")]
    assert ledgers[0] == ledgers[1]
    assert {line["actor/staleness"] for line in metrics(tmp_path / "cut")[2:]} == {lag}


def test_engines_that_are_killed_in_the_middle_change_nothing(
    policy: tuple[Server, Path], oracle: tuple[Server, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = configured(policy, oracle)
    train.train(config, tmp_path / "undisturbed")
    real_step = agent.step

    def killing(this: agent.Agent, state: agent.State, key: Any) -> Any:
        if state.step == 2:
            kill_engine(policy[0])
            kill_engine(oracle[0])
        return real_step(this, state, key)

    monkeypatch.setattr(agent, "step", killing)
    train.train(config, tmp_path / "killed")
    assert metrics(tmp_path / "killed") == metrics(tmp_path / "undisturbed")
    ledgers = [(tmp_path / name / "queries.jsonl").read_bytes() for name in ("killed", "undisturbed")]
    assert ledgers[0] == ledgers[1]
