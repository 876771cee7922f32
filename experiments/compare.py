"""Methods on the language model itself: a search for the learning rate alike for all, then fresh seeds, each run to its end.

python -m experiments.compare --methods online sea dyna --seeds=8 --output=docs/results/compare.json

Every run has a work directory of its own under --directory: the same command goes on where it stopped, and runs that are
finished are read. What stands behind -- is handed to every run, such as --config.max_queries=512.
"""

import argparse
import runpy
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from experiments import results
from sea_jax import history
from sea_jax.methods.table import METHODS

MEASURES = {"greedy/oracle": history.WIN_RATE, "greedy/judge": history.JUDGE_WIN_RATE, "length": history.LENGTH}


@dataclass(frozen=True)
class Comparison:
    """What is run, the same for every method.

    Attributes:
      config: a configuration file that takes a method's name behind a colon.
      seeds: S, of every method.
      search_seeds: of every rate that is tried.
      factors: rates that are tried, in units of the method's own.
      overrides: further arguments of every run.
      directory: of the work directories.
    """

    config: str
    seeds: int
    search_seeds: int
    factors: tuple[float, ...]
    overrides: tuple[str, ...]
    directory: str


def learning_rate(config: str, method: str) -> float:
    """Returns a method's own learning rate."""
    return float(runpy.run_path(config)["get_config"](method).learner.learning_rate)


def run_to_end(comparison: Comparison, method: str, rate: float, seed: int) -> history.Run:
    """Returns a run, which is begun, or goes on, if its budget is not spent.

    Raises:
      subprocess.CalledProcessError: it ended before; what it says stands on the terminal.
    """
    workdir = Path(comparison.directory) / f"{method}-rate{rate:g}-seed{seed}"
    found = finished(workdir)
    if found is None:
        command = [
            *(sys.executable, "-m", "sea_jax.train", f"--config={comparison.config}:{method}"),
            *(f"--config.seed={seed}", f"--config.learner.learning_rate={rate!r}", f"--workdir={workdir}"),
            *comparison.overrides,
        ]
        subprocess.run(command, check=True, stdout=sys.stderr)
        found = history.read_run(workdir)
    return found


def finished(workdir: Path) -> history.Run | None:
    """Returns the run of a work directory if it has spent its budget and written its report."""
    if not (workdir / "report.md").exists():
        return None
    run = history.read_run(workdir)
    return run if run.paid_labels >= run.config["max_queries"] else None


def evaluated(run: history.Run) -> dict[str, np.ndarray]:
    """Returns each measure, [E], at a run's evaluations, NaN where it was not taken; seconds are those of the steps."""
    seconds = np.cumsum([line.get("misc/step_time", 0.0) for line in run.metrics])
    rows = [index for index, line in enumerate(run.metrics) if history.LENGTH in line]
    lines = [run.metrics[row] for row in rows]
    measured = {name: np.array([line.get(key, np.nan) for line in lines]) for name, key in MEASURES.items()}
    return measured | {
        "queries": np.array([line[history.QUERIES] for line in lines], float),
        "policy_steps": np.array([line[history.GRADIENT_STEPS] for line in lines], float),
        "seconds": seconds[rows],
    }


def search(comparison: Comparison, method: str) -> tuple[float, dict[str, float]]:
    """Returns the best of a method's rates by the last win rate, the judge's if there is one, and what each rate gave."""
    rates = [factor * learning_rate(comparison.config, method) for factor in comparison.factors]
    if len(rates) == 1:
        return rates[0], {}
    found = {}
    for rate in rates:
        ends = []
        for number in range(comparison.search_seeds):
            run = evaluated(run_to_end(comparison, method, rate, results.SEARCH_SEEDS + number))
            judge, oracle = run["greedy/judge"][-1], run["greedy/oracle"][-1]
            ends.append(oracle if np.isnan(judge) else judge)
        found[f"{rate:g}"] = float(np.mean(ends))
    return rates[int(np.argmax(list(found.values())))], found


def compare(comparison: Comparison, methods: Sequence[str], path: Path, about: dict[str, Any]) -> None:
    """Runs every method and writes what was found, after each of them.

    Args:
      comparison: Comparison.
      methods: by name.
      path: of the file.
      about: from `results.about`.
    """
    entries: dict[str, Any] = {}
    curves: dict[str, Any] = {}
    grid: np.ndarray | None = None
    for method in methods:
        rate, tried = search(comparison, method)
        runs = [evaluated(run_to_end(comparison, method, rate, seed)) for seed in range(comparison.seeds)]
        grid = runs[0]["queries"] if grid is None else grid
        curves[method] = results.at_queries({name: [run[name] for run in runs] for name in runs[0]}, grid)
        entries[method] = {"recipe": {"method": method}, "rate": rate, "search": tried}
        results.save(path, about, grid, entries, curves)


def main() -> None:
    """Runs the methods and writes what they found."""
    parser = argparse.ArgumentParser(prog="python -m experiments.compare", description=__doc__.splitlines()[0])
    parser.add_argument("--config", default="configs/quickstart.py", help="a configuration file that takes a method")
    parser.add_argument("--methods", nargs="+", required=True, help=", ".join(METHODS))
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--search_seeds", type=int, default=1, help="of every learning rate that is tried")
    parser.add_argument("--factors", type=float, nargs="+", default=[0.5, 1.0, 2.0], help="times the method's own rate")
    parser.add_argument("--directory", default="runs/compare", help="of the work directories")
    parser.add_argument("--output", type=Path, default=Path("runs/compare.json"))
    parser.add_argument("overrides", nargs="*", help="behind --: further arguments of every run")
    arguments = parser.parse_args()
    if unknown := sorted(set(arguments.methods) - set(METHODS)):
        parser.error(f"--methods: there is no {', '.join(unknown)}; there are {', '.join(METHODS)}")
    comparison = Comparison(
        arguments.config,
        arguments.seeds,
        arguments.search_seeds,
        tuple(arguments.factors),
        tuple(arguments.overrides),
        arguments.directory,
    )
    try:
        compare(comparison, arguments.methods, arguments.output, results.about(comparison))
    except subprocess.CalledProcessError as error:
        sys.exit(f"a run ended with {error.returncode}; the same command goes on there: {' '.join(error.cmd)}")


if __name__ == "__main__":
    main()
