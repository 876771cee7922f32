"""What a run achieved, as report.md and win_rate.png, from nothing but the files in its work directory.

Read are
- config.json: "name" labels the method, "seed", the budget "max_queries", and what SETTINGS lists;
- metrics.jsonl: a line per training step. Evaluations stand on the lines that hold "eval/rm_response_length"; a name that ends
  in "_time" and does not begin with "misc/" is a stage's seconds, no stage lying inside another;
- queries.jsonl: a line per label, of which "counted" says whether it was paid for (else the ERM gave it), and lines whose
  "event" is "ask", which say what the oracle was asked;
- evaluations.jsonl, evaluations-alone.jsonl: the same of what evaluations asked, where there are such files;
- judge.sqlite: what chat models as oracle or judge were asked, and what that cost, where there is one;
- samples.jsonl: a line per held-out prompt and evaluation, with "initial_reward" and "reward", or "win_probability" and
  "judge_win_probability", or none of them, as oracle and judge can tell.

    python -m sea_jax.report --workdir=DIR
    python -m sea_jax.report --workdir=SEED0 --workdir=SEED1 --workdir=BASELINE0 --output=DIR
"""

import argparse
import re
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sea_jax import history
from sea_jax.statistics import Interval

if TYPE_CHECKING:
    from matplotlib.axes import Axes

REPORT = "report.md"
PICTURE = "win_rate.png"
EMBEDDED_PICTURE = f"![Win rate against queries and policy gradient steps]({PICTURE})"
SETTINGS = {
    "method": ("method",),
    "policy": ("policy", "source"),
    "duel rule": ("exploration", "rule"),
    "loss": ("loss", "name"),
    "oracle": ("oracle", "kind"),
}
TEXTS = {  # of what the responses are like without anybody's taste -> what it is called
    "eval/finished_ratio": "ended by themselves",
    "eval/distinct_words": "distinct words",
    "eval/repeated_trigrams": "with a repeated 3-gram",
    "eval/fluency": "fluency",
    "eval/reference_loss": "loss on references",
}
EXAMPLES = 10
PROMPT_CHARACTERS = 400
RESPONSE_CHARACTERS = 600
# Told apart in the common kinds of colour blindness: Okabe and Ito (2008), https://jfly.uni-koeln.de/color/.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
LOOKS: dict[str, tuple[str, history.Line]] = {  # of each win rate's curve: what stands behind the label, and the line
    history.WIN_RATE: ("", {}),
    history.JUDGE_WIN_RATE: (", by the judge", {"linestyle": ":"}),
    history.BEST_OF_N_WIN_RATE: (", best of N", {"linestyle": "--", "markerfacecolor": "white"}),
    history.BEST_OF_N_JUDGE_WIN_RATE: (", best of N by the judge", {"linestyle": ":", "markerfacecolor": "white"}),
}
INTERVALS = (
    "Intervals are Student's t over seeds or, for a method with one seed, Wilson's over prompts. Seeds that were not "
    "evaluated at the same numbers of queries are compared by linear interpolation, as far as all of them have come."
)


def _draw_curve(axes: "Axes", x: np.ndarray, intervals: Sequence[Interval], color: str, **line: Any) -> None:
    mean, low, high = (
        np.asarray([getattr(interval, name) for interval in intervals]) for name in ("mean", "low", "high")
    )
    if len(x) == 1:  # A band of no width would not be seen.
        spread = np.stack([mean - low, high - mean])
        axes.errorbar(x, mean, spread, color=color, capsize=4, clip_on=False, zorder=3, **line)
        return
    axes.fill_between(x, low, high, color=color, alpha=0.16, linewidth=0)
    axes.plot(x, mean, color=color, zorder=3, clip_on=False, **line)


def draw(runs: Sequence[history.Run], path: Path) -> None:
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
    # Takes seconds, and runs import this file long before they draw.
    from matplotlib import style
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    with style.context(["default", appearance]):
        figure = Figure(figsize=(9.6, 4.0), dpi=125, layout=ConstrainedLayoutEngine(wspace=0.05))
        panels = figure.subplots(1, 2, sharey=True)
        names = ((history.QUERIES, "oracle queries"), (history.GRADIENT_STEPS, "policy gradient steps"))
        for axes, (along, name) in zip(panels, names, strict=True):
            for index, (label, seeds) in enumerate(history.groups(runs).items()):
                color, marker = COLORS[index % len(COLORS)], MARKERS[index % len(MARKERS)]
                for win_rate, (told, appearance_of) in LOOKS.items():
                    if found := history.curve(seeds, win_rate, along):
                        x = found.queries if along == history.QUERIES else found.gradient_steps
                        look: history.Line = {"marker": marker, "label": f"{label}{told}"} | appearance_of
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


def _shown(line: history.Line, win_rate: str) -> str:
    return history.interval(line, win_rate).shown() if win_rate in line else ""


def _columns(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table without the columns in which nothing stands."""
    kept = [column for column in range(len(header)) if any(row[column] for row in rows)]
    return _table([header[column] for column in kept], [[row[column] for column in kept] for row in rows])


def _header(run: history.Run) -> str:
    parts = [f"**{run.label}**"]
    if "seed" in run.config:
        parts.append(f"seed {run.config['seed']}")
    for what, path in SETTINGS.items():
        found: Any = run.config
        for name in path:
            found = found.get(name, {})
        if found:
            parts.append(f"{what} `{found}`")
    steps = run.metrics[-1]["step"] if run.metrics else 0
    gradient_steps = max(
        (line[history.GRADIENT_STEPS] for line in run.metrics if history.GRADIENT_STEPS in line), default=0
    )
    budget = f" of {run.config['max_queries']:,}" if "max_queries" in run.config else ""
    return (
        f"{', '.join(parts)}: {run.paid_labels:,}{budget} queries paid in {steps:,} training steps with "
        f"{gradient_steps:,} policy gradient steps. A query is one pair of responses labelled by the oracle."
    )


def _evaluation_section(run: history.Run) -> str:
    lines = history.evaluations(run)
    if not lines:
        return "This run holds no evaluation yet."
    clocks = ["queries", "policy steps"]
    told = [[f"{line[history.QUERIES]:,}", f"{line[history.GRADIENT_STEPS]:,}"] for line in lines]
    measured = [
        [
            _shown(line, history.WIN_RATE),
            _shown(line, history.JUDGE_WIN_RATE),
            f"{line[history.LENGTH]:.1f} ({line[history.INITIAL_LENGTH]:.1f})",
            _shown(line, history.BEST_OF_N_WIN_RATE),
            _shown(line, history.BEST_OF_N_JUDGE_WIN_RATE),
        ]
        for line in lines
    ]
    header = [
        *("win rate [95% interval]", "judge's win rate", "mean length (initial)"),
        *("best-of-N win rate", "best-of-N judge's win rate"),
    ]
    parts = [
        _columns(clocks + header, [clock + row for clock, row in zip(told, measured, strict=True)]),
        "Win rate: the share of held-out prompts on which the oracle prefers the response over the initial policy's, a tie "
        "counting half, with Wilson's interval over prompts; the judge's: the same by whom nothing is learnt from. Length: "
        "tokens, in brackets those of the initial policy.",
    ]
    if found := history.exploited(lines):
        parts.insert(0, f"**Warning**: {history.exploitation(found)}.")
    if history.is_judged(run):
        parts.append(EMBEDDED_PICTURE)
    names = [
        named[win_rate] for win_rate in history.SAMPLED for named in (history.LENGTH_CONTROLLED, history.SIMILAR_LENGTH)
    ]
    similar = history.SIMILAR_LENGTH.values()
    if any(name in line for line in lines for name in names):
        rows = [
            clock
            + [
                _shown(line, name) + (f" ({line[f'{name}_pairs']})" if name in line and name in similar else "")
                for name in names
            ]
            for clock, line in zip(told, lines, strict=True)
        ]
        header = ["win rate at equal length", "at similar length (pairs)"]
        parts += [
            _columns([*clocks, *header, *(f"judge's {name}" for name in header)], rows),
            "At equal length: what a logistic regression on length, model and the instruction's difficulty predicts for "
            "responses as long as the initial policy's ([length-controlled AlpacaEval](https://arxiv.org/abs/2404.04475)). At "
            "similar length: among the pairs whose lengths differ by at most 10%. Lengths are in characters here.",
        ]
    if any(name in line for line in lines for name in TEXTS):
        rows = [
            clock + [f"{line[name]:.3f}" if name in line else "" for name in TEXTS]
            for clock, line in zip(told, lines, strict=True)
        ]
        parts += [
            _columns([*clocks, *TEXTS.values()], rows),
            "Distinct words: the share of a response's words that did not stand in it before. Fluency: mean log-prob of a "
            "token of the responses under the initial policy. Loss on references: of the policy, in nats per token of held-out "
            "human responses; where it rises, the policy forgets.",
        ]
    return "\n\n".join(parts)


def _timing_section(run: history.Run) -> str:
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


def _example_section(run: history.Run) -> str:
    if not run.samples:
        return "This run holds no samples yet."
    step = run.samples[-1]["step"]
    samples = [sample for sample in run.samples if sample["step"] == step]
    draw = np.random.default_rng(run.config.get("seed", 0))
    examples = [samples[i] for i in sorted(draw.permutation(len(samples))[:EXAMPLES])]
    parts = [
        f"{len(examples)} of the {len(samples):,} samples of the evaluation after training step {step:,}, drawn at random from "
        "the run's seed."
    ]
    after = {
        "reward": "reward",
        "win probability": "win_probability",
        "judge's win probability": "judge_win_probability",
    }
    for sample in examples:
        parts.append(f"### `{sample['prompt_id']}`")
        texts: tuple[tuple[str, str, int, dict[str, str]], ...] = (
            ("Prompt", "prompt", PROMPT_CHARACTERS, {}),
            ("Reference", "reference", RESPONSE_CHARACTERS, {}),
            ("Before", "initial", RESPONSE_CHARACTERS, {"reward": "initial_reward"}),
            ("After", "response", RESPONSE_CHARACTERS, after),
        )
        for title, field, limit, judged in texts:
            numbers = "".join(f", {what} {sample[name]:.3f}" for what, name in judged.items() if name in sample)
            if sample[field] or field != "reference":
                parts += [f"{title}{numbers}:", _quoted(sample[field], limit)]
    return "\n\n".join(parts)


def _spent_table(run: history.Run) -> str:
    """What chat models were asked, and what that cost."""
    rows = [
        [
            f"`{judge}`",
            *(f"{count:,}" for count in (spent.calls, spent.failed_calls, spent.unusable_answers)),
            *(f"{count:,}" for count in (spent.input_tokens, spent.output_tokens)),
            f"{spent.cost:.6g}",
        ]
        for judge, spent in run.spent.items()
    ]
    header = ["chat model", "calls", "failed", "unusable answers", "input tokens", "output tokens", "cost"]
    told = (
        "Calls of evaluations included. The cost is at the prices that were set; a call that broke off counts with the most "
        "that it can have cost."
    )
    return f"{_table(header, rows)}\n\n{told}"


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
    run = history.read_run(workdir)
    output = workdir if output is None else output
    output.mkdir(parents=True, exist_ok=True)
    if history.is_judged(run):
        draw([run], output / PICTURE)
    asked = [[f"{who}, by evaluations (not counted)", f"{count:,}"] for who, count in run.evaluation_answers.items()]
    labels = _table(
        ["labelled by", "pairs"],
        [["oracle (counted)", f"{run.paid_labels:,}"], ["ERM", f"{run.erm_labels:,}"], *asked],
    )
    if run.spent:
        labels += f"\n\n{_spent_table(run)}"
    sections = (
        ("Evaluations", _evaluation_section(run)),
        ("Time by stage", _timing_section(run)),
        ("Labels", labels),
        ("Before and after", _example_section(run)),
        ("Files", _file_section(workdir)),
    )
    body = "\n\n".join(f"## {title}\n\n{text}" for title, text in sections)
    return _write_report(output, f"# {run.label}\n\n{_header(run)}\n\n{body}\n")


def comparison_table(runs: Sequence[history.Run]) -> str:
    """The win rates of several methods, each a mean over its seeds.

    Args:
      runs: runs of any methods and seeds.

    Returns:
      A Markdown table with one row per method and evaluation.
    """
    rows = []
    for label, seeds in history.groups(runs).items():
        found = [(title, history.curve(seeds, win_rate)) for title, win_rate in history.COMPARED.items()]
        if all(measured is None for _, measured in found):
            rows.append([label, "", str(len(seeds)), "", "", "no evaluation in common"])
        rows += [
            [label, title, str(len(seeds)), f"{queries:,.0f}", f"{gradient_steps:,.0f}", win_rate.shown()]
            for title, measured in found
            if measured is not None
            for queries, gradient_steps, win_rate in zip(
                measured.queries, measured.gradient_steps, measured.intervals, strict=True
            )
        ]
    return _table(["method", "responses of", "seeds", "queries", "policy steps", "win rate [95% interval]"], rows)


def compare(runs: Sequence[history.Run], output: Path) -> Path:
    """Writes report.md and win_rate.png for several runs, those with one label taken as the seeds of one method.

    Args:
      runs: runs of any methods and seeds.
      output: where to write.

    Returns:
      The path of the report.
    """
    output.mkdir(parents=True, exist_ok=True)
    text = f"# {', '.join(history.groups(runs))}\n\n{comparison_table(runs)}\n\n{INTERVALS}\n"
    grouped = history.groups(runs).values()
    if any(history.curve(seeds, win_rate) for seeds in grouped for win_rate in history.MEASURES):
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
            runs = [history.read_run(workdir) for workdir in arguments.workdir]
            report = compare(runs, arguments.output)
            print(comparison_table(runs))
    except (FileNotFoundError, ValueError) as error:
        parser.error(str(error))
    print(report)


if __name__ == "__main__":
    main()
