"""The comparison of methods: what is run, what is taken from it, and that nothing is run twice."""

import json
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from experiments import compare, report, results
from experiments.compare import Comparison

CONFIG = str(Path(__file__).parents[2] / "configs" / "tiny_random.py")


def write_run(workdir: Path, win_rate: float, steps: int) -> None:
    """A finished run of 8 queries with two evaluations."""
    workdir.mkdir(parents=True)

    def line(step: int, queries: int, rate: float) -> dict[str, Any]:
        names = ("eval/rm_win_rate", "eval/judge_win_rate")
        rates = {f"{name}{end}": rate for name in names for end in ("", "_low", "_high")}
        lengths = {"eval/rm_response_length": 5.0 + step, "eval/initial_response_length": 5.0}
        clocks = {"misc/query_step": queries, "misc/gradient_steps": steps * step, "misc/step_time": 2.0 * step}
        return {"step": step, **clocks, **lengths, **rates}

    metrics = [line(0, 0, 0.5), line(1, 8, win_rate)]
    (workdir / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in metrics))
    (workdir / "queries.jsonl").write_text('{"event": "label", "counted": true}\n' * 8)
    (workdir / "samples.jsonl").write_text("")
    (workdir / "config.json").write_text('{"max_queries": 8}')
    (workdir / "report.md").write_text("")


def test_each_method_has_its_own_best_rate_and_finished_runs_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    best = {"online": 2e-3, "sea": 5e-4}  # 2 and 1/2 times the configuration's
    commands: list[list[str]] = []

    def train(command: list[str], **_: Any) -> None:
        commands.append(command)
        given = dict(argument.split("=", 1) for argument in command[3:])
        method = given["--config"].split(":")[-1]
        rate, seed = float(given["--config.learner.learning_rate"]), int(given["--config.seed"])
        write_run(Path(given["--workdir"]), (0.8 if rate == best[method] else 0.6) + 0.01 * (seed % 10), 3)

    monkeypatch.setattr(subprocess, "run", train)
    comparison = Comparison(CONFIG, 2, 1, (0.5, 1.0, 2.0), ("--config.max_queries=8",), str(tmp_path / "runs"))
    path = tmp_path / "compare.json"
    for _ in range(2):
        compare.compare(comparison, ["online", "sea"], path, {"command": "compare", "commit": "c", "machine": "m"})
    assert len(commands) == 2 * (3 + 2)  # the second time nothing is run
    assert all(command[-1] == "--config.max_queries=8" for command in commands)
    found = results.read(path)
    assert {name: entry["rate"] for name, entry in found.recipes.items()} == best
    assert found.queries.tolist() == [0, 8]
    for curves in found.curves.values():
        np.testing.assert_allclose(curves["greedy/judge"], [[0.5, 0.8], [0.5, 0.81]])
        assert curves["policy_steps"].tolist() == [[0, 3]] * 2
        assert curves["seconds"].tolist() == [[0, 2]] * 2
    shown = report.table(found, "online", "greedy")
    assert "regret" not in shown
    assert "| 0.005 |" not in shown
    assert "0.805 [" in shown


def test_a_run_that_has_not_spent_its_budget_is_not_finished(tmp_path: Path) -> None:
    write_run(tmp_path / "run", 0.7, 1)
    assert compare.finished(tmp_path / "run") is not None
    (tmp_path / "run" / "config.json").write_text('{"max_queries": 16}')
    assert compare.finished(tmp_path / "run") is None
    assert compare.finished(tmp_path / "none") is None


@pytest.mark.slow
def test_a_run_that_fails_is_named_and_one_that_ends_gives_curves(tmp_path: Path) -> None:
    few = ("--config.max_queries=8", "--config.eval.every_queries=8")
    comparison = Comparison(CONFIG, 1, 1, (1.0,), few, str(tmp_path / "runs"))
    path = tmp_path / "compare.json"
    compare.compare(comparison, ["online"], path, {"command": "compare", "commit": "c", "machine": "m"})
    curves = results.read(path).curves["online"]
    assert curves["greedy/oracle"].shape == curves["greedy/judge"].shape == (1, 2)
    assert curves["policy_steps"][0].tolist() == [0, 2]
    broken = Comparison(CONFIG, 1, 1, (1.0,), ("--config.sampling.num_samples=0",), str(tmp_path / "broken"))
    with pytest.raises(subprocess.CalledProcessError):
        compare.compare(broken, ["online"], path, {})
