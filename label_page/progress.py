"""How far a run is, from the metrics that it writes anyway."""

import json
import time
from pathlib import Path

WIN_RATES = ("eval/judge_win_rate", "eval/rm_win_rate")  # the first that is there
REREAD_S = 2.0
TAIL_BYTES = 2**18


class Progress:
    """Reads the last win rate of a run, not more often than every REREAD_S."""

    def __init__(self, metrics: Path) -> None:
        self._metrics = metrics
        self._read_at = -REREAD_S
        self._win_rate: float | None = None

    def win_rate(self) -> float | None:
        """Returns the last one that was measured; None: there is none yet."""
        if time.monotonic() - self._read_at >= REREAD_S:
            self._read_at = time.monotonic()
            self._win_rate = _last_win_rate(self._metrics)
        return self._win_rate


def _last_win_rate(metrics: Path) -> float | None:
    try:
        with metrics.open("rb") as file:
            file.seek(max(0, metrics.stat().st_size - TAIL_BYTES))
            lines = file.read().split(b"\n")
    except FileNotFoundError:
        return None
    for line in reversed(lines):
        if b"win_rate" not in line:
            continue
        try:
            row = json.loads(line)
        except ValueError:  # the first of them may be cut, the last may not be written whole
            continue
        found = [row[name] for name in WIN_RATES if name in row]
        if found:
            return float(found[0])
    return None
