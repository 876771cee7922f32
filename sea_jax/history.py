"""What a run left in its work directory, read back: evaluations, curves, seeds of one method."""

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sea_jax import config as configuration
from sea_jax.data.fingerprint import PROMPTS_FILE
from sea_jax.oracles.asked_once import COMMAND_LEDGER, EVALUATION_LEDGER
from sea_jax.oracles.paid_answers import Spent, read_spent
from sea_jax.runtime.files import read_lines
from sea_jax.statistics import Interval, at_equal_length, over_seeds

WIN_RATE = "eval/rm_win_rate"
JUDGE_WIN_RATE = "eval/judge_win_rate"
BEST_OF_N_WIN_RATE = "eval/bon_win_rate"
BEST_OF_N_JUDGE_WIN_RATE = "eval/bon_judge_win_rate"
QUERIES = "misc/query_step"
GRADIENT_STEPS = "misc/gradient_steps"
LENGTH = "eval/rm_response_length"
INITIAL_LENGTH = "eval/initial_response_length"
# All are over the initial policy's responses.
MEASURES = (WIN_RATE, JUDGE_WIN_RATE, BEST_OF_N_WIN_RATE, BEST_OF_N_JUDGE_WIN_RATE)
# The same for the policy freed of length, which `read_run` works out from the samples.
LENGTH_CONTROLLED = {win_rate: f"{win_rate}_length_controlled" for win_rate in (WIN_RATE, JUDGE_WIN_RATE)}
SIMILAR_LENGTH = {win_rate: f"{win_rate}_similar_length" for win_rate in (WIN_RATE, JUDGE_WIN_RATE)}
# What runs are compared by.
COMPARED = {
    "policy": WIN_RATE,
    "policy at equal length": LENGTH_CONTROLLED[WIN_RATE],
    "policy, by the judge": JUDGE_WIN_RATE,
    "policy at equal length, by the judge": LENGTH_CONTROLLED[JUDGE_WIN_RATE],
    "best of N": BEST_OF_N_WIN_RATE,
    "best of N, by the judge": BEST_OF_N_JUDGE_WIN_RATE,
}
SAMPLED = {WIN_RATE: "win_probability", JUDGE_WIN_RATE: "judge_win_probability"}

EXPLOITED_BY = 0.05  # so far at least the oracle's win rate rises, and the judge's falls, within two evaluations

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
    evaluation_answers: Mapping[str, int]  # who was asked by evaluations -> pairs answered
    spent: Mapping[str, Spent]  # on chat models as judges, by the settings that name them
    prompts: str  # tells its prompts from others; "": unknown

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
    for win_rate in MEASURES:
        measured = [line for line in metrics if win_rate in line]
        needed = (QUERIES, GRADIENT_STEPS, f"{win_rate}_low", f"{win_rate}_high", LENGTH, INITIAL_LENGTH)
        _require(paths["metrics.jsonl"], measured, needed)
    labels = [line for line in read_lines(paths["queries.jsonl"]) if line.get("event", "label") == "label"]
    _require(paths["queries.jsonl"], labels, ("counted",))
    samples = read_lines(paths["samples.jsonl"])
    _require(paths["samples.jsonl"], samples, SAMPLE_FIELDS)
    paid_labels = sum(bool(label["counted"]) for label in labels)
    answers: Counter[str] = Counter()
    for path in (workdir / EVALUATION_LEDGER, workdir / COMMAND_LEDGER):
        lines = [line for line in read_lines(path) if line.get("event") == "label"] if path.is_file() else []
        _require(path, lines, ("labeller",))
        answers.update(line["labeller"] for line in lines)
    metrics = _free_of_length(metrics, samples)
    erm_labels, prompts = len(labels) - paid_labels, _read_prompts(workdir / PROMPTS_FILE)
    return Run(workdir, config, metrics, samples, paid_labels, erm_labels, answers, read_spent(workdir), prompts)


def _read_prompts(path: Path) -> str:
    """A digest of the texts that a run trains on and is measured on."""
    if not path.is_file():
        return ""
    found = json.loads(path.read_bytes())
    texts = json.dumps([found.get("training_texts"), found.get("heldout_texts")])
    return hashlib.sha256(texts.encode()).hexdigest()[:8]


def _free_of_length(metrics: Sequence[Line], samples: Sequence[Line]) -> list[Line]:
    """Adds to the lines of evaluations what their win rates would be without differences in length."""
    texts: dict[int, dict[str, Line]] = {}  # step -> prompt -> sample
    for sample in samples:
        texts.setdefault(sample["step"], {})[sample["prompt_id"]] = sample
    freed = {line["step"]: dict(line) for line in metrics}
    for win_rate, name in SAMPLED.items():
        steps = [step for step, rows in texts.items() if step in freed and any(name in row for row in rows.values())]
        prompts = list(dict.fromkeys(prompt for step in steps for prompt in texts[step]))
        if not steps:
            continue
        rows = [[texts[step].get(prompt, {}) for prompt in prompts] for step in steps]
        models = [
            (np.array([row.get(name, np.nan) for row in own]), [row.get("response", "") for row in own]) for own in rows
        ]
        initial = [next(own[n]["initial"] for own in rows if own[n]) for n in range(len(prompts))]
        for step, rates in zip(steps, at_equal_length(models, initial), strict=True):
            for title, found in ((LENGTH_CONTROLLED, rates.controlled), (SIMILAR_LENGTH, rates.similar)):
                if found is not None:
                    key = title[win_rate]
                    freed[step] |= {key: found.mean, f"{key}_low": found.low, f"{key}_high": found.high}
                    freed[step][f"{key}_pairs"] = found.count
    return list(freed.values())


def exploited(lines: Sequence[Line]) -> Line | None:
    """Returns the first evaluation at which the oracle seems to be exploited; None: there is none.

    Twice in a row the oracle's win rate has risen and the judge's has fallen, the two times together by EXPLOITED_BY or out
    of the interval that each had before.

    Args:
      lines: evaluations in their order; those without both win rates are passed over.
    """
    both = [line for line in lines if WIN_RATE in line and JUDGE_WIN_RATE in line]
    for before, between, now in zip(both, both[1:], both[2:], strict=False):
        rises = before[WIN_RATE] < between[WIN_RATE] < now[WIN_RATE]
        falls = before[JUDGE_WIN_RATE] > between[JUDGE_WIN_RATE] > now[JUDGE_WIN_RATE]
        high = min(before[f"{WIN_RATE}_high"], before[WIN_RATE] + EXPLOITED_BY)
        low = max(before[f"{JUDGE_WIN_RATE}_low"], before[JUDGE_WIN_RATE] - EXPLOITED_BY)
        if rises and falls and now[WIN_RATE] >= high and now[JUDGE_WIN_RATE] <= low:
            return now
    return None


def exploitation(line: Line) -> str:
    """Returns what is to be said of an evaluation that `exploited` has found."""
    return (
        f"at {line[QUERIES]:,} queries the oracle's win rate has risen twice in a row, to {line[WIN_RATE]:.3f}, while that of "
        f"the judge, which nothing is learnt from, has fallen twice, to {line[JUDGE_WIN_RATE]:.3f}: the policy may be "
        "learning what the oracle likes and nobody else; `python -m sea_jax.evaluate --checkpoint=best` takes the policy that "
        "the judge liked best"
    )


def evaluations(run: Run, measure: str = LENGTH) -> list[Line]:
    """The metric lines that hold an evaluation.

    Args:
      run: a run.
      measure: the metric that marks one.

    Returns:
      The lines in order.
    """
    return [line for line in run.metrics if measure in line]


def read_evaluations(workdir: Path) -> list[Line]:
    """Returns the metric lines of a running run that hold an evaluation.

    Args:
      workdir: where its metrics.jsonl is.
    """
    return [line for line in read_lines(workdir / "metrics.jsonl") if LENGTH in line]


def is_judged(run: Run) -> bool:
    """Whether anybody compared a policy's responses with the initial policy's."""
    return any(evaluations(run, win_rate) for win_rate in MEASURES)


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
    """The fields of a run's configuration on which its numbers depend, and which prompts they were at the time."""
    left_out = configuration.MAY_DIFFER | {"seed"}
    fields = {name: value for name, value in configuration.flatten(run.config).items() if name not in left_out}
    return fields | {"prompts": run.prompts}
