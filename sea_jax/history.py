"""What a run left in its work directory, read back: evaluations, curves, seeds of one method."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sea_jax import config as configuration
from sea_jax.runtime.files import read_lines
from sea_jax.statistics import Interval, over_seeds

WIN_RATE = "eval/rm_win_rate"
BEST_OF_N_WIN_RATE = "eval/bon_win_rate"
QUERIES = "misc/query_step"
GRADIENT_STEPS = "misc/gradient_steps"
LENGTH = "eval/rm_response_length"
INITIAL_LENGTH = "eval/initial_response_length"
MEASURES = {"policy": WIN_RATE, "best of N": BEST_OF_N_WIN_RATE}

SAMPLE_FIELDS = ("step", "prompt_id", "prompt", "reference", "initial", "response")
MOST_FIELDS_NAMED = 3  # in a method's label; if configurations differ in more, the work directory's name stands there

Line = dict[str, Any]


@dataclass(frozen=True)
class Run:
    """What the files of one work directory hold."""

    workdir: Path
    config: Line
    metrics: list[Line]
    samples: list[Line]
    paid_labels: int
    erm_labels: int

    @property
    def label(self) -> str:
        """The method: what the config calls it, else the work directory's name."""
        return str(self.config.get("name") or self.workdir.resolve().name)


@dataclass(frozen=True)
class Curve:
    """A win rate along a run, or the mean of several seeds' runs.

    Attributes:
      queries: [N] queries paid.
      gradient_steps: [N] policy gradient steps.
      intervals: N win rates.
    """

    queries: np.ndarray
    gradient_steps: np.ndarray
    intervals: list[Interval]


def _require(path: Path, lines: Sequence[Line], names: Sequence[str]) -> None:
    for line in lines:
        if lacking := [name for name in names if name not in line]:
            raise ValueError(f"{path}: the line {json.dumps(line)[:120]} lacks {', '.join(lacking)}")


def read_run(workdir: Path) -> Run:
    """Reads a work directory.

    Args:
      workdir: the directory a run wrote to.

    Returns:
      The run.

    Raises:
      FileNotFoundError: the directory lacks one of the files.
      ValueError: a file is damaged, or an evaluation lacks one of its numbers.
    """
    paths = {name: workdir / name for name in ("config.json", "metrics.jsonl", "queries.jsonl", "samples.jsonl")}
    for path in paths.values():
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing: a report needs {', '.join(paths)} of a run's work directory")
    try:
        config = json.loads(paths["config.json"].read_bytes())
    except ValueError as error:
        raise ValueError(f"{paths['config.json']} is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{paths['config.json']} must hold an object, found {type(config).__name__}")
    metrics = read_lines(paths["metrics.jsonl"])
    _require(paths["metrics.jsonl"], metrics, ("step",))
    for win_rate in MEASURES.values():
        measured = [line for line in metrics if win_rate in line]
        needed = (QUERIES, GRADIENT_STEPS, f"{win_rate}_low", f"{win_rate}_high", LENGTH, INITIAL_LENGTH)
        _require(paths["metrics.jsonl"], measured, needed)
    labels = [line for line in read_lines(paths["queries.jsonl"]) if line.get("event", "label") == "label"]
    _require(paths["queries.jsonl"], labels, ("counted",))
    samples = read_lines(paths["samples.jsonl"])
    _require(paths["samples.jsonl"], samples, SAMPLE_FIELDS)
    paid_labels = sum(bool(label["counted"]) for label in labels)
    return Run(workdir, config, metrics, samples, paid_labels, len(labels) - paid_labels)


def evaluations(run: Run, win_rate: str = WIN_RATE) -> list[Line]:
    """The metric lines that hold an evaluation.

    Args:
      run: a run.
      win_rate: the metric that marks one.

    Returns:
      The lines in order.
    """
    return [line for line in run.metrics if win_rate in line]


def interval(line: Line, win_rate: str) -> Interval:
    """A win rate with its bounds from one metric line.

    Args:
      line: a line that holds the win rate.
      win_rate: the metric.

    Returns:
      The interval over prompts of one seed.
    """
    return Interval(line[win_rate], line[f"{win_rate}_low"], line[f"{win_rate}_high"], 1)


def _column(lines: Sequence[Line], name: str) -> np.ndarray:
    return np.asarray([line[name] for line in lines], np.float64)


def curve(runs: Sequence[Run], win_rate: str = WIN_RATE, along: str = QUERIES) -> Curve | None:
    """A win rate along a single run, or its mean over seeds.

    Seeds need not pay their queries at the same steps, so their curves are read, by linear interpolation, at the first
    run's own evaluations as far as every run has come. Runs with a single evaluation each (at the end, for best of N)
    are averaged there.

    Args:
      runs: one run, or the runs of several seeds.
      win_rate: the metric.
      along: the metric, non-decreasing along a run, at whose values the seeds are compared.

    Returns:
      The curve, with the Wilson interval over prompts for one run and the Student-t interval over seeds for several;
      None if a run has no evaluation, or if the runs have no stretch in common.
    """
    measured = [evaluations(run, win_rate) for run in runs]
    if not all(measured):
        return None
    if len(runs) == 1:
        (lines,) = measured
        intervals = [interval(line, win_rate) for line in lines]
        return Curve(_column(lines, QUERIES), _column(lines, GRADIENT_STEPS), intervals)
    positions = [_column(lines, along) for lines in measured]
    first, last = max(x[0] for x in positions), min(x[-1] for x in positions)
    if first > last and any(len(lines) > 1 for lines in measured):
        return None
    at = np.unique(np.clip(positions[0], first, last))

    def read_off(name: str) -> np.ndarray:
        columns = (_column(lines, name) for lines in measured)
        return np.stack([np.interp(at, x, column) for x, column in zip(positions, columns, strict=True)])

    intervals = [over_seeds(values) for values in read_off(win_rate).T]
    return Curve(read_off(QUERIES).mean(axis=0), read_off(GRADIENT_STEPS).mean(axis=0), intervals)


def groups(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """The runs of each method: those of one name, and of one configuration but for the seed and what changes no number.

    Args:
      runs: runs of any methods and seeds.

    Returns:
      Label -> its runs in the order given. Where configurations of one name differ, the label says in what, or, if in too
      much, is the name of the first of their work directories.

    Raises:
      ValueError: two runs of one method have the same seed.
    """
    methods: dict[str, list[tuple[dict[str, Any], list[Run]]]] = {}  # name -> what a method sets, and its runs
    for run in runs:
        own, namesakes = _settings(run), methods.setdefault(run.label, [])
        seeds = next((some for settings, some in namesakes if settings == own), None)
        if seeds is None:
            namesakes.append((own, seeds := []))
        twin = next((one for one in seeds if one.config.get("seed") == run.config.get("seed")), None)
        if twin is not None:
            raise ValueError(
                f"--workdir={twin.workdir} and --workdir={run.workdir} are runs of one configuration with the same seed "
                f"{run.config.get('seed')}: they tell no more than one of them; leave one out"
            )
        seeds.append(run)
    grouped: dict[str, list[Run]] = {}
    for name, namesakes in methods.items():
        known = set().union(*(settings for settings, _ in namesakes))
        first = namesakes[0][0]
        fields = sorted(f for f in known if any(settings.get(f) != first.get(f) for settings, _ in namesakes))
        for settings, seeds in namesakes:
            told = [f"{field}={settings.get(field)}" for field in fields]
            if len(fields) > MOST_FIELDS_NAMED:
                told = [seeds[0].workdir.resolve().name]
            label = ", ".join([name, *told])
            grouped[f"{name}, {seeds[0].workdir}" if label in grouped else label] = seeds
    return grouped


def _settings(run: Run) -> dict[str, Any]:
    """The fields of a run's configuration on which its numbers depend."""
    left_out = configuration.MAY_DIFFER | {"seed"}
    return {name: value for name, value in configuration.flatten(run.config).items() if name not in left_out}
