"""Tables and figures of files of results, whichever laboratory they come from.

python -m experiments.report docs/results/bandit.json --output=docs/results/bandit
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib import style
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter

from experiments import results
from experiments.results import Results
from sea_jax.report import COLORS, MARKERS
from sea_jax.statistics import Interval, label_gain, labels_to_reach, over_seeds, paired

STYLES = ("-", "--", ":")
JUDGES = {"oracle": "by the oracle", "judge": "by the judge"}
LEVELS = (0.6, 0.7, 0.8)
OTHERS = {  # measures of which the mean is shown, as far as a laboratory takes them
    "erm_accuracy": "ERM accuracy",
    "kl": "KL",
    "length": "length",
    "policy_steps": "policy steps",
    "seconds": "seconds of steps",
}


def known_by_all(curves: np.ndarray) -> np.ndarray:
    """Returns which points of curves [S, Q] every seed has come to."""
    return np.isfinite(curves).all(0)


def shown(interval: Interval) -> str:
    """Returns it as it stands in tables."""
    return f"{interval.mean:.3f} [{interval.low:.3f}, {interval.high:.3f}]"


def gain(found: Results, recipe: str, baseline: str, measure: str) -> str:
    """Returns the label gain over a baseline at the last point, or why there is none."""
    ours, theirs = found.curves[recipe][measure], found.curves[baseline][measure]
    points = known_by_all(ours) & known_by_all(theirs) & (found.queries > 0)
    labels = found.queries[points]
    if len(labels) < 2 or (ours[:, points].mean(0) >= 1).any():
        return "no curve"
    interval = label_gain(labels, ours[:, points], theirs[:, points], float(labels[-1]))
    return f"{interval.mean:.2f} [{interval.low:.2f}, {interval.high:.2f}]"


def table(found: Results, baseline: str, who: str) -> str:
    """Returns one row per recipe: what it has come to at the last point that each of its seeds and the baseline's have reached.

    Args:
      found: Results.
      baseline: the recipe that the others are compared with.
      who: is evaluated, "policy", "greedy" or "best_of_n".
    """
    by_oracle, by_judge = f"{who}/oracle", f"{who}/judge"
    head = [
        "recipe",
        "rate",
        "labels",
        "win rate, oracle",
        "win rate, judge",
        "judge, minus baseline",
        "label gain, oracle",
    ]
    head += ["label gain, judge", *(f"labels to {level}, judge" for level in LEVELS)]
    if has_regret := "cumulative_regret" in found.curves[baseline]:
        head += ["regret", "online win rate"]
    others = {name: called for name, called in OTHERS.items() if name in found.curves[baseline]}
    head += others.values()
    lines = [head, ["---", *["---:"] * (len(head) - 1)]]
    for name, measures in found.curves.items():
        against = found.curves[baseline]
        points = np.flatnonzero(known_by_all(measures[by_judge]) & known_by_all(against[by_judge]))
        labels, mean = found.queries[points], measures[by_judge][:, points].mean(0)
        spent, end = labels[-1], {measure: values[:, points[-1]] for measure, values in measures.items()}
        lines.append(
            [
                name,
                f"{found.recipes[name]['rate']:g}",
                f"{spent:.0f}",
                shown(over_seeds(end[by_oracle])),
                shown(over_seeds(end[by_judge])),
                shown(paired(end[by_judge], against[by_judge][:, points[-1]])),
                *(gain(found, name, baseline, measure) for measure in (by_oracle, by_judge)),
                *(f"{labels_to_reach(labels, mean, level):.0f}" for level in LEVELS),
            ]
        )
        if has_regret:
            lines[-1] += [shown(over_seeds(end["cumulative_regret"] / spent)), f"{(end['online'] / spent).mean():.3f}"]
        lines[-1] += [f"{end[each].mean():.3g}" for each in others]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def draw(found: Results, names: Sequence[str], who: str, path: Path) -> None:
    """Draws win rates by oracle and judge against labels, on a log axis, and against policy steps; bands are 95% over seeds.

    Args:
      found: Results.
      names: the recipes.
      who: is evaluated, as for `table`.
      path: where to write the PNG.
    """
    with style.context(["default", {"font.size": 9.5, "axes.spines.top": False, "axes.spines.right": False}]):
        figure = Figure(figsize=(11.0, 7.0), dpi=110, layout="constrained")
        panels = figure.subplots(2, 2, sharex="col")
        for row, (by, title) in zip(panels, JUDGES.items(), strict=True):
            for index, name in enumerate(names):
                curves = found.curves[name][f"{who}/{by}"]
                points = known_by_all(curves) & (found.queries > 0)
                intervals = [over_seeds(column) for column in curves[:, points].T]
                mean, low, high = (np.array([getattr(i, part) for i in intervals]) for part in ("mean", "low", "high"))
                steps = found.curves[name]["policy_steps"][:, points].mean(0)
                look = {
                    "color": COLORS[index % len(COLORS)],
                    "marker": MARKERS[index % len(MARKERS)],
                    "linestyle": STYLES[index // len(COLORS) % len(STYLES)],
                    "markersize": 4,
                    "label": name,
                }
                for axes, x in zip(row, (found.queries[points], steps), strict=True):
                    axes.plot(x, mean, **look)
                    axes.fill_between(x, low, high, color=look["color"], alpha=0.15, linewidth=0)
            row[0].set_ylabel(f"win rate {title}")
            for axes in row:
                axes.axhline(0.5, color="#555555", linewidth=1, linestyle=(0, (4, 3)))
                axes.grid(color="#E6E6E6")
        panels[1][0].set_xscale("log")
        panels[1][0].xaxis.set_major_locator(LogLocator(2, numticks=8))
        panels[1][0].xaxis.set_major_formatter(ScalarFormatter())
        panels[1][0].xaxis.set_minor_formatter(NullFormatter())
        panels[1][0].set_xlabel("oracle labels (log axis)")
        panels[1][1].set_xlabel("policy steps")
        handles, labels = panels[0][0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside right upper", frameon=False)
        figure.savefig(path, metadata={"Software": None})


def main() -> None:
    """Writes OUTPUT.md and OUTPUT.png."""
    parser = argparse.ArgumentParser(prog="python -m experiments.report", description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path, help="a file that a laboratory wrote")
    parser.add_argument("--baseline", default="passive", help="the recipe that the others are compared with")
    parser.add_argument("--who", choices=("policy", "greedy", "best_of_n"), default="policy", help="is evaluated")
    parser.add_argument("--output", type=Path, required=True, help="where to, without .md and .png")
    arguments = parser.parse_args()
    found = results.read(arguments.results)
    if arguments.baseline not in found.curves:
        parser.error(f"--baseline={arguments.baseline}: {arguments.results} holds {', '.join(found.curves)}")
    draw(found, list(found.curves), arguments.who, arguments.output.with_suffix(".png"))
    about = found.about
    seeds = len(next(iter(found.curves[arguments.baseline].values())))
    text = (
        f"# {arguments.results.stem}: {arguments.who}\n\n`{about['command']}`, commit {about['commit'][:12]}, "
        f"{about['machine']}, {seeds} seeds.\n\n{table(found, arguments.baseline, arguments.who)}\n\n"
        "In brackets: 95% intervals over seeds, of a difference seed by seed, of a label gain by resampling seeds. A label "
        "gain is how many times as many labels the baseline needs for the recipe's last win rate, by curves "
        "1 - (n / a)^-b / 2 fitted to both; beyond the baseline's last label it is continued, not measured. "
        f"{'Regret is per label, in logits.' if 'cumulative_regret' in found.curves[arguments.baseline] else ''}\n\n"
        f"![Win rates against labels and policy steps]({arguments.output.with_suffix('.png').name})\n"
    )
    arguments.output.with_suffix(".md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
