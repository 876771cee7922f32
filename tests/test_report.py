"""Reports of small made-up runs: the numbers in the tables, runs that lack something, seeds put together."""

import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from sea_jax import history, report
from sea_jax.history import Line

PNG = b"\x89PNG\r\n\x1a\n"


def evaluation(win_rate: float, queries: int, gradient_steps: int, **more: Any) -> Line:
    return {
        "misc/query_step": queries,
        "misc/gradient_steps": gradient_steps,
        "eval/rm_win_rate": win_rate,
        "eval/rm_win_rate_low": win_rate - 0.05,
        "eval/rm_win_rate_high": win_rate + 0.05,
        "eval/rm_response_length": 41.25,
        "eval/initial_response_length": 38.0,
        **more,
    }


CONFIG = {"name": "sea", "seed": 0, "max_queries": 3200, "loss": {"name": "dpo", "beta": 0.1}}


def made_up_run(
    workdir: Path,
    metrics: Sequence[Line],
    samples: Sequence[Line] = (),
    config: Line | None = None,
    labels: Sequence[bool] = (),
) -> Path:
    workdir.mkdir()
    config = CONFIG if config is None else config
    (workdir / "config.json").write_text(json.dumps(config))
    contents = {
        "metrics.jsonl": [{"step": step, **line} for step, line in enumerate(metrics)],
        "queries.jsonl": [{"event": "ask", "key": "0"}]
        + [{"event": "label", "key": str(key), "counted": counted} for key, counted in enumerate(labels)],
        "samples.jsonl": samples,
    }
    for name, lines in contents.items():
        (workdir / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
    return workdir


def sample(step: int, number: int, **more: Any) -> Line:
    return {
        "step": step,
        "prompt_id": f"prompt-{number}",
        "prompt": "a long post " * 100,
        "reference": "the reference",
        "initial": "the response before",
        "response": f"after {step} steps, with ```a fence```",
        "initial_reward": -1.0,
        "reward": 0.5,
        **more,
    }


@pytest.fixture
def workdir(tmp_path: Path) -> Path:
    metrics = [
        evaluation(0.5, 0, 0),
        {
            "misc/query_step": 640,
            "misc/gradient_steps": 2,
            "actor/generate_time": 6.0,
            "misc/step_time": 7.0,
            "train/learn_time": 1.0,
        },
        {"actor/generate_time": 3.0}
        | evaluation(0.6, 1280, 4, **{f"eval/bon_win_rate{end}": 0.7 for end in ("", "_low", "_high")}),
    ]
    samples = [sample(step, number) for step in (0, 2) for number in range(7)]
    return made_up_run(tmp_path / "run", metrics, samples, labels=[True] * 3 + [False] * 2)


def test_report_holds_the_numbers_of_the_run(workdir: Path) -> None:
    path = report.write(workdir)
    text = path.read_text()
    assert path == workdir / "report.md"
    assert (
        "**sea**, seed 0, loss `dpo`: 3 of 3,200 queries paid in 2 training steps with 4 policy gradient steps." in text
    )
    assert "| 0 | 0 | 0.500 [0.450, 0.550] | 41.2 (38.0) |  |" in text
    assert "| 1,280 | 4 | 0.600 [0.550, 0.650] | 41.2 (38.0) | 0.700 [0.700, 0.700] |" in text
    assert "| `actor/generate_time` | 9.0 | 90.0% |" in text
    assert "| `train/learn_time` | 1.0 | 10.0% |" in text
    assert "| total | 10.0 |  |" in text
    assert "| oracle (counted) | 3 |" in text
    assert "| ERM | 2 |" in text
    assert "![Win rate against queries and policy gradient steps](win_rate.png)" in text
    for name in ("config.json", "metrics.jsonl", "queries.jsonl", "samples.jsonl", "win_rate.png"):
        assert f"| `{name}` | {(workdir / name).stat().st_size:,} |" in text
    assert (workdir / "win_rate.png").read_bytes().startswith(PNG)


def test_examples_are_drawn_from_the_last_evaluation_by_the_seed(workdir: Path, tmp_path: Path) -> None:
    many = [sample(3, number) for number in range(100)]
    drawn = {}
    for seed in (0, 1):
        run = made_up_run(tmp_path / f"seed-{seed}", [], many, config=CONFIG | {"seed": seed})
        drawn[seed] = [int(number) for number in re.findall(r"### `prompt-(.*)`", report.write(run).read_text())]
        assert len(set(drawn[seed])) == 10
        assert drawn[seed] == sorted(drawn[seed]) != list(range(10))
    assert drawn[0] != drawn[1]
    text = report.write(workdir).read_text()
    assert re.findall(r"### `(.*)`", text) == [f"prompt-{number}" for number in range(7)]
    assert "after 2 steps" in text
    assert "after 0 steps" not in text
    assert "Before, reward -1.000:\n\n```text\nthe response before\n```" in text
    assert "After, reward 0.500:\n\n````text\nafter 2 steps, with ```a fence```\n````" in text
    assert text.count("a long post") < 7 * 40


def test_examples_without_rewards_or_references(tmp_path: Path) -> None:
    line = sample(0, 1, reference="", win_probability=0.75, judge_win_probability=0.25)
    del line["reward"], line["initial_reward"]
    text = report.write(made_up_run(tmp_path / "run", [], [line])).read_text()
    assert "Before:\n\n```text\nthe response before" in text
    assert "After, win probability 0.750, judge's win probability 0.250:\n\n" in text
    assert "Reference" not in text


def test_report_is_a_function_of_the_files(workdir: Path) -> None:
    report.write(workdir)
    first = [(workdir / name).read_bytes() for name in ("report.md", "win_rate.png")]
    report.write(workdir)
    assert [(workdir / name).read_bytes() for name in ("report.md", "win_rate.png")] == first


def test_report_of_a_single_evaluation(tmp_path: Path) -> None:
    text = report.write(made_up_run(tmp_path / "run", [evaluation(0.5, 0, 0)])).read_text()
    assert "| 0 | 0 | 0.500 [0.450, 0.550] | 41.2 (38.0) |" in text
    assert "No stage was timed." in text
    assert (tmp_path / "run" / "win_rate.png").read_bytes().startswith(PNG)


def test_report_without_an_evaluation(tmp_path: Path) -> None:
    text = report.write(made_up_run(tmp_path / "unnamed", [], config={})).read_text()
    assert text.startswith("# unnamed\n\n**unnamed**: 0 queries paid in 0 training steps")
    assert "This run holds no evaluation yet." in text
    assert "This run holds no samples yet." in text
    assert not (tmp_path / "unnamed" / "win_rate.png").exists()


@pytest.mark.parametrize("name", ["config.json", "metrics.jsonl", "queries.jsonl", "samples.jsonl"])
def test_a_missing_file_is_named(workdir: Path, name: str) -> None:
    (workdir / name).unlink()
    with pytest.raises(FileNotFoundError, match=f"run/{re.escape(name)} is missing"):
        report.write(workdir)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("config.json", "{", r"config\.json is not JSON"),
        ("config.json", "[]", r"config\.json must hold an object, found list"),
        ("metrics.jsonl", '{"step": 1, "eval/rm_win_rate": 0.5}', "lacks misc/query_step, misc/gradient_steps"),
        ("metrics.jsonl", '{"train/loss": 0.5}', r"metrics\.jsonl: the line .* lacks step"),
        ("queries.jsonl", '{"key": "1"}', r"queries\.jsonl: the line .* lacks counted"),
        ("samples.jsonl", '{"step": 1}', r"samples\.jsonl: the line .* lacks prompt_id"),
    ],
)
def test_a_damaged_file_is_named(workdir: Path, name: str, content: str, message: str) -> None:
    (workdir / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        report.write(workdir)


def judged(oracle: float, judge: float, queries: int, **more: Any) -> Line:
    rates = {
        "eval/judge_win_rate": judge,
        "eval/judge_win_rate_low": judge - 0.08,
        "eval/judge_win_rate_high": judge + 0.08,
    }
    return evaluation(oracle, queries, queries, **rates, **more)


def test_a_run_that_pleases_the_oracle_alone_is_named_once(tmp_path: Path) -> None:
    rates = [(0.5, 0.5), (0.55, 0.55), (0.6, 0.53), (0.65, 0.49), (0.7, 0.4)]
    metrics = [judged(*pair, queries=100 * n) for n, pair in enumerate(rates)]
    text = report.write(made_up_run(tmp_path / "run", metrics)).read_text()
    assert "**Warning**: at 300 queries the oracle's win rate has risen twice in a row, to 0.650" in text
    assert "the judge, which nothing is learnt from, has fallen twice, to 0.490" in text
    assert text.count("Warning") == 1
    assert history.exploited(metrics[:3]) is None
    slowly = [judged(0.5 + n / 100, 0.5 - n / 100, queries=n) for n in range(9)]  # 0.02 within two evaluations
    assert history.exploited(slowly) is None


def test_a_collapse_is_seen_and_oracle_and_judge_stand_side_by_side(tmp_path: Path) -> None:
    told = {
        "eval/distinct_words": 0.1234,
        "eval/repeated_trigrams": 0.987,
        "eval/fluency": -2.5,
        "eval/reference_loss": 3.25,
    }
    metrics = [judged(0.5, 0.5, queries=0), judged(0.9, 0.25, queries=64, **told)]
    samples = [
        sample(1, n, response="x" * (18 if n % 2 else 40), initial="y" * 19, win_probability=0.9 if n % 2 else 0.1)
        | {"judge_win_probability": 0.2}
        for n in range(8)
    ]
    run = made_up_run(tmp_path / "run", metrics, samples)
    answers = [{"event": "label", "key": str(n), "labeller": "judge" if n else "oracle"} for n in range(5)]
    (run / "evaluations.jsonl").write_text("".join(json.dumps(line) + "\n" for line in answers))
    text = report.write(run).read_text()
    assert "| 64 | 64 | 0.900 [0.850, 0.950] | 0.250 [0.170, 0.330] | 41.2 (38.0) |" in text
    assert "| 64 | 64 | 0.123 | 0.987 | -2.500 | 3.250 |" in text
    assert re.search(r"\| 64 \| 64 \| 0\.\d+ \[.*\] \| 1\.000 \[0\.510, 1\.000\] \(4\) \| 0\.\d+ \[.*\] \|", text)
    assert "| oracle, by evaluations (not counted) | 1 |\n| judge, by evaluations (not counted) | 4 |" in text


def test_a_run_that_asks_nobody_but_the_judge(tmp_path: Path) -> None:
    metrics = [judged(0.5, 0.25, queries=64)]
    for name in [name for name in metrics[0] if name.startswith("eval/rm_win_rate")]:
        del metrics[0][name]
    run = made_up_run(tmp_path / "run", metrics)
    text = report.write(run).read_text()
    assert "| queries | policy steps | judge's win rate | mean length (initial) |" in text
    assert (run / "win_rate.png").read_bytes().startswith(PNG)
    assert "| sea | policy, by the judge | 1 | 64 | 64 | 0.250 [0.170, 0.330] |" in report.comparison_table(
        [history.read_run(run)]
    )


def seeds(tmp_path: Path, *curves: Sequence[tuple[int, float]]) -> list[history.Run]:
    for number, curve in enumerate(curves):
        lines = [evaluation(win_rate, queries, queries // 100) for queries, win_rate in curve]
        made_up_run(tmp_path / f"seed-{number}", lines, config={"name": "sea", "seed": number})
    return [history.read_run(tmp_path / f"seed-{number}") for number in range(len(curves))]


def test_seeds_are_averaged_with_students_interval(tmp_path: Path) -> None:
    curve = history.curve(seeds(tmp_path, *([(0, 0.5), (100, rate)] for rate in (0.5, 0.6, 0.7))))
    assert curve is not None
    assert curve.queries.tolist() == [0, 100]
    assert curve.gradient_steps.tolist() == [0, 1]
    found = [(interval.mean, interval.low, interval.high) for interval in curve.intervals]
    assert found == [(0.5, 0.5, 0.5), pytest.approx((0.6, 0.351586, 0.848414), abs=1e-6)]
    assert curve.intervals[1].count == 3


def test_seeds_evaluated_elsewhere_are_interpolated_as_far_as_all_have_come(tmp_path: Path) -> None:
    runs = seeds(tmp_path, [(0, 0.5), (100, 0.6), (400, 0.6)], [(0, 0.5), (200, 0.7), (300, 0.9)])
    curve = history.curve(runs)
    assert curve is not None
    assert curve.queries.tolist() == [0, 100, 300]
    assert [interval.mean for interval in curve.intervals] == pytest.approx([0.5, 0.6, 0.75])


def test_seeds_with_one_evaluation_each_are_averaged_wherever_it_lies(tmp_path: Path) -> None:
    curve = history.curve(seeds(tmp_path, [(100, 0.6)], [(300, 0.8)]))
    assert curve is not None
    assert (curve.queries.tolist(), curve.gradient_steps.tolist()) == ([200], [2])
    assert [interval.mean for interval in curve.intervals] == pytest.approx([0.7])


def test_seeds_without_a_stretch_in_common_have_no_curve(tmp_path: Path) -> None:
    assert history.curve(seeds(tmp_path, [(0, 0.5), (100, 0.6)], [(200, 0.5)])) is None
    assert history.curve([history.read_run(made_up_run(tmp_path / "none", []))]) is None


def call_main(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["report", *map(str, arguments)])
    report.main()


def test_the_command_compares_methods(
    workdir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    baseline = made_up_run(tmp_path / "baseline", [evaluation(0.55, 0, 0)], config={"name": "passive"})
    unfinished = made_up_run(tmp_path / "unfinished", [], config=CONFIG | {"seed": 1})
    output = tmp_path / "comparison"
    folders = [f"--workdir={folder}" for folder in (workdir, baseline)]
    call_main(monkeypatch, *folders, f"--output={output}")
    printed = capsys.readouterr().out
    assert "| sea | policy | 1 | 1,280 | 4 | 0.600 [0.550, 0.650] |" in printed
    assert "| sea | best of N | 1 | 1,280 | 4 | 0.700 [0.700, 0.700] |" in printed
    assert "| passive | policy | 1 | 0 | 0 | 0.550 [0.500, 0.600] |" in printed
    assert printed.splitlines()[0] in (output / "report.md").read_text()
    assert (output / "win_rate.png").read_bytes().startswith(PNG)
    call_main(monkeypatch, *folders, f"--workdir={unfinished}", f"--output={output}")
    assert "| sea |  | 2 |  |  | no evaluation in common |" in capsys.readouterr().out


def test_runs_of_one_name_are_one_method_only_if_their_configurations_are(tmp_path: Path) -> None:
    loss: Line = {"name": "ipo", "beta": 0.1}
    changes: dict[str, Line] = {
        "a": {},
        "b": {"seed": 1, "mesh": [1, 2, 1], "actor": {"urls": "http://a:1"}, "checkpoint": {"keep": 9}},
        "c": {"loss": loss},
        "d": {"loss": loss, "seed": 1},
        "e": {"name": "other", "loss": loss},
    }
    runs = {
        name: history.read_run(made_up_run(tmp_path / name, [], config=CONFIG | more)) for name, more in changes.items()
    }

    def labels(names: str) -> dict[str, str]:
        found = history.groups([runs[name] for name in names])
        return {label: "".join(run.workdir.name for run in some) for label, some in found.items()}

    assert labels("abe") == {"sea": "ab", "other": "e"}
    assert labels("abcde") == {"sea, loss.name=dpo": "ab", "sea, loss.name=ipo": "cd", "other": "e"}
    far = {"seed": 2, "a": 1, "b": 2, "c": 3, "d": 4}
    runs["f"] = history.read_run(made_up_run(tmp_path / "f", [], config=CONFIG | far))
    assert labels("af") == {"sea, a": "a", "sea, f": "f"}
    runs["g"] = history.read_run(made_up_run(tmp_path / "g", [], config=CONFIG | far | {"seed": 3}))
    assert labels("agfb") == {"sea, a": "ab", "sea, g": "gf"}
    (tmp_path / "there").mkdir()
    runs["h"] = history.read_run(made_up_run(tmp_path / "there" / "a", [], config=CONFIG | far))
    assert labels("ah") == {"sea, a": "a", f"sea, {tmp_path / 'there' / 'a'}": "a"}
    other = made_up_run(tmp_path / "i", [], config=CONFIG | {"seed": 9})
    (other / "prompts_id").write_text('{"training_texts": "d5d8", "heldout_texts": ["963c"]}')
    runs["i"] = history.read_run(other)
    prompts = runs["i"].prompts
    assert labels("abi") == {"sea, prompts=": "ab", f"sea, prompts={prompts}": "i"}
    with pytest.raises(ValueError, match=r"--workdir=.*/c and --workdir=.*/c are runs of one .* the same seed 0"):
        labels("acdc")


def test_the_command_reports_one_run(
    workdir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    call_main(monkeypatch, f"--workdir={workdir}")
    assert capsys.readouterr().out == f"{workdir / 'report.md'}\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--workdir=a", "--workdir=b"], "--output is needed"),
        (["--workdir=nowhere"], "nowhere/config.json is missing"),
    ],
)
def test_the_command_refuses(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    with pytest.raises(SystemExit, match="2"):
        call_main(monkeypatch, *arguments)
    assert message in capsys.readouterr().err
