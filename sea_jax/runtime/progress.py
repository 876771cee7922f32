"""How far a run is, on a terminal or in a log."""

import math
import shutil
import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import Self, TextIO

from tqdm import tqdm

from sea_jax.runtime import metrics

PLAIN_LINE_INTERVAL_S = 5.0


def _duration(seconds: float) -> str:
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"


def _texts(values: metrics.Metrics) -> list[tuple[str, str]]:
    texts = []
    for name, value in values.items():
        if not isinstance(value, str):
            number = float(value)
            value = f"{number:.0f}" if number.is_integer() else f"{number:.4g}"
        texts.append((name, value))
    return texts


class Progress:
    """A progress bar on a terminal; plain lines, at most one per 5 s, where the output is piped.

    Args:
      total: units in the whole run.
      unit: what is counted, such as "step".
      start: units done before this process began; rate and remaining time do not count them, nor the first one done here,
        in which programs are compiled, once there is another.
      stream: where to write; None is standard error.
      clock: seconds that only ever go forward.
    """

    def __init__(
        self,
        total: int,
        unit: str,
        start: int = 0,
        *,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._total, self._unit, self._start, self._clock = total, unit, start, clock
        self._stream = sys.stderr if stream is None else stream
        self._began_s = clock()
        self._last_line_s = -math.inf
        self._aside_s = 0.0
        self._first: tuple[int, float] | None = (
            None  # units done at the first update that did any, and seconds until then
        )
        self._bar = None
        if self._stream.isatty():
            # A terminal that does not tell its size counts as 80 x 24 here; tqdm would draw nothing on it.
            columns, lines = shutil.get_terminal_size()
            self._bar = tqdm(
                total=total,
                initial=start,
                unit=unit,
                file=self._stream,
                ncols=columns,
                nrows=lines,
                bar_format="{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}{postfix}]",  # it would count evaluations as units
            )

    def update(
        self,
        done: int,
        values: metrics.Metrics,
        *,
        important: bool = False,
        aside_s: float = 0.0,
        aside_left_s: float = 0.0,
    ) -> None:
        """Shows how far the run is.

        Args:
          done: units done in all, those before this process included.
          values: name -> number or text to show beside it, such as {"queries": "48/320", "loss": 0.69}.
          important: print a line that stays, such as the one of an evaluation, even if the last was a moment ago.
          aside_s: seconds since the last update that went to something else than units, such as an evaluation.
          aside_left_s: seconds that will still go there.
        """
        now_s = self._clock()
        self._aside_s += aside_s
        if self._first is None and done > self._start:
            self._first = done, now_s - self._began_s - self._aside_s
        remaining = self._remaining(done, now_s, aside_left_s)
        if self._bar is not None:
            shown = [*(f"{name}={text}" for name, text in _texts(values)), f"eta {remaining}"]
            self._bar.set_postfix_str(", ".join(shown), refresh=False)
            self._bar.update(done - self._bar.n)
            if important:
                self._bar.write(self._line(done, values, now_s, remaining), file=self._stream)
        elif important or done >= self._total or now_s - self._last_line_s >= PLAIN_LINE_INTERVAL_S:
            self._last_line_s = now_s
            self._stream.write(self._line(done, values, now_s, remaining) + "\n")
            self._stream.flush()

    def _remaining(self, done: int, now_s: float, aside_left_s: float) -> str:
        if self._first is None:
            return "?"
        first_done, first_s = self._first
        units, work_s = done - self._start, now_s - self._began_s - self._aside_s
        if done > first_done:
            units, work_s = done - first_done, work_s - first_s
        return _duration(work_s / units * (self._total - done) + aside_left_s)

    def _line(self, done: int, values: metrics.Metrics, now_s: float, remaining: str) -> str:
        elapsed_s = now_s - self._began_s
        parts = [f"{self._unit} {done}/{self._total}", *(f"{name} {text}" for name, text in _texts(values))]
        line = " ".join([*parts, f"elapsed {_duration(elapsed_s)}", f"eta {remaining}"])
        return "".join(character if character.isprintable() else " " for character in line)

    def close(self) -> None:
        """Leaves the bar as it stands and frees the terminal's line."""
        if self._bar is not None:
            self._bar.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
