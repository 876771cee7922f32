"""Evaluating a finished run alone: the same numbers as the run's own, the policy for others to load, nothing touched."""

import json
import math
import os
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from configs import tiny_random
from sea_jax import evaluate, train, wiring
from sea_jax.alpaca_eval import AlpacaEval
from sea_jax.initial_state import initial_state
from sea_jax.models import decoder
from sea_jax.models.checkpoints import hf
from sea_jax.models.mesh import make_mesh
from sea_jax.runtime import cache, checkpoint
from sea_jax.workdir import saved_settings
from tests.support.taste import arbitrary

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The work directory of a whole run in which the policy has changed."""
    cache.keep_compiled_programs()
    config = tiny_random.get_config()
    config.learner.learning_rate = 3e-2
    config.oracle.kind = "tests.support.taste:arbitrary"
    config.eval.against_references = True
    config.checkpoint.keep = 99
    workdir = tmp_path_factory.mktemp("finished") / "run"
    train.train(config, workdir)
    return workdir


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A copy to do damage to."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def numbers(workdir: Path, step: int) -> dict[str, Any]:
    return json.loads((workdir / f"evaluation-{step}.json").read_text())


def newest(workdir: Path) -> int:
    return checkpoint.steps(workdir / "checkpoints")[-1]


LOGGED_AS = {
    "response_over_initial": "rm",
    "response_over_reference": "rm_reference",
    "best_of_n_over_initial": "bon",
    "response_over_initial_by_judge": "judge",
    "response_over_reference_by_judge": "judge_reference",
    "best_of_n_over_initial_by_judge": "bon_judge",
}


def test_the_last_checkpoint_gives_what_the_run_itself_logged_bit_for_bit(run: Path) -> None:
    asked = [{"instruction": "Why is the sea salt?", "dataset": "koala"}] * 2 + [
        {"instruction": f"What is {n}?"} for n in range(3)
    ]
    evaluate.evaluate(run, best_of=2, alpaca=AlpacaEval(asked, temperature=0.9, max_new_tokens=12))
    answered = json.loads((run / f"alpaca_eval-{newest(run)}.json").read_text())
    assert [{name: row[name] for name in row if name not in ("output", "generator")} for row in answered] == asked
    assert {row["generator"] for row in answered} == {f"tiny_random-{newest(run)}"}
    assert answered[0]["output"] != answered[1]["output"]  # sampled: the same instruction twice
    assert all(isinstance(row["output"], str) for row in answered)
    logged, found = lines(run / "metrics.jsonl")[-1], numbers(run, newest(run))
    assert (found["step"], found["queries"]) == (logged["step"], 24)
    assert found["policy_steps"] == logged["misc/gradient_steps"]
    for name, metric in LOGGED_AS.items():
        rate = found["win_rates"][name]
        assert rate["win_rate"] == logged[f"eval/{metric}_win_rate"]
        assert rate["low"] == logged[f"eval/{metric}_win_rate_low"]
        assert rate["high"] == logged[f"eval/{metric}_win_rate_high"]
        assert rate["prompts"] == 6
    for name, metric in {"response": "rm", "best_of_n": "bon", "initial": "initial"}.items():
        assert found["response_tokens"][name] == logged[f"eval/{metric}_response_length"]
    for name in ("distinct_words", "repeated_trigrams", "fluency", "reference_loss"):
        assert found["texts"]["response"][name] == logged[f"eval/{name}"]
        assert found["texts"]["initial"][name] == lines(run / "metrics.jsonl")[0][f"eval/{name}"]
    assert found["texts"]["response"]["fluency"] < found["texts"]["initial"]["fluency"] < 0
    freed = found["win_rates"]["response_over_initial_by_judge"]["length_controlled"]
    assert freed["low"] <= freed["win_rate"] <= freed["high"]
    assert freed["prompts"] == 6
    assert found["settings"]["mesh"] == [1, 1, 1]
    rows = lines(run / f"responses-{newest(run)}.jsonl")
    samples = [sample for sample in lines(run / "samples.jsonl") if sample["step"] == newest(run)]
    assert {sample["win_probability"] for sample in samples} != {0.5}  # the policy has changed
    for row, sample in zip(rows, samples, strict=True):
        assert all(row[name] == sample[name] for name in ("prompt_id", "prompt", "reference", "initial", "response"))
        assert row["response_over_initial"] == sample["win_probability"]
        against_reference = arbitrary([row["prompt"]], [row["best_of_n"]], [row["reference"]])
        assert row["best_of_n_over_reference"] == pytest.approx(against_reference[0])
    assert not list(run.glob("*.unfinished"))


def test_elsewhere_and_with_prompts_some_of_which_have_no_reference(
    run: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    prompts = lines(Path(tiny_random.get_config().data.path))
    rows = lines(run / "samples.jsonl")[-6:]
    bare = {row["prompt"] for row in rows[1:3]}
    for prompt in prompts:
        if prompt["prompt"] in bare:
            prompt["reference"] = " "
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(prompt) + "\n" for prompt in prompts))
    config = json.loads((run / "config.json").read_text())
    config["data"]["path"] = str(tmp_path / "prompts.jsonl")
    config["mesh"] = [64, 1, 1]  # as if trained on devices that are not here
    config["actor"] |= {"kind": "bridge", "urls": "http://127.0.0.1:9", "lag": 1}  # and with servers that are gone
    (run / "config.json").write_text(json.dumps(config))
    evaluate.evaluate(run, num_prompts=4)
    assert "2 of 4 held-out ones are others than when the run began; do not compare" in caplog.text
    rates, settings = (numbers(run, newest(run))[name] for name in ("win_rates", "settings"))
    assert settings["mesh"] == [1, math.gcd(4, jax.device_count()), 1]  # 4 are the prompts of a batch
    assert settings["num_prompts"] == 4
    assert {name: rate["prompts"] for name, rate in rates.items()} == {
        f"{name}{by}": count
        for by in ("", "_by_judge")
        for name, count in (("response_over_initial", 4), ("response_over_reference", 2), ("initial_over_reference", 2))
    }
    found = lines(run / f"responses-{newest(run)}.jsonl")
    assert ["response_over_reference" in row for row in found] == [True, False, False, True]
    last = arbitrary([""], [found[3]["response"]], [found[3]["reference"]])[0]
    assert found[3]["response_over_reference"] == pytest.approx(last)


# ---- The command, and what it exports


@dataclass(frozen=True)
class Done:
    """What the command has read, written and said."""

    workdir: Path
    policy: Path
    said: subprocess.CompletedProcess[str]


@pytest.fixture(scope="module")
def done(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Done:
    """The command, run once."""
    workdir = tmp_path_factory.mktemp("done") / "run"
    shutil.copytree(finished, workdir)
    policy = workdir.parent / "policy"
    command = [sys.executable, "-m", "sea_jax.evaluate", f"--workdir={workdir}", f"--export={policy}", "--mesh=1,1,1"]
    said = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert said.returncode == 0, said.stderr
    return Done(workdir, policy, said)


def test_the_command_shows_how_far_it_is_and_prints_the_win_rates(done: Done) -> None:
    rates = numbers(done.workdir, newest(done.workdir))["win_rates"]
    rate = rates["response_over_initial"]
    row = f"| oracle | initial policy | 6 | {rate['win_rate']:.3f} [{rate['low']:.3f}, {rate['high']:.3f}] |"
    assert "| judge | initial policy | 6 |" in done.said.stdout
    assert row in done.said.stdout
    assert "batch 4/4" in done.said.stderr
    assert "best_of_n_over_initial" not in rates


def test_the_export_holds_the_frozen_and_the_trained_parameters(done: Done) -> None:
    config = saved_settings(done.workdir)
    mesh = make_mesh(config.mesh)
    with jax.set_mesh(mesh):
        parts = wiring.parts(config, mesh, training=False)
        assert not parts.train_prompts  # nobody would read them
        with checkpoint.open_directory(done.workdir / "checkpoints", 9) as opened:
            restored = checkpoint.restore(opened, initial_state(config, parts, 100))
    assert restored is not None
    whole = decoder.join(parts.policy.frozen, restored[1].learner.trained)
    found = hf.load(done.policy, cuts=(1,)).params
    jax.tree.map(np.testing.assert_array_equal, found, whole)
    start = hf.load(config.policy.source, cuts=(1,)).params
    np.testing.assert_array_equal(found["embed"], start["embed"])
    assert (found["stacks"][1]["q"]["kernel"] != start["stacks"][1]["q"]["kernel"]).any()


def test_transformers_writes_the_same_responses_with_the_exported_policy(done: Done) -> None:
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(done.policy)
    words = transformers.AutoTokenizer.from_pretrained(done.policy)
    for row in lines(done.workdir / f"responses-{newest(done.workdir)}.jsonl"):
        ids = words(f"Q: {row['prompt']} A:", return_tensors="pt")
        with torch.no_grad():
            written = model.generate(**ids, max_new_tokens=8, do_sample=False)[0, ids["input_ids"].shape[1] :]
        assert words.decode(written, skip_special_tokens=True).strip() == row["response"]


# ---- Which checkpoint, and that nothing happens to it


def contents(directory: Path) -> dict[str, tuple[int, int]]:
    return {
        str(path.relative_to(directory)): (path.stat().st_mtime_ns, path.stat().st_size)
        for path in [directory, *directory.rglob("*")]
    }


def test_an_older_checkpoint_can_be_named_and_what_a_running_training_writes_is_left_alone(run: Path) -> None:
    older = checkpoint.steps(run / "checkpoints")[0]
    shutil.copytree(run / "checkpoints" / str(older), run / "checkpoints" / "12.orbax-checkpoint-tmp")
    before = contents(run / "checkpoints")
    evaluate.evaluate(run, step=older, num_prompts=2)
    assert contents(run / "checkpoints") == before
    (logged,) = (line for line in lines(run / "metrics.jsonl") if line["step"] == older)
    found = numbers(run, older)
    assert found["queries"] == logged["misc/query_step"] < 24
    assert found["policy_steps"] == logged["misc/gradient_steps"]
    assert not (run / f"evaluation-{newest(run)}.json").exists()


def test_the_best_checkpoint_is_kept_and_found_by_its_name(finished: Path, run: Path) -> None:
    measured = [line for line in lines(finished / "metrics.jsonl") if "eval/judge_win_rate" in line]
    rates = {line["step"]: line["eval/judge_win_rate"] for line in measured}
    best = max(rates, key=lambda step: (rates[step], step))
    assert best in checkpoint.steps(run / "checkpoints")
    policy = run.parent / "best"
    evaluate.evaluate(run, step="best", export=policy)
    found = numbers(run, best)
    assert found["win_rates"]["response_over_initial_by_judge"]["win_rate"] == rates[best]
    assert (policy / "model.safetensors").is_file()
    for step in rates:
        (run / "checkpoints" / str(step) / "metrics" / "metrics").unlink(missing_ok=True)
    with pytest.raises(ValueError, match=r"--checkpoint=best: no checkpoint in .* with a win rate by the judge"):
        evaluate.evaluate(run, step="best")


COUNTED: Counter[tuple[str, str]] = Counter()


def counted(prompts: Any, first: Any, second: Any) -> np.ndarray:
    """An oracle that counts what it is asked, whichever of two stands first."""
    COUNTED.update(tuple(sorted(pair)) for pair in zip(first, second, strict=True))
    return arbitrary(prompts, first, second)


def test_nobody_is_asked_about_the_same_texts_twice(run: Path) -> None:
    edited("oracle.kind", "tests.test_evaluate:counted")(run)
    COUNTED.clear()
    evaluate.evaluate(run, best_of=2)  # beside what the run asked: the best of two against the references
    assert COUNTED
    assert max(COUNTED.values()) == 1
    first, paid = numbers(run, newest(run)), COUNTED.copy()
    asked = lines(run / "evaluations-alone.jsonl")
    assert sum(line["event"] == "label" and line["labeller"] == "oracle" for line in asked) == len(paid)
    evaluate.evaluate(run, best_of=2)
    assert paid == COUNTED
    assert numbers(run, newest(run)) == first
    edited("eval.oracle", False)(run)  # the judge alone
    (run / "evaluations-alone.jsonl").unlink()
    (run / "evaluations.jsonl").unlink()
    evaluate.evaluate(run)
    assert paid == COUNTED
    assert all(name.endswith("_by_judge") for name in numbers(run, newest(run))["win_rates"])


def parts_of(workdir: Path) -> dict[str, Any]:
    """The smallest thing to read."""
    return {"queries": 0, "learner/step": jax.ShapeDtypeStruct((), np.int32, sharding=one_device())}


def one_device() -> jax.sharding.Sharding:
    return jax.sharding.SingleDeviceSharding(jax.devices()[0])


def test_a_damaged_checkpoint_is_passed_over_and_left_as_it_is(run: Path, caplog: pytest.LogCaptureFixture) -> None:
    *_, older, damaged = checkpoint.steps(run / "checkpoints")
    os.truncate(run / "checkpoints" / str(damaged) / "state" / "manifest.ocdbt", 10)
    before = contents(run / "checkpoints")
    step, state = checkpoint.read(run / "checkpoints", parts_of(run))
    assert step == older
    assert 0 < state["queries"] < 24
    assert f"{run / 'checkpoints' / str(damaged)} cannot be read and is passed over" in caplog.text
    with pytest.raises(
        ValueError, match=rf"checkpoint of step {damaged} cannot be read: .*there are: \[.*{older}, {damaged}\]"
    ):
        checkpoint.read(run / "checkpoints", parts_of(run), damaged)
    assert contents(run / "checkpoints") == before


def test_when_the_run_replaces_checkpoints_while_they_are_read_the_newer_one_is_read(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    *_, older, last = checkpoint.steps(run / "checkpoints")
    load = checkpoint.ocp.load

    def overtaken(path: Path, *arguments: Any) -> Any:
        if path.name == str(last):
            path.rename(path.with_name("20"))
            shutil.rmtree(path.with_name(str(older)))
        return load(path, *arguments)

    monkeypatch.setattr(checkpoint.ocp, "load", overtaken)
    step, state = checkpoint.read(run / "checkpoints", parts_of(run))
    assert (step, state["queries"]) == (20, 24)


# ---- Errors


def edited(name: str, value: Any) -> Callable[[Path], None]:
    """Sets a field of config.json, or takes it out."""

    def edit(workdir: Path) -> None:
        config = json.loads((workdir / "config.json").read_text())
        *path, last = name.split(".")
        part = config
        for key in path:
            part = part[key]
        part |= {last: value}
        if value is None:
            del part[last]
        (workdir / "config.json").write_text(json.dumps(config))

    return edit


def another_model(workdir: Path) -> None:
    """Of a run from which nobody can tell the policy's weights."""
    edited("policy.source", "builtin:tiny-random-gpt-neox")(workdir)
    (workdir / "policy_id").unlink()


def nothing(_: Path) -> None:
    pass


BAD: dict[str, tuple[Callable[[Path], Any], dict[str, Any], str]] = {
    "no work directory": (shutil.rmtree, {}, r"--workdir=.*run is no directory; name one"),
    "no config.json": (lambda d: (d / "config.json").unlink(), {}, r"--workdir=.*run holds no config.json; name one"),
    "half a config.json": (lambda d: os.truncate(d / "config.json", 100), {}, r"config.json is not valid JSON"),
    "a field too many": (edited("erm.depth", 3), {}, r"another version.*\nconfig.erm.depth: not a field"),
    "a field of another type": (edited("max_queries", "many"), {}, r"config.json: config.max_queries='many': "),
    "no checkpoints": (lambda d: shutil.rmtree(d / "checkpoints"), {}, r"checkpoints holds no checkpoint"),
    "no such checkpoint": (nothing, {"step": 99}, r"--checkpoint=99: there is no such checkpoint.*steps (\d+, )+\d+$"),
    "no such name": (nothing, {"step": "last"}, r"--checkpoint=last: there is no such checkpoint"),
    "more trained layers": (
        edited("policy.train_last_layers", 2),
        {},
        r"is a checkpoint of another model: learner/trained/.* is missing there, and float32",
    ),
    "another policy": (
        edited("policy.source", "builtin:tiny-random-gpt-neox"),
        {},
        r"the weights in .* are not those that the run in .* began with",
    ),
    "another model": (another_model, {}, r"is a checkpoint of another model: learner/trained/"),
    "another ensemble": (edited("erm.num_heads", 5), {"best_of": 2}, r"another model: ensemble/.*\[4, .*\[5, "),
    "an ensemble without labels": (
        nothing,
        {"best_of": 2, "step": 0},
        r"--best_of=2: the ensemble in the checkpoint of step 0 has learnt from no label \(method=sea\)",
    ),
    "an export onto something": (nothing, {"export": ROOT / "configs"}, r"--export=.*configs is not empty"),
    "an export onto a file": (nothing, {"export": ROOT / "README.md"}, r"--export=.*README.md is a file"),
    "no room to answer AlpacaEval": (
        nothing,
        {"alpaca": AlpacaEval([{"instruction": "Why?"}, {"instruction": "long " * 60}], 0.9, 8)},
        r"--alpaca_eval: row 2, 'long .* has over 248 tokens, and the policy was made for 256 with a response of up to 8",
    ),
    "no room for any answer": (
        nothing,
        {"alpaca": AlpacaEval([{"instruction": "Why?"}], 0.9, 256)},
        r"--alpaca_max_new_tokens=256: the policy was made for 256 tokens",
    ),
    "too many devices": (nothing, {"mesh": (64, 1, 1)}, r"config.mesh=\(64, 1, 1\): 64 devices"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_clear_error_before_anything_is_computed(
    case: str, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare, arguments, message = BAD[case]
    prepare(run)
    monkeypatch.setattr(evaluate, "heldout_evaluation", lambda *_: pytest.fail("responses were written"))
    with pytest.raises(ValueError, match=rf"(?m){message}"):
        evaluate.evaluate(run, **arguments)
    assert not list(run.glob("evaluation-*"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--workdir"),
        (["--workdir=runs/nowhere", "--best_of=0"], "--best_of=0"),
        (
            ["--workdir=runs/nowhere", "--config=configs/tiny_random.py"],
            "--config: the configuration is the work directory's",
        ),
    ],
)
def test_the_command_line_answers_a_mistake_with_one_error_and_no_traceback(arguments: list[str], message: str) -> None:
    command = [sys.executable, "-m", "sea_jax.evaluate", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 1
    assert message in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
