"""What a run achieved, as report.md and win_rate.png, from nothing but the files in its work directory.

Read are
- config.json: "name" labels the method, "seed", the budget "max_queries", and what SETTINGS lists;
- metrics.jsonl: a line per training step. Evaluations stand on the lines that hold "eval/rm_win_rate"; a name that ends
  in "_time" and does not begin with "misc/" is a stage's seconds, no stage lying inside another;
- queries.jsonl: a line per label, of which "counted" says whether it was paid for (else the ERM gave it), and lines whose
  "event" is "ask", which say what the oracle was asked;
- samples.jsonl: a line per held-out prompt and evaluation, with "initial_reward" and "reward", or "win_probability", or
  neither, as the oracle can tell.

    python -m sea_jax.report --workdir=DIR
    python -m sea_jax.report --workdir=SEED0 --workdir=SEED1 --workdir=BASELINE0 --output=DIR
"""

import argparse
import json
import re
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import FuncFormatter, MaxNLocator

from sea_jax import config as configuration
from sea_jax.metrics import Interval, over_seeds, read_lines

WIN_RATE = "eval/rm_win_rate"
BEST_OF_N_WIN_RATE = "eval/bon_win_rate"
QUERIES = "misc/query_step"
GRADIENT_STEPS = "misc/gradient_steps"
LENGTH = "eval/rm_response_length"
INITIAL_LENGTH = "eval/initial_response_length"

REPORT = "report.md"
PICTURE = "win_rate.png"
EMBEDDED_PICTURE = f"![Win rate against queries and policy gradient steps]({PICTURE})"
MEASURES = {"policy": WIN_RATE, "best of N": BEST_OF_N_WIN_RATE}

SAMPLE_FIELDS = ("step", "prompt_id", "prompt", "reference", "initial", "response")
SETTINGS = {
    "policy": ("policy", "source"),
    "duel rule": ("exploration", "rule"),
    "loss": ("loss", "name"),
    "oracle": ("oracle", "kind"),
}
EXAMPLES = 5
PROMPT_CHARACTERS = 400
RESPONSE_CHARACTERS = 600
MOST_FIELDS_NAMED = 3  # in a method's label; if configurations differ in more, the work directory's name stands there
# Told apart in the common kinds of colour blindness: Okabe and Ito (2008), https://jfly.uni-koeln.de/color/.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
INTERVALS = (
    "Intervals are Student's t over seeds or, for a method with one seed, Wilson's over prompts. Seeds that were not "
    "evaluated at the same numbers of queries are compared by linear interpolation, as far as all of them have come."
)

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


def read(workdir: Path) -> Run:
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
    labels = [line for line in read_lines(paths["queries.jsonl"]) if line.get("event") != "ask"]
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
    left_out = configuration.MAY_DIFFER | {"name", "seed", "mesh"}
    flat = configuration.flatten(run.config)
    return {name: value for name, value in flat.items() if name not in left_out and not name.startswith("checkpoint.")}


def _draw_curve(axes: Axes, x: np.ndarray, intervals: Sequence[Interval], color: str, **line: Any) -> None:
    mean, low, high = (
        np.asarray([getattr(interval, name) for interval in intervals]) for name in ("mean", "low", "high")
    )
    if len(x) == 1:  # A band of no width would not be seen.
        spread = np.stack([mean - low, high - mean])
        axes.errorbar(x, mean, spread, color=color, capsize=4, clip_on=False, zorder=3, **line)
        return
    axes.fill_between(x, low, high, color=color, alpha=0.16, linewidth=0)
    axes.plot(x, mean, color=color, zorder=3, clip_on=False, **line)


def draw(runs: Sequence[Run], path: Path) -> None:
    """Draws the win rates against queries and against policy gradient steps.

    Args:
      runs: the runs, of which those with one label are drawn as one curve; each with at least one evaluation.
      path: where to write the PNG.
    """
    appearance = {
        "font.size": 10.5,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.edgecolor": "#666666",
        "axes.grid": True,
        "grid.color": "#E6E6E6",
        "xtick.color": "#444444",
        "ytick.color": "#444444",
        "lines.linewidth": 2.0,
        "lines.markersize": 5.0,
        "legend.frameon": False,
    }
    with style.context(["default", appearance]):
        figure = Figure(figsize=(9.6, 4.0), dpi=125, layout=ConstrainedLayoutEngine(wspace=0.05))
        panels = figure.subplots(1, 2, sharey=True)
        names = ((QUERIES, "oracle queries"), (GRADIENT_STEPS, "policy gradient steps"))
        for axes, (along, name) in zip(panels, names, strict=True):
            for index, (label, seeds) in enumerate(groups(runs).items()):
                color, marker = COLORS[index % len(COLORS)], MARKERS[index % len(MARKERS)]
                for measure, win_rate in MEASURES.items():
                    if found := curve(seeds, win_rate, along):
                        x = found.queries if along == QUERIES else found.gradient_steps
                        look: Line = {"marker": marker, "label": label}
                        if win_rate == BEST_OF_N_WIN_RATE:
                            look |= {"linestyle": "--", "markerfacecolor": "white", "label": f"{label}, {measure}"}
                        if len(seeds) > 1:
                            look["label"] += f" ({len(seeds)} seeds)"
                        _draw_curve(axes, x, found.intervals, color, **look)
            axes.axhline(0.5, color="#555555", linewidth=1.2, linestyle=(0, (4, 3)), zorder=2)
            axes.set_xlabel(name)
            axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True, steps=[1, 2, 5, 10]))
            axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
            axes.set_xlim(0, max(1.0, axes.get_xlim()[1]))
            axes.tick_params(length=0)
        panels[0].set_ylabel("win rate [95% interval]")
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper center", ncols=min(len(labels), 3))
        figure.savefig(path, metadata={"Software": None})


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _shown(interval: Interval) -> str:
    return f"{interval.mean:.3f} [{interval.low:.3f}, {interval.high:.3f}]"


def _header(run: Run) -> str:
    parts = [f"**{run.label}**"]
    if "seed" in run.config:
        parts.append(f"seed {run.config['seed']}")
    parts += [
        f"{what} `{run.config[section][field]}`"
        for what, (section, field) in SETTINGS.items()
        if field in run.config.get(section, {})
    ]
    steps = run.metrics[-1]["step"] if run.metrics else 0
    gradient_steps = max((line[GRADIENT_STEPS] for line in run.metrics if GRADIENT_STEPS in line), default=0)
    budget = f" of {run.config['max_queries']:,}" if "max_queries" in run.config else ""
    return (
        f"{', '.join(parts)}: {run.paid_labels:,}{budget} queries paid in {steps:,} training steps with "
        f"{gradient_steps:,} policy gradient steps. A query is one pair of responses labelled by the oracle."
    )


def _evaluation_section(run: Run) -> str:
    lines = evaluations(run)
    if not lines:
        return "This run holds no evaluation yet."
    header = ["queries", "policy steps", "win rate [95% interval]", "mean length (initial)", "best-of-N win rate"]
    rows = [
        [
            f"{line[QUERIES]:,}",
            f"{line[GRADIENT_STEPS]:,}",
            _shown(interval(line, WIN_RATE)),
            f"{line[LENGTH]:.1f} ({line[INITIAL_LENGTH]:.1f})",
            _shown(interval(line, BEST_OF_N_WIN_RATE)) if BEST_OF_N_WIN_RATE in line else "",
        ]
        for line in lines
    ]
    columns = len(header) if any(row[-1] for row in rows) else len(header) - 1
    return (
        _table(header[:columns], [row[:columns] for row in rows])
        + "\n\nWin rate: the share of held-out prompts on which the oracle prefers the response over the initial policy's, a "
        "tie counting half, with Wilson's interval over prompts. Length: tokens, in brackets those of the initial policy.\n\n"
        f"{EMBEDDED_PICTURE}"
    )


def _timing_section(run: Run) -> str:
    total_s: dict[str, float] = {}
    for line in run.metrics:
        for name, value in line.items():
            if name.endswith("_time") and not name.startswith("misc/"):
                total_s[name] = total_s.get(name, 0.0) + value
    if not total_s:
        return "No stage was timed."
    sum_s = sum(total_s.values())
    share = 1 / sum_s if sum_s > 0 else 0.0
    rows = [[f"`{name}`", f"{value:,.1f}", f"{value * share:.1%}"] for name, value in total_s.items()]
    return _table(["stage", "seconds", "share"], [*rows, ["total", f"{sum_s:,.1f}", ""]])


def _quoted(text: str, limit: int) -> str:
    if len(text) > limit:
        text = text[:limit].rstrip() + " ..."
    wrapped = [textwrap.fill(line, 110, break_long_words=False, break_on_hyphens=False) for line in text.splitlines()]
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", text)), default=0))
    return "\n".join([f"{fence}text", *wrapped, fence])


def _example_section(run: Run) -> str:
    if not run.samples:
        return "This run holds no samples yet."
    step = run.samples[-1]["step"]
    examples = [sample for sample in run.samples if sample["step"] == step][:EXAMPLES]
    parts = [f"The first {len(examples)} samples of the evaluation after training step {step:,}, not a selection."]
    for sample in examples:
        parts.append(f"### `{sample['prompt_id']}`")
        texts: tuple[tuple[str, str, int, dict[str, str]], ...] = (
            ("Prompt", "prompt", PROMPT_CHARACTERS, {}),
            ("Reference", "reference", RESPONSE_CHARACTERS, {}),
            ("Before", "initial", RESPONSE_CHARACTERS, {"reward": "initial_reward"}),
            ("After", "response", RESPONSE_CHARACTERS, {"reward": "reward", "win probability": "win_probability"}),
        )
        for title, field, limit, judged in texts:
            numbers = "".join(f", {what} {sample[name]:.3f}" for what, name in judged.items() if name in sample)
            if sample[field] or field != "reference":
                parts += [f"{title}{numbers}:", _quoted(sample[field], limit)]
    return "\n\n".join(parts)


def _file_section(workdir: Path) -> str:
    def size_bytes(path: Path) -> int:
        files = path.rglob("*") if path.is_dir() else [path]
        return sum(file.stat().st_size for file in files if file.is_file())

    # The report itself is left out, so that writing it again gives the same report.
    entries = sorted(path for path in workdir.iterdir() if path.name != REPORT)
    rows = [[f"`{path.name}{'/' if path.is_dir() else ''}`", f"{size_bytes(path):,}"] for path in entries]
    return _table(["file", "bytes"], rows)


def _write_report(output: Path, text: str) -> Path:
    output.mkdir(parents=True, exist_ok=True)
    report = output / REPORT
    report.write_text(text, encoding="utf-8")
    return report


def write(workdir: Path, output: Path | None = None) -> Path:
    """Writes report.md and, where there is an evaluation, win_rate.png for one run.

    Args:
      workdir: the directory the run wrote to.
      output: where to write; None is the work directory.

    Returns:
      The path of the report.

    Raises:
      FileNotFoundError: the work directory lacks a file.
      ValueError: a file is damaged.
    """
    run = read(workdir)
    output = workdir if output is None else output
    output.mkdir(parents=True, exist_ok=True)
    if evaluations(run):
        draw([run], output / PICTURE)
    labels = _table(
        ["labelled by", "pairs"], [["oracle (counted)", f"{run.paid_labels:,}"], ["ERM", f"{run.erm_labels:,}"]]
    )
    sections = (
        ("Evaluations", _evaluation_section(run)),
        ("Time by stage", _timing_section(run)),
        ("Labels", labels),
        ("Before and after", _example_section(run)),
        ("Files", _file_section(workdir)),
    )
    body = "\n\n".join(f"## {title}\n\n{text}" for title, text in sections)
    return _write_report(output, f"# {run.label}\n\n{_header(run)}\n\n{body}\n")


def comparison_table(runs: Sequence[Run]) -> str:
    """The win rates of several methods, each a mean over its seeds.

    Args:
      runs: runs of any methods and seeds.

    Returns:
      A Markdown table with one row per method and evaluation.
    """
    rows = []
    for label, seeds in groups(runs).items():
        found = [(title, curve(seeds, win_rate)) for title, win_rate in MEASURES.items()]
        if all(measured is None for _, measured in found):
            rows.append([label, "", str(len(seeds)), "", "", "no evaluation in common"])
        rows += [
            [label, title, str(len(seeds)), f"{queries:,.0f}", f"{gradient_steps:,.0f}", _shown(win_rate)]
            for title, measured in found
            if measured is not None
            for queries, gradient_steps, win_rate in zip(
                measured.queries, measured.gradient_steps, measured.intervals, strict=True
            )
        ]
    return _table(["method", "responses of", "seeds", "queries", "policy steps", "win rate [95% interval]"], rows)


def compare(runs: Sequence[Run], output: Path) -> Path:
    """Writes report.md and win_rate.png for several runs, those with one label taken as the seeds of one method.

    Args:
      runs: runs of any methods and seeds.
      output: where to write.

    Returns:
      The path of the report.
    """
    output.mkdir(parents=True, exist_ok=True)
    text = f"# {', '.join(groups(runs))}\n\n{comparison_table(runs)}\n\n{INTERVALS}\n"
    if any(curve(seeds) for seeds in groups(runs).values()):
        draw(runs, output / PICTURE)
        text += f"\n{EMBEDDED_PICTURE}\n"
    return _write_report(output, text)


def main() -> None:
    """Reads the command line, writes the report and says where it is."""
    parser = argparse.ArgumentParser(prog="python -m sea_jax.report", description="Writes the report of runs.")
    parser.add_argument("--workdir", type=Path, action="append", required=True, help="where a run wrote; repeatable")
    parser.add_argument("--output", type=Path, help="where to write; default: the work directory, if there is but one")
    arguments = parser.parse_args()
    if len(arguments.workdir) > 1 and arguments.output is None:
        parser.error("--output is needed with more than one --workdir")
    try:
        if len(arguments.workdir) == 1:
            report = write(arguments.workdir[0], arguments.output)
        else:
            runs = [read(workdir) for workdir in arguments.workdir]
            report = compare(runs, arguments.output)
            print(comparison_table(runs))
    except (FileNotFoundError, ValueError) as error:
        parser.error(str(error))
    print(report)


if __name__ == "__main__":
    main()
