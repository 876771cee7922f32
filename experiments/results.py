"""From recipes to a file of results: one search for the learning rate alike for all, then fresh seeds; and read again."""

import json
import os
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from experiments.simulation import Laboratory, Recipe
from sea_jax.runtime import files

SEARCH_SEEDS = 1_000_000  # the search's begin here, so that none of them is reported
POINTS = 10  # of a curve, beside 0 queries


@dataclass(frozen=True)
class Results:
    """What a laboratory found.

    Attributes:
      about: command, commit, machine, sizes.
      queries: [Q], where the curves are known; the first is 0.
      recipes: by name, {"recipe", "rate", "search": by rate}.
      curves: recipe -> measure -> [S, Q].
    """

    about: Mapping[str, Any]
    queries: np.ndarray
    recipes: Mapping[str, Mapping[str, Any]]
    curves: Mapping[str, Mapping[str, np.ndarray]]


def log_grid(queries: int, smallest: int) -> np.ndarray:
    """Returns 0 and POINTS numbers of queries at equal ratios."""
    return np.concatenate([[0], np.geomspace(smallest, queries, POINTS).round()])


def at_queries(found: Mapping[str, Sequence[np.ndarray] | np.ndarray], grid: np.ndarray) -> dict[str, np.ndarray]:
    """Returns every measure [S, E] on a grid of queries, [S, Q], linear between evaluations; NaN beyond a run's end."""
    queries = found["queries"]
    return {
        name: np.stack([np.interp(grid, x, y, right=np.nan) for x, y in zip(queries, values, strict=True)])
        for name, values in found.items()
        if name != "queries"
    }


def run_all(
    laboratory: Laboratory,
    recipes: Mapping[str, Recipe],
    *,
    rates: Sequence[float],
    num_seeds: int,
    tune_by: str,
    grid: np.ndarray,
    path: Path,
    about: Mapping[str, Any],
) -> None:
    """Tunes and runs recipes, and writes what they found; those that a file of the same command and commit holds are kept.

    Args:
      laboratory: Laboratory.
      recipes: by name.
      rates: that are tried; the best at the end of the mean over the search's seeds is taken.
      num_seeds: S; the search takes S / len(rates) for each rate.
      tune_by: the measure that the search maximises.
      grid: of queries.
      path: of the file, written after each recipe.
      about: from `about`.
    """
    before = read(path) if path.exists() else None
    entries: dict[str, Any] = {}
    curves: dict[str, Any] = {}
    if before is not None and before.about == json.loads(json.dumps(about)):
        entries, curves = dict(before.recipes), dict(before.curves)
    each = num_seeds // len(rates)
    for name, recipe in recipes.items():
        if name in entries:
            continue
        start = time.perf_counter()
        tried = np.repeat(rates, each)
        seeds = SEARCH_SEEDS + np.tile(np.arange(each), len(rates))
        padding = num_seeds - len(tried)  # so that one program serves both
        found = laboratory(recipe, [*tried, *[rates[0]] * padding], [*seeds, *[0] * padding])
        final = found[tune_by][: len(tried), -1].reshape(len(rates), each).mean(1).astype(float)
        best = int(final.argmax())
        found = laboratory(recipe, [rates[best]] * num_seeds, range(num_seeds))
        curves[name] = at_queries(found, grid)
        entries[name] = {
            "recipe": asdict(recipe),
            "rate": rates[best],
            "search": dict(zip(map(str, rates), final.round(4).tolist(), strict=True)),
        }
        print(
            f"{name}: rate {rates[best]}, {tune_by} {found[tune_by][:, -1].mean():.3f}, "
            f"{time.perf_counter() - start:.0f} s",
            file=sys.stderr,
        )
        save(path, about, grid, entries, curves)


def save(path: Path, about: Mapping[str, Any], grid: np.ndarray, entries: Any, curves: Mapping[str, Any]) -> None:
    """Writes a file of results."""
    rounded = {
        recipe: {
            name: [[None if np.isnan(x) else round(float(x), 4) for x in row] for row in values]
            for name, values in measures.items()
        }
        for recipe, measures in curves.items()
    }
    whole = {"about": about, "queries": grid.tolist(), "recipes": entries, "curves": rounded}
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write_whole(path, json.dumps(whole, separators=(",", ":")) + "\n")


def about(sizes: Any, **more: Any) -> dict[str, Any]:
    """Returns what is said of a file of results: the command, the commit, the machine, and the sizes, a dataclass."""
    main = sys.modules["__main__"].__spec__
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
    return {
        "command": shlex.join(["python", "-m", main.name if main else "experiments", *sys.argv[1:]]),
        "commit": commit,
        "machine": f"{_processor()}, {os.cpu_count()} cores",
        "sizes": asdict(sizes),
        **more,
    }


def _processor() -> str:
    """The kind of the processor."""
    described = Path("/proc/cpuinfo")
    lines = described.read_text().splitlines() if described.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def read(path: Path) -> Results:
    """Reads a file of results."""
    whole = json.loads(path.read_text())
    curves = {
        recipe: {name: np.array(values, np.float64) for name, values in measures.items()}
        for recipe, measures in whole["curves"].items()
    }
    return Results(whole["about"], np.array(whole["queries"]), whole["recipes"], curves)
