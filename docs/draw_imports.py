"""Draws which room of sea_jax imports which, read from the sources: `python -m docs.draw_imports` writes docs/imports.svg.

Rooms stand on the lines of the import rule. An arrow that a chain of others implies is left out, and arrows to the same room
run together.
"""

import html
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch
from matplotlib.path import Path as Curve
from scipy.optimize import isotonic_regression

from tests.test_imports import FILES, RULE, imports, name_of, room_of

PICTURE = Path(__file__).with_name("imports.svg")
SWEEPS = 40  # over the lines, down and up in turn, while the order of the rooms is looked for
BOX_WIDTH, BOX_HEIGHT, LANE_WIDTH = 1.9, 0.36, 0.3  # the distance of two lines is 1

Point = tuple[float, float]
Edge = tuple[str, str]  # room that imports, room that is imported


class Stop(NamedTuple):
    """A place on a line: the room itself, or where arrows to that room pass a line."""

    room: str
    line: int


def room_imports() -> set[Edge]:
    """Every import between two rooms."""
    found = {
        (room_of(name_of(file)), room_of(imported.split(".")[1]))
        for file in FILES
        for imported in imports(file.read_text())
        if imported.startswith("sea_jax.") and file.name != "__init__.py"
    }
    return {(above, below) for above, below in found if above != below}


def without_implied(edges: set[Edge]) -> set[Edge]:
    """The edges that no chain of others implies."""

    def reached(start: str) -> set[str]:
        below = {b for a, b in edges if a == start}
        return below.union(*map(reached, below))

    return {(a, b) for a, b in edges if not any(b in reached(other) for start, other in edges if start == a)}


def rule_lines() -> list[list[str]]:
    """The rooms of each line of the import rule, from the top."""
    return [line.split() for line in RULE.strip().splitlines()]


def routes(edges: set[Edge], lines: Sequence[Sequence[str]]) -> set[tuple[Stop, Stop]]:
    """The edges in pieces from one line to the next; edges to the same room share the places they pass."""
    line_of = {room: number for number, line in enumerate(lines) for room in line}
    return {
        (Stop(above if line == line_of[above] else below, line), Stop(below, line + 1))
        for above, below in edges
        for line in range(line_of[above], line_of[below])
    }


def crossings(order: Sequence[Sequence[Stop]], pieces: set[tuple[Stop, Stop]]) -> int:
    """How many pairs of pieces cross."""
    place = {stop: number for line in order for number, stop in enumerate(line)}
    count = 0
    for line in range(len(order) - 1):
        ends = np.array([(place[a], place[b]) for a, b in pieces if a.line == line])
        ahead = ends[:, None] - ends[None]
        count += int((ahead[..., 0] * ahead[..., 1] < 0).sum()) // 2
    return count


def ordered(pieces: set[tuple[Stop, Stop]], lines: Sequence[Sequence[str]]) -> list[list[Stop]]:
    """The stops of each line from left to right, each near the mean place of what it is joined to, with few crossings."""
    passed = {stop for piece in pieces for stop in piece}
    order = [
        sorted({Stop(room, number) for room in line} | {s for s in passed if s.line == number})
        for number, line in enumerate(lines)
    ]
    best = order
    for sweep in range(SWEEPS):
        downwards = sweep % 2 == 0
        order = [list(line) for line in order]
        for number in range(len(order)) if downwards else reversed(range(len(order))):
            place = {stop: (at + 0.5) / len(line) for line in order for at, stop in enumerate(line)}
            joined = neighbours(pieces, above=downwards)
            order[number].sort(key=lambda s: (np.mean([place[o] for o in joined.get(s, [s])]), s))
        best = min(best, order, key=lambda found: crossings(found, pieces))
    return best


def neighbours(pieces: set[tuple[Stop, Stop]], above: bool) -> dict[Stop, list[Stop]]:
    """What each stop is joined to on the line above it, or below it."""
    joined: dict[Stop, list[Stop]] = {}
    for upper, lower in sorted(pieces):
        joined.setdefault(lower if above else upper, []).append(upper if above else lower)
    return joined


def places(
    order: Sequence[Sequence[Stop]], pieces: set[tuple[Stop, Stop]], lines: Sequence[Sequence[str]]
) -> dict[Stop, float]:
    """Where each stop is from left to right: as near to what it is joined to as the widths on its line allow."""

    def width(stop: Stop) -> float:
        return BOX_WIDTH if stop.room in lines[stop.line] else LANE_WIDTH

    place: dict[Stop, float] = {}
    offsets = []
    for line in order:
        widths = np.array([width(stop) for stop in line])
        offsets.append(np.cumsum(widths) - widths / 2 - widths.sum() / 2)
        place |= dict(zip(line, offsets[-1].tolist(), strict=True))
    both = [neighbours(pieces, above=True), neighbours(pieces, above=False)]
    for _ in range(SWEEPS):
        for line, offset in zip(order, offsets, strict=True):
            wanted = [np.mean([place[o] for joined in both for o in joined.get(s, [])] or [place[s]]) for s in line]
            spread = isotonic_regression(
                np.array(wanted) - offset
            ).x  # least squares, neighbours at least a width apart
            place |= dict(zip(line, (spread + offset).tolist(), strict=True))
    return place


def edge_list(edges: set[Edge]) -> str:
    """The lines of the import rule, and behind each room what it imports, as text."""

    def of_room(room: str) -> str:
        return f"{room} ({', '.join(sorted(below for above, below in edges if above == room))})"

    return "; ".join(" ".join(map(of_room, sorted(line))) for line in rule_lines())


def drawn_edges(picture: Path) -> str:
    """What a picture says that it shows, as `edge_list` does."""
    (found,) = re.findall(r"<dc:description>(.*?)</dc:description>", picture.read_text(), flags=re.DOTALL)
    return html.unescape(found)


def arrow(start: Point, end: Point, head: str, colour: Any) -> FancyArrowPatch:
    """An arrow, or a piece of one, that leaves and arrives upright."""
    middle = (start[1] + end[1]) / 2
    curve = Curve([start, (start[0], middle), (end[0], middle), end], [Curve.MOVETO, *[Curve.CURVE4] * 3])
    return FancyArrowPatch(
        path=curve, arrowstyle=head, mutation_scale=9, color=colour, linewidth=1.1, capstyle="round", zorder=1
    )


def box(x: float, y: float, colour: Any) -> FancyBboxPatch:
    """A room's box around its middle."""
    width, shape = 0.84 * BOX_WIDTH, "round,pad=0,rounding_size=0.06"
    return FancyBboxPatch(
        (x - width / 2, y - BOX_HEIGHT / 2),
        width,
        BOX_HEIGHT,
        boxstyle=shape,
        facecolor="white",
        edgecolor=colour,
        linewidth=1.2,
        zorder=2,
    )


def draw(picture: Path) -> None:
    """Writes the picture; the same sources give the same file."""
    lines, edges = rule_lines(), without_implied(room_imports())
    pieces = routes(edges, lines)
    place = places(ordered(pieces, lines), pieces, lines)
    rooms = [room for line in lines for room in line]
    colour = {room: matplotlib.colormaps["Dark2"](number % 8) for number, room in enumerate(rooms)}
    edge = BOX_WIDTH / 2 + 0.1
    left, right = min(place.values()) - edge, max(place.values()) + edge
    figure = Figure(figsize=(right - left, len(lines)))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(left, right), ylim=(len(lines) - 0.5, -0.5))
    axes.axis("off")
    for number in range(0, len(lines), 2):
        axes.axhspan(number - 0.5, number + 0.5, color="0.96", linewidth=0, zorder=0)
    for upper, lower in sorted(pieces):
        begins, ends = upper.room in lines[upper.line], lower.room in lines[lower.line]
        start = (place[upper], upper.line + (BOX_HEIGHT / 2 if begins else 0))
        end = (place[lower], lower.line - (BOX_HEIGHT / 2 if ends else 0))
        axes.add_patch(arrow(start, end, "-|>" if ends else "-", colour[lower.room]))
    for number, line in enumerate(lines):
        for room in line:
            x = place[Stop(room, number)]
            axes.add_patch(box(x, number, colour[room]))
            axes.text(x, number, room, ha="center", va="center", fontsize=9, zorder=3)
    with matplotlib.rc_context({"svg.hashsalt": "sea_jax", "svg.fonttype": "path"}):
        figure.savefig(picture, metadata={"Date": None, "Creator": None, "Description": edge_list(edges)})


if __name__ == "__main__":
    draw(PICTURE)
