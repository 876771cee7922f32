"""What every method has in common: it is named in the configuration, and says what it cannot take before anything is loaded."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from configs import tiny_random
from sea_jax import agent, train, wiring


def configured(**fields: Any) -> Any:
    config = tiny_random.get_config()
    config.max_queries, config.eval.every_queries, config.eval.best_of_n = 8, 1000, 0
    config.exploration.planning_steps, config.exploration.gamma = 0, 1.0
    config.update_from_flattened_dict({name.replace("__", "."): value for name, value in fields.items()})
    return config


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"method": "dqn"},
            r"config\.method='dqn': must be one of sea, dyna, .*, or my_module:my_method",
        ),
        ({"method": "mine:nothing"}, r"config\.method=mine:nothing: No module named 'mine'"),
        (
            {"method": "online", "exploration__rule": "bai_ts", "exploration__gamma": 0.5, "eval__best_of_n": 2},
            r"config\.exploration\.rule=bai_ts: method=online has no reward model and takes only passive\n"
            r"config\.exploration\.gamma=0\.5: .* takes only 1\n"
            r"config\.eval\.best_of_n=2: .* takes only 0",
        ),
        (
            {"exploration__rule": f"{__name__}:sees_too_much"},
            r"config\.exploration\.rule=.*:sees_too_much: it asks for mood; a rule can see logprobs, reference_logprobs",
        ),
    ],
)
def test_what_cannot_be_taken_is_said_before_anything_is_loaded(tmp_path, fields, message):
    config = configured(policy__source="a model that is not there", **fields)
    with pytest.raises(ValueError, match=message):
        train.train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def sees_too_much(rewards, distinct, key, *, mood):
    raise AssertionError


def test_which_responses_may_be_compared():
    texts, finished = [["a", "b", "a"]], np.array([[True, False, True]])
    differ = [[[False, True, False], [True, False, True], [False, True, False]]]
    assert agent.comparable(texts, finished, "asked").tolist() == differ
    assert agent.comparable(texts, finished, "lose").tolist() == differ
    assert not agent.comparable(texts, finished, "left_out").any()
    assert agent.comparable(texts, ~finished, "left_out").sum() == 0
    two = agent.comparable([["a", "b", "c"]], finished, "left_out")
    assert np.argwhere(two[0]).tolist() == [[0, 2], [2, 0]]


def of_an_even_first_token(eos_ids, tokenizer, strings):
    return lambda candidates: np.asarray(candidates.tokens[..., 0]) % 2 == 0


@pytest.mark.slow
def test_online_learns_from_two_plain_samples_and_no_reward_model_and_cut_ones_may_lose(tmp_path, monkeypatch):
    monkeypatch.setattr(wiring, "finished_by", of_an_even_first_token)
    train.train(configured(method="online", exploration__rule="passive", exploration__unfinished="lose"), tmp_path)
    ledger, rows = lines(tmp_path / "queries.jsonl"), lines(tmp_path / "metrics.jsonl")
    assert len([line for line in ledger if line["event"] == "ask"]) == 8
    cut = [line for line in ledger if line.get("labeller") == "cut"]
    assert {line["label"] for line in cut} == {0.0, 1.0}
    assert not any(line["counted"] for line in cut)
    assert sum(row["explorer/pairs"] for row in rows[1:]) == 8 + len(cut)
    assert 0 < np.mean([row["actor/finished_ratio"] for row in rows[1:]]) < 1
    assert not any(name.startswith("train/rm/") for row in rows for name in row if not name.endswith("_time"))
    assert rows[-1]["misc/gradient_steps"] == len(rows) - 1


def answers_some(prompts, first, second, keys=None):
    """Where labels are paid for, the pairs one after the other from the last on, but of several not the very last."""
    if keys is None:
        return np.full(len(prompts), 0.6)
    return ((row, 0.75) for row in range(max(len(prompts) - 2, 0), -1, -1))


@pytest.mark.slow
def test_pairs_without_an_answer_are_neither_learnt_from_nor_counted_and_who_likes_the_first_changes_nothing(tmp_path):
    train.train(configured(oracle__kind=f"{__name__}:answers_some", oracle__label="soft"), tmp_path)
    ledger, rows = lines(tmp_path / "queries.jsonl"), lines(tmp_path / "metrics.jsonl")
    labels = [line for line in ledger if line["event"] == "label"]
    abstentions = {line["key"] for line in ledger if line["event"] == "abstention"}
    assert len(labels) == rows[-1]["misc/query_step"] == 8
    assert len(abstentions) == sum(row["explorer/unanswered"] for row in rows[1:]) >= 2
    assert not abstentions & {line["key"] for line in labels}
    assert sum(row["explorer/pairs"] for row in rows[1:]) == 8
    swapped = {line["key"]: line["swapped"] for line in ledger if line["event"] == "ask"}
    assert {line["label"] for line in labels} == {0.25, 0.75}
    assert all(line["label"] == (0.25 if swapped[line["key"]] else 0.75) for line in labels)


def never_answers(prompts, first, second, keys=None):
    return np.full(len(prompts), 0.5 if keys is None else np.nan)


@pytest.mark.slow
def test_an_oracle_that_never_answers_is_not_asked_for_ever_though_the_ensemble_labels(tmp_path):
    config = configured(
        method="sea",
        exploration__gamma=0.5,
        exploration__burn_in_queries=0,
        oracle__kind=f"{__name__}:never_answers",
        oracle__max_abstentions=6,
    )
    with pytest.raises(
        ValueError, match=r"has not answered ([6-9]) pairs in a row up to step \d+, .*max_abstentions=6"
    ):
        train.train(config, tmp_path)
    ledger = lines(tmp_path / "queries.jsonl")
    assert not [line for line in ledger if line.get("counted")]
    assert [line for line in ledger if line.get("labeller") == "erm"]


@pytest.mark.slow
def test_information_directed_goes_on_where_it_was_with_its_anchor(tmp_path):
    """The policy never sees an oracle's label; without the average in the checkpoint the last steps would be others."""
    own = {"exploration__rule": "infomax", "exploration__planning_steps": 1, "exploration__planning_after_queries": 0}
    fields = {"method": "information_directed", "loss__name": "linear", "learner__anchor_decay": 0.5, **own}

    def configuration() -> Any:
        return configured(**fields, oracle__label="bradley_terry", checkpoint__every_steps=1, checkpoint__keep=9)

    train.train(configuration(), tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "again")
    for path in (tmp_path / "again" / "checkpoints").iterdir():
        if path.name.isdecimal() and int(path.name) > 1:
            shutil.rmtree(path)
    train.train(configuration(), tmp_path / "again")

    def numbers(name: str) -> list[dict[str, float]]:
        rows = lines(tmp_path / name / "metrics.jsonl")
        return [{key: value for key, value in row.items() if not key.endswith("_time")} for row in rows]

    assert numbers("whole") == numbers("again")
    assert numbers("whole")[-1]["misc/gradient_steps"] == 2 * (len(numbers("whole")) - 1) == 4
    ledger = lines(tmp_path / "whole" / "queries.jsonl")
    assert sum(line["event"] == "label" and line["counted"] for line in ledger) == 8


@pytest.mark.slow
def test_an_iterative_run_writes_with_weights_some_steps_old(tmp_path):
    """The policy moves at every step, and who writes only at every second: up to it, all is as of the offline run."""
    common = {"exploration__rule": "passive", "oracle__label": "bradley_terry", "learner__learning_rate": 0.05}
    train.train(configured(method="offline", max_queries=12, **common), tmp_path / "offline")
    train.train(configured(method="iterative", max_queries=12, actor__sync_every=2, **common), tmp_path / "iterative")
    asks = [
        {line["key"]: line["first"] for line in lines(tmp_path / name / "queries.jsonl") if line["event"] == "ask"}
        for name in ("offline", "iterative")
    ]
    same = {key: asks[1][key] == text for key, text in asks[0].items() if key in asks[1]}
    assert all(equal for key, equal in same.items() if key.split("-")[0] in ("0", "1"))
    assert not all(equal for key, equal in same.items() if key.split("-")[0] == "2")


@pytest.mark.slow
def test_ppo_takes_its_steps_on_all_responses_and_plans_on_fresh_prompts(tmp_path):
    own = {"exploration__planning_steps": 1, "exploration__planning_after_queries": 4, "group__epochs": 2}
    train.train(configured(method="ppo", group__pessimism=1.0, **own), tmp_path)
    ledger, rows = lines(tmp_path / "queries.jsonl"), lines(tmp_path / "metrics.jsonl")
    assert sum(line["event"] == "label" and line["counted"] for line in ledger) == 8
    planned = sum("plan/loss" in row for row in rows)
    assert planned >= 1
    assert rows[-1]["misc/gradient_steps"] == 2 * (len(rows) - 1 + planned)
    assert all(np.isfinite(row["train/reward"]) and "train/rm/loss_rew" in row for row in rows[1:])
