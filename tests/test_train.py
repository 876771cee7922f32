"""The main job end to end on the tiny configuration: what it writes, how it goes on, and what it refuses."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest

from configs import tiny_random
from sea_jax import agent, ensemble, learner, train
from sea_jax import config as configuration
from sea_jax.actors import generation
from sea_jax.data.fingerprint import Fingerprint
from sea_jax.models.checkpoints import builtin
from sea_jax.oracles.ledger import Ledger
from sea_jax.runtime import cache, checkpoint, metrics
from sea_jax.workdir import claim, saved_settings
from tests.support.cut import train_and_cut

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True, scope="module")
def _compiled_once() -> None:
    cache.keep_compiled_programs()


def configured(**fields: Any) -> ml_collections.ConfigDict:
    """The tiny configuration with some fields set, as the command line would: loss__beta=1.0 is --config.loss.beta=1."""
    config = tiny_random.get_config()
    config.update_from_flattened_dict({name.replace("__", "."): value for name, value in fields.items()})
    return config


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def outcome(workdir: Path) -> list[dict[str, Any]]:
    """The metrics without what a clock said."""
    return [
        {name: value for name, value in line.items() if not name.endswith("_time")}
        for line in lines(workdir / "metrics.jsonl")
    ]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The work directory of a whole run."""
    workdir = tmp_path_factory.mktemp("finished") / "run"
    train.train(configured(), workdir)
    return workdir


def test_everything_a_run_owes_is_on_disk(finished: Path) -> None:
    for name in ("config.json", "metrics.jsonl", "queries.jsonl", "samples.jsonl", "report.md", "win_rate.png"):
        assert (finished / name).stat().st_size > 0, name
    assert list((finished / "tensorboard").glob("events*"))
    assert list((finished / "checkpoints").iterdir())
    assert json.loads((finished / "config.json").read_text())["max_queries"] == 24


def test_the_budget_is_exact_and_every_label_is_in_the_ledger(finished: Path) -> None:
    with Ledger(finished / "queries.jsonl", writes=False) as opened:
        ledger = opened.lines()
    counted = [line for line in ledger if line["counted"]]
    assert len(counted) == 24 == lines(finished / "metrics.jsonl")[-1]["misc/query_step"]
    assert len([line for line in lines(finished / "queries.jsonl") if line["event"] == "ask"]) == 24
    assert all(line["labeller"] == "oracle" and line["label"] in (0, 0.5, 1) for line in counted)
    uncounted = [line for line in ledger if not line["counted"]]
    assert uncounted, "gamma and planning must give ERM labels in this configuration"
    assert all(line["labeller"] == "erm" for line in uncounted)
    assert all(line["first"] != line["second"] for line in ledger)
    assert len({line["key"] for line in ledger}) == len(ledger)


def test_the_win_rate_starts_at_one_half_and_is_measured_every_8_queries(finished: Path) -> None:
    evaluations = [line for line in lines(finished / "metrics.jsonl") if "eval/rm_win_rate" in line]
    assert [line["misc/query_step"] // 8 for line in evaluations] == [0, 1, 2, 3]
    assert evaluations[0]["eval/rm_win_rate"] == 0.5
    assert "eval/bon_win_rate" in evaluations[-1]
    for line in evaluations:
        assert line["eval/judge_win_rate_low"] <= line["eval/judge_win_rate"] <= line["eval/judge_win_rate_high"]
        assert 0 < line["eval/distinct_words"] <= 1
        assert line["eval/fluency"] < 0 < line["eval/reference_loss"]
    assert len({line["eval/reference_loss"] for line in evaluations}) == len(evaluations)
    assert {line["step"] for line in evaluations} & set(checkpoint.steps(finished / "checkpoints"))
    samples = lines(finished / "samples.jsonl")
    assert len(samples) == 6 * len(evaluations)
    assert all(sample["initial"] == sample["response"] for sample in samples if sample["step"] == 0)


def test_planning_takes_policy_steps_that_cost_no_query(finished: Path) -> None:
    last = lines(finished / "metrics.jsonl")[-1]
    assert last["misc/gradient_steps"] > last["step"]
    assert last["plan/loss"] > 0


def test_the_same_command_twice_gives_the_same_numbers(finished: Path, tmp_path: Path) -> None:
    train.train(configured(), tmp_path / "again")
    assert outcome(tmp_path / "again") == outcome(finished)


def test_a_run_cut_off_after_its_labels_goes_on_to_the_same_numbers_and_pays_nothing_twice(
    finished: Path, tmp_path: Path
) -> None:
    workdir = tmp_path / "run"
    train_and_cut(configured(), workdir, step=3)
    paid = (workdir / "queries.jsonl").read_text()
    train.train(configured(), workdir)
    assert (workdir / "queries.jsonl").read_text().startswith(paid)
    for name in ("queries.jsonl", "evaluations.jsonl"):
        assert (workdir / name).read_text() == (finished / name).read_text()
    assert outcome(workdir) == outcome(finished)


def test_a_run_that_goes_on_on_a_device_that_computes_otherwise_still_fits_what_it_paid_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = configured(max_queries=16, eval__every_queries=1000, eval__best_of_n=0, checkpoint__every_steps=3)
    real_generate, real_rewards = generation.generate, ensemble.rewards
    train_and_cut(config, tmp_path, step=2)
    paid = (tmp_path / "queries.jsonl").read_text()
    assert paid.count('"event": "ask"') > 8

    def other_responses(params: Any, prompts: Any, key: Any, **how: Any) -> Any:
        return real_generate(params, prompts, jax.random.fold_in(key, 1), **how)

    monkeypatch.setattr(generation, "generate", other_responses)
    monkeypatch.setattr(ensemble, "rewards", lambda heads, features: -real_rewards(heads, features))
    train.train(config, tmp_path)
    ledger = (tmp_path / "queries.jsonl").read_text()
    assert ledger.startswith(paid)
    assert ledger.count('"counted": true') == 16 == outcome(tmp_path)[-1]["misc/query_step"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGUSR1])
def test_ctrl_c_and_sigusr1_finish_the_step_save_say_so_and_the_same_command_goes_on(
    number: signal.Signals,
    finished: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    real_step = agent.step

    def interrupted(this: agent.Agent, state: agent.State, key: Any) -> Any:
        if state.step == 2:
            os.kill(os.getpid(), number)
        return real_step(this, state, key)

    monkeypatch.setattr(agent, "step", interrupted)
    with pytest.raises(SystemExit) as stopped:
        train.train(configured(), tmp_path)
    assert stopped.value.code == 130
    assert f"{number.name}: stopping as soon as all is saved" in caplog.text
    assert "stopped at step 3 and saved" in caplog.text
    assert outcome(tmp_path)[-1]["step"] == 3
    assert (tmp_path / "checkpoints" / "3").is_dir()
    monkeypatch.setattr(agent, "step", real_step)
    train.train(configured(), tmp_path)
    assert outcome(tmp_path) == outcome(finished)


def test_a_finished_run_started_again_only_reports(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (finished / "queries.jsonl").read_bytes()
    train.train(configured(), finished)
    assert (finished / "queries.jsonl").read_bytes() == before
    assert "win rate" in capsys.readouterr().out


def test_a_finished_run_goes_on_with_a_larger_budget_and_keeps_what_it_paid_for(
    finished: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    workdir = Path(shutil.copytree(finished, tmp_path / "run"))
    more = {"max_queries": 32, "learner__learning_rate": 2e-3, "name": "more", "checkpoint__keep": 3}
    longer = configured(**more, learner__microbatch_size=4)
    with pytest.raises(
        ValueError, match=r"--allow_changed=NAME,NAME, or set:\nconfig.learner.learning_rate: 0.001 in .*"
    ):
        train.train(longer, workdir)
    train.train(longer, workdir, ["learner.learning_rate"])
    paid, ledger = lines(finished / "queries.jsonl"), lines(workdir / "queries.jsonl")
    assert ledger[: len(paid)] == paid
    changed = {"learner.learning_rate": [0.001, 0.002], "max_queries": [24, 32]}
    assert ledger[len(paid)] == {"event": "settings", "queries": 24, "changed": changed}
    before, after = outcome(finished), outcome(workdir)
    assert after[: len(before)] == before
    assert after[-1]["misc/query_step"] == 32 == sum(bool(line.get("counted")) for line in ledger)
    config = configuration.resolve(longer)
    rates = learner.schedule(learner.configured(config.learner, total_steps=config.policy_steps, dtype="float32"))
    step = before[-1]["misc/gradient_steps"]
    assert after[len(before)]["train/learning_rate"] == pytest.approx(float(rates(step)))
    labels = jax.ShapeDtypeStruct((32,), np.float32, sharding=jax.sharding.SingleDeviceSharding(jax.devices()[0]))
    _, parts = checkpoint.read(workdir / "checkpoints", {"replay/labels": labels})
    kept = sorted(float(line["label"]) for line in ledger if line.get("counted"))
    assert sorted(parts["replay/labels"].tolist()) == kept
    assert "goes on with config.max_queries=32, which was 24" in caplog.text


def test_a_run_goes_on_where_its_model_and_data_have_moved_if_they_are_the_same(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    workdir = Path(shutil.copytree(finished, tmp_path / "run"))
    moved = tmp_path / "prompts.jsonl"
    moved.write_text(Path(configured().data.path).read_text())
    model = copy_of_the_tiny_model(tmp_path)
    monkeypatch.chdir(tmp_path)
    train.train(configured(data__path=moved.name, policy__source=model.name), Path("run"))
    assert not [line for line in lines(workdir / "queries.jsonl") if line["event"] == "settings"]
    kept = saved_settings(workdir)
    assert (kept.data.path, kept.policy.source) == (str(moved), str(model))  # whoever reads it may be elsewhere
    moved.write_text(moved.read_text().replace("?", "!", 1))
    with pytest.raises(
        ValueError,
        match=r"config.data: the prompts are not those that the run in .* began with: to train on there were 22",
    ):
        train.train(configured(data__path=str(moved.rename(tmp_path / "others.jsonl"))), workdir)


def test_a_new_run_begins_with_the_labels_that_another_has_paid_for(finished: Path, tmp_path: Path) -> None:
    config = configured(max_queries=4, eval__every_queries=1000, eval__best_of_n=0)
    with pytest.raises(ValueError, match=rf"--labels={tmp_path}: --workdir=.* holds no config.json"):
        train.train(config, tmp_path / "run", labels_of=tmp_path)
    train.train(config, tmp_path / "run", labels_of=finished)
    paid = [line for line in lines(finished / "queries.jsonl") if line.get("counted")]
    told, *ledger = lines(tmp_path / "run" / "queries.jsonl")
    assert told == {"event": "labels", "queries": 0, "of": str(finished), "pairs": 24}
    assert sum(bool(line.get("counted")) for line in ledger) == 4
    one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    like = {
        "replay/labels": jax.ShapeDtypeStruct((28,), np.float32, sharding=one),
        "replay/features": jax.ShapeDtypeStruct((28, 2, 32), np.float32, sharding=one),
        "replay/added": jax.ShapeDtypeStruct((), np.int32, sharding=one),
    }
    _, before = checkpoint.read(tmp_path / "run" / "checkpoints", like, 0)
    assert int(before["replay/added"]) == 24
    np.testing.assert_array_equal(before["replay/labels"][:24], np.array([line["label"] for line in paid], np.float32))
    assert (np.ptp(before["replay/features"][:24], axis=-1) > 0).all()
    _, after = checkpoint.read(tmp_path / "run" / "checkpoints", like)
    assert int(after["replay/added"]) == 28
    np.testing.assert_array_equal(after["replay/features"][:24], before["replay/features"][:24])
    train.train(config, tmp_path / "run", labels_of=finished)  # goes on, and does not learn them once more
    assert len(lines(tmp_path / "run" / "queries.jsonl")) == 1 + len(ledger)


def test_a_run_that_had_no_judge_goes_on_with_one(finished: Path, tmp_path: Path) -> None:
    then = configuration.resolve(configured(eval__judge__kind=""))
    now, other = (
        configuration.resolve(configured(eval__judge__kind=kind)) for kind in ("my:judge", "configs.tiny_random:judge")
    )
    assert configuration.differences(now, then) == []
    assert configuration.differences(other, now) == [
        "config.eval.judge.kind: 'my:judge' in the work directory, 'configs.tiny_random:judge' now"
    ]
    saved = json.loads((finished / "config.json").read_text())
    del saved["eval"]["judge"], saved["eval"]["oracle"], saved["eval"]["likelihood_prompts"]  # as of an older version
    assert configuration.from_json(saved, "config.json").eval.judge.kind == ""
    assert configuration.differences(configuration.resolve(configured()), configuration.from_json(saved, "here")) == []


def test_the_log_says_once_that_the_judge_falls_while_the_oracle_rises(caplog: pytest.LogCaptureFixture) -> None:
    measured: list[dict[str, Any]] = []
    for step, (oracle, judge) in enumerate([(0.5, 0.5), (0.6, 0.45), (0.7, 0.4), (0.8, 0.3)]):
        row = {"step": step, "misc/query_step": 8 * step, "eval/rm_win_rate": oracle, "eval/judge_win_rate": judge}
        measured.append(row | {"eval/rm_win_rate_high": oracle + 0.1, "eval/judge_win_rate_low": judge - 0.1})
        train.warn_if_exploited(measured)
    assert caplog.text.count("has fallen twice") == 1
    assert "at 16 queries the oracle's win rate has risen twice in a row, to 0.700" in caplog.text


def nan_loss(pairs: Any, *, beta: float = 0.1) -> Any:
    """A loss that breaks."""
    return pairs.chosen * jnp.nan


def test_a_nan_stops_the_run_and_names_step_metric_and_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(metrics.NotFiniteError, match=r"(?s)step 1.*train/loss.*step 0"):
        train.train(configured(loss__name="tests.test_train:nan_loss"), tmp_path)


def same_texts(prompts: Any, first: Any, second: Any) -> Any:
    raise AssertionError("two identical texts were sent to the oracle")


def test_twins_are_never_sent_and_a_collapsed_policy_stops_the_run(tmp_path: Path) -> None:
    config = configured(sampling__top_k=1, oracle__kind="tests.test_train:same_texts", eval__every_queries=1000)
    with pytest.raises(ValueError, match=r"collapsed|same text"):
        train.train(config, tmp_path)
    assert not (tmp_path / "queries.jsonl").read_text()


def no_prompts(directory: Path) -> dict[str, Any]:
    return {"data__path": str(directory / "none.jsonl")}


def empty_prompts(directory: Path) -> dict[str, Any]:
    (directory / "empty.jsonl").write_text("")
    return {"data__path": str(directory / "empty.jsonl")}


def no_references(directory: Path) -> dict[str, Any]:
    prompts = lines(Path(tiny_random.get_config().data.path))
    (directory / "bare.jsonl").write_text("".join(json.dumps(line | {"reference": " "}) + "\n" for line in prompts))
    judge = {"eval__judge__kind": "embedding", "eval__judge__against": "mixture"}
    return {"data__path": str(directory / "bare.jsonl"), **judge}


def half_a_model(directory: Path) -> dict[str, Any]:
    target = copy_of_the_tiny_model(directory)
    weights = target / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    return {"policy__source": str(target)}


def a_tokenizer_with_more_ids(directory: Path) -> dict[str, Any]:
    target = copy_of_the_tiny_model(directory)
    tokenizer = json.loads((target / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"] |= {f"extra{number}": 258 + number for number in range(3)}
    (target / "tokenizer.json").write_text(json.dumps(tokenizer))
    return {"policy__source": str(target)}


def copy_of_the_tiny_model(directory: Path) -> Path:
    source, target = builtin.directory("tiny-random-llama"), directory / "model"
    target.mkdir()
    for path in source.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    return target


def a_file(directory: Path) -> dict[str, Any]:
    (directory / "run").write_text("")
    return {}


def another_run(directory: Path) -> dict[str, Any]:
    config = configuration.resolve(configured(seed=7))
    claim(directory / "run", config, "0" * 16, NO_PROMPTS, datetime.now())
    return {"loss__beta": 0.3}


def another_policy(directory: Path) -> dict[str, Any]:
    claim(directory / "run", configuration.resolve(configured()), "0" * 16, NO_PROMPTS, datetime.now())
    return {}


def other_prompts(directory: Path) -> dict[str, Any]:
    claim(directory / "run", configuration.resolve(configured()), "0" * 16, NO_PROMPTS, datetime.now())
    (directory / "run" / "policy_id").unlink()
    return {}


NO_PROMPTS = Fingerprint(0, "", "", [], [], "")


def a_run_of_nobody_knows_whom(directory: Path) -> dict[str, Any]:
    (directory / "run" / "checkpoints").mkdir(parents=True)
    return {}


BAD: dict[str, tuple[Callable[[Path], dict[str, Any]], str]] = {
    "a field out of range": (lambda _: {"loss__beta": -1.0}, r"config.loss.beta=-1.0: must be a finite number above 0"),
    "one candidate": (lambda _: {"sampling__num_samples": 1}, r"config.sampling.num_samples=1: must be 2 or more"),
    "no budget": (lambda _: {"max_queries": 0}, r"config.max_queries=0: must be 1 or more"),
    "an unknown rule": (lambda _: {"exploration__rule": "best"}, r"config.exploration.rule='best'.*bai_ts"),
    "a hyper-parameter of another loss": (lambda _: {"loss__gamma_over_beta": 0.1}, r"gamma_over_beta.*dpo.*beta"),
    "a judge without its model": (
        lambda _: {"eval__judge__kind": "reward_model"},
        r"config.eval.judge.reward_model='': eval.judge.kind=reward_model needs a directory",
    ),
    "a judge that is not there": (
        lambda _: {"eval__judge__kind": "tests.test_train:nobody"},
        r"config.eval.judge.kind=tests.test_train:nobody: .*importable",
    ),
    "an oracle that reads references where there are none": (
        lambda _: {"oracle__kind": "embedding", "oracle__against": "reference", "data__reference_field": ""},
        r"config.oracle.against='reference': data.reference_field must name the field",
    ),
    "a judge that reads references of which all are empty": (
        no_references,
        r"config.eval.judge.against=mixture: none of \d+ held-out prompts has a reference",
    ),
    "too many layers": (lambda _: {"policy__train_last_layers": 3}, r"train_last_layers=3: the model has 2 layers"),
    "no data file": (no_prompts, r"none.jsonl is no file"),
    "an empty data file": (empty_prompts, r"empty.jsonl holds no prompts"),
    "prompts that are all too long": (lambda _: {"data__max_prompt_tokens": 3}, r"max_prompt_tokens is 3.*longer"),
    "a truncated model": (half_a_model, r"model.safetensors"),
    "a tokenizer that does not fit": (a_tokenizer_with_more_ids, r"token ids up to 260.*vocabulary has 258"),
    "no such cached policy": (lambda _: {"policy__source": "cache:nowhere"}, r"cache:nowhere.*sea_jax.sft"),
    "a file as the work directory": (a_file, r"--workdir=.* is a file"),
    "a run without its configuration": (a_run_of_nobody_knows_whom, r"--workdir=.* holds a run but no config.json"),
    "another policy than the run began with": (
        another_policy,
        r"weights in .* are not those that the run in .*/run began",
    ),
    "other prompts than the run began with": (
        other_prompts,
        r"config.data: the prompts are not those that the run in .*/run began with: .* there were 0 and are \d+",
    ),
    "another run's work directory": (another_run, r"(?s)another configuration.*config.loss.beta.*config.seed: 7"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_clear_error_before_anything_is_spent(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare, message = BAD[case]
    monkeypatch.setattr(agent, "step", lambda *_: pytest.fail("a step was taken"))
    with pytest.raises((ValueError, OSError), match=message):
        train.train(configured(**prepare(tmp_path)), tmp_path / "run")
    assert not (tmp_path / "run" / "queries.jsonl").exists()


def test_a_chat_template_is_told_when_the_run_began_each_time_it_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = copy_of_the_tiny_model(tmp_path)
    template = "{{ strftime_now('%f') }} {{ messages[0]['content'] }}"
    settings = json.loads((target / "tokenizer_config.json").read_text())
    (target / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": template}))

    def cut(path: Path) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "open_ledger", cut)
    for _ in range(2):  # prompts that are not read as before are refused
        with pytest.raises(KeyboardInterrupt):
            train.train(configured(policy__source=str(target), data__chat=True), tmp_path / "run")
    assert (tmp_path / "run" / "prompts_id").exists()


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--config.loss.bta=1", "bta"),
        ("--config.nothing.beta=1", "nothing"),
        ("--config.loss.beta=abc", "could not convert string to float: 'abc'"),
        ("--config.max_queries=-3", "config.max_queries=-3: must be 1 or more"),
        ("stray", "unexpected arguments ['stray']"),
        ("--coordinator=localhost:1", "needs --num_processes and --process_id too"),
    ],
)
def test_the_command_line_answers_a_typo_with_one_error_and_no_traceback(flag: str, message: str) -> None:
    command = [sys.executable, "-m", "sea_jax.train", "--config=configs/tiny_random.py", flag]
    finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert finished.returncode == 1
    assert message in finished.stderr
    assert "Traceback" not in finished.stderr
