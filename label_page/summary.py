"""Who labelled how: `python -m label_page.summary --workdir=runs/people-seed0`; with --without=anna, what would change.

A row per person: pairs answered, the share of "left" among those that were decided, ties, pairs with both bad, skips, the
median of the seconds per pair, and how many of the checks were answered as they should be. Then, for every two people, how many
pairs both answered and of how many of these they said the same.
"""

import argparse
import itertools
import statistics
from collections.abc import Sequence
from pathlib import Path

from label_page.records import Record, read_records
from label_page.store import BOTH_BAD, SKIP, TIE


def side(label: float | None) -> int | None:
    """Returns which response a label prefers: 1 the left, -1 the right, 0 neither; None: it says nothing."""
    return None if label is None else (label > 0.5) - (label < 0.5)


def people_of(records: Sequence[Record]) -> list[str]:
    """Returns the names of all who said something."""
    return sorted({name for record in records for name in record.said})


def people_table(records: Sequence[Record]) -> str:
    """Returns the table of people in Markdown."""
    lines = ["| who | pairs | left | ties | both bad | skips | seconds | checks |", "| --- |" + " ---: |" * 7]
    for name in people_of(records):
        pairs = [record.said[name] for record in records if name in record.said and record.known is None]
        checks = [record for record in records if name in record.said and record.known is not None]
        verdicts = [said.verdict for said in pairs]
        labels = [said.label for said in pairs if said.label is not None]
        decided = [label for label in labels if label != 0.5]
        left = f"{sum(label > 0.5 for label in decided) / len(decided):.2f}" if decided else ""
        right = sum(side(record.said[name].label) == side(record.known) for record in checks)
        seconds = statistics.median(said.seconds for said in pairs) if pairs else 0.0
        counts = (verdicts.count(TIE), verdicts.count(BOTH_BAD), verdicts.count(SKIP))
        columns = (name, len(labels), left, *counts, f"{seconds:.1f}", f"{right} of {len(checks)}" if checks else "")
        lines.append("| " + " | ".join(map(str, columns)) + " |")
    return "\n".join(lines)


def agreement_table(records: Sequence[Record]) -> str:
    """Returns how often two people said the same of a pair, in Markdown; empty if no two answered the same pairs."""
    lines = []
    for one, other in itertools.combinations(people_of(records), 2):
        both = [
            (side(record.said[one].label), side(record.said[other].label))
            for record in records
            if {one, other} <= record.said.keys()
        ]
        answered = [sides for sides in both if None not in sides]
        if answered:
            same = sum(a == b for a, b in answered)
            lines.append(f"| {one}, {other} | {len(answered)} | {same} | {same / len(answered):.2f} |")
    head = ["| two people | both answered | the same | share |", "| --- | ---: | ---: | ---: |"]
    return "\n".join([*head, *lines]) if lines else ""


def what_changes(whole: Sequence[Record], rest: Sequence[Record]) -> str:
    """Returns in a sentence what becomes of the labels without some people's answers."""
    pairs = [(a.label(), b.label()) for a, b in zip(whole, rest, strict=True) if a.known is None]
    labelled = [(before, after) for before, after in pairs if before is not None]
    gone = sum(after is None for _, after in labelled)
    other = sum(after is not None and after != before for before, after in labelled)
    turned = sum(after is not None and side(after) != side(before) for before, after in labelled)
    return (
        f"Of {len(labelled)} labels {gone} have nobody behind them any more, and {other} change, {turned} of these to another "
        "side."
    )


def main() -> None:
    """Reads the command line and prints."""
    parser = argparse.ArgumentParser(
        prog="python -m label_page.summary", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workdir", type=Path, required=True, help="of the run")
    parser.add_argument("--without", default="", help="names of people, separated by commas")
    arguments = parser.parse_args()
    without = [name for name in arguments.without.split(",") if name]
    try:
        whole = read_records(arguments.workdir)
        rest = read_records(arguments.workdir, without)
    except (OSError, ValueError) as error:
        parser.exit(1, f"error: {error}\n")
    print(people_table(rest))
    if agreement := agreement_table(rest):
        print(f"\n{agreement}")
    if without:
        print(f"\n{what_changes(whole, rest)}")


if __name__ == "__main__":
    main()
