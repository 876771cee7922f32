"""What a run measures of itself: intervals, the stop on NaN, the files that hold the numbers, the progress bar."""

import contextlib
import json
import math
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self, SupportsFloat, TextIO

import numpy as np
from absl import logging
from scipy import special
from tensorboardX import SummaryWriter
from tqdm import tqdm

from sea_jax import files

CONFIDENCE = 0.95
PLAIN_LINE_INTERVAL_S = 5.0

Metrics = Mapping[str, SupportsFloat | str]


@dataclass(frozen=True)
class Interval:
    """A mean with its two-sided 95% confidence bounds.

    Args:
      mean: the estimate.
      low: lower bound; NaN when the values do not determine one.
      high: upper bound; NaN when the values do not determine one.
      count: how many values the estimate comes from.
    """

    mean: float
    low: float
    high: float
    count: int


class NotFiniteError(FloatingPointError):
    """A metric of a training step is NaN or infinite."""


def win_rate(wins: Sequence[float] | np.ndarray) -> Interval:
    """Share of prompts won, a tie counting half, with the Wilson score interval over prompts.

    Wilson (1927), https://doi.org/10.1080/01621459.1927.10502953; a tie enters as half a success, which makes the
    interval a little too wide.

    Args:
      wins: [N] 1 where the response won, 0 where it lost, 0.5 for a tie.

    Returns:
      The interval over the N prompts.

    Raises:
      ValueError: wins is empty, not one-dimensional, or holds another value.
    """
    values = np.asarray(wins, np.float64)
    if values.ndim != 1 or values.size == 0:
        raise ValueError(f"wins must be a non-empty sequence of 0, 0.5 and 1, found shape {values.shape}")
    if strange := sorted(set(values.tolist()) - {0.0, 0.5, 1.0}):
        raise ValueError(f"wins must hold only 0, 0.5 and 1, found {strange[:3]}")
    count = values.size
    mean = float(values.mean())
    z = float(special.ndtri((1 + CONFIDENCE) / 2))
    shrink = 1 + z**2 / count
    center = (mean + z**2 / (2 * count)) / shrink
    half_width = z * math.sqrt(mean * (1 - mean) / count + z**2 / (4 * count**2)) / shrink
    # Rounding may put a bound 1e-17 outside [0, 1], or on the wrong side of a mean of 0 or 1.
    return Interval(mean, max(0.0, min(mean, center - half_width)), min(1.0, max(mean, center + half_width)), count)


def over_seeds(values: Sequence[float] | np.ndarray) -> Interval:
    """Mean of one number per seed with the Student-t interval over seeds.

    Student (1908), https://doi.org/10.1093/biomet/6.1.1.

    Args:
      values: [N] one finite number per seed.

    Returns:
      The interval over the N seeds; its bounds are NaN for a single seed, which tells nothing of the spread.

    Raises:
      ValueError: values is empty, not one-dimensional, or holds a number that is not finite.
    """
    numbers = np.asarray(values, np.float64)
    if numbers.ndim != 1 or numbers.size == 0 or not np.isfinite(numbers).all():
        raise ValueError(f"values must be one finite number per seed, found {numbers.tolist()}")
    count = numbers.size
    mean = float(numbers.mean())
    if count == 1:
        return Interval(mean, math.nan, math.nan, 1)
    quantile = float(special.stdtrit(count - 1, (1 + CONFIDENCE) / 2))
    half_width = quantile * float(numbers.std(ddof=1)) / math.sqrt(count)
    return Interval(mean, mean - half_width, mean + half_width, count)


def check_finite(metrics: Metrics, step: int, last_checkpoint: str | None) -> None:
    """Stops a run whose numbers have broken, with a message that says where it can go on from.

    Args:
      metrics: name -> number of this step; text is skipped.
      step: the training step.
      last_checkpoint: where the last good checkpoint lies, None if there is none.

    Raises:
      NotFiniteError: a metric is NaN or infinite.
    """
    broken = {
        name: float(value)
        for name, value in metrics.items()
        if not isinstance(value, str) and not math.isfinite(float(value))
    }
    if not broken:
        return
    found = ", ".join(f"{name} is {value}" for name, value in broken.items())
    checkpoint = f"the last good checkpoint is {last_checkpoint}" if last_checkpoint else "there is no checkpoint yet"
    raise NotFiniteError(
        f"step {step}: {found}; {checkpoint}. The same settings would break again: try a lower learning rate, a longer "
        "warm-up, a smaller gradient-clipping norm, or float32 as the compute dtype."
    )


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSON Lines file; a last line that a killed run left torn is left out with a warning.

    Args:
      path: the file, one JSON object a line.

    Returns:
      The objects in the order of the file.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: a line other than the last is not a JSON object.
    """
    # Split as bytes: a torn line may end inside a character, and texts may hold line separators of Unicode's own.
    lines = path.read_bytes().split(b"\n")
    if lines[-1] == b"":
        lines.pop()
    records: list[dict[str, Any]] = []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
            if not isinstance(record, dict):
                raise ValueError(f"expected an object, found {type(record).__name__}")
        except ValueError as error:
            if number < len(lines):
                raise ValueError(f"{path}, line {number}: not a JSON object ({error})") from error
            logging.warning("%s: dropped the last line (%d), which is torn", path, number)
        else:
            records.append(record)
    return records


def _scalar(name: str, value: Any) -> float | int | str:
    plain = value.item() if hasattr(value, "item") and np.ndim(value) == 0 else value
    if not isinstance(plain, float | int | str) or (isinstance(plain, float) and not math.isfinite(plain)):
        raise ValueError(f"{name} must be a finite number or text, found {value!r}; leave out what has no value")
    return plain


def _line(record: Mapping[str, Any]) -> str:
    return json.dumps({name: _scalar(name, value) for name, value in record.items()}, ensure_ascii=False) + "\n"


@contextlib.contextmanager
def _failure_named(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise OSError(
            f"{path}: {error.strerror or error}. Make room and start the same command again: it goes on from the last "
            "checkpoint"
        ) from error


def _drop_after(path: Path, last_step: int) -> None:
    if not path.exists():
        return
    records = read_lines(path)
    for record in records:
        if not isinstance(record.get("step"), int):
            raise ValueError(f"{path}: every line needs a whole number as its step, found {record.get('step')!r}")
    kept = [record for record in records if record["step"] <= last_step]
    if len(kept) < len(records):
        logging.info("%s: dropped %d lines after step %d", path, len(records) - len(kept), last_step)
    files.write_whole(path, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in kept))


class Writer:
    """Writes a run's numbers to metrics.jsonl and TensorBoard, and its sampled texts to samples.jsonl.

    A run that goes on from a checkpoint names its step: what the work directory holds of later steps is dropped, so
    that no step stands there twice. A run from step 0 begins with empty files.

    Args:
      workdir: the work directory; made if it does not exist.
      start_step: training steps already done, whose lines are kept.

    Raises:
      ValueError: start_step is negative, or a file of the work directory is damaged before its last line.
    """

    def __init__(self, workdir: Path, *, start_step: int = 0) -> None:
        if start_step < 0:
            raise ValueError(f"start_step must be 0 or more, found {start_step}")
        workdir.mkdir(parents=True, exist_ok=True)
        # The line of step 0 is the evaluation before training, which a run from step 0 writes anew.
        first_step = start_step + 1 if start_step else 0
        files = [workdir / "metrics.jsonl", workdir / "samples.jsonl"]
        self._workdir = workdir
        for path in files:
            with _failure_named(path):
                _drop_after(path, first_step - 1)
        self._tensorboard = SummaryWriter(str(workdir / "tensorboard"), purge_step=first_step)
        self._metrics, self._samples = (path.open("a", encoding="utf-8") for path in files)

    def write(self, step: int, metrics: Metrics) -> None:
        """Appends one line for a training step; numbers go to TensorBoard too.

        Args:
          step: the training step.
          metrics: name -> finite number (Python, NumPy or a JAX scalar) or text, written in this order.

        Raises:
          ValueError: a value is neither a finite number nor text, or a metric is called "step".
          OSError: the disk is full or gone.
        """
        if "step" in metrics:
            raise ValueError(f'metrics must not hold "step" (found {metrics["step"]!r}): it is an argument of its own')
        line = _line({"step": step, **metrics})
        with _failure_named(self._workdir / "metrics.jsonl"):
            self._metrics.write(line)
            self._metrics.flush()
        with _failure_named(self._workdir / "tensorboard"):
            for name, value in metrics.items():
                if not isinstance(value, str):
                    self._tensorboard.add_scalar(name, float(value), step)
            self._tensorboard.flush()

    def sample(self, record: Mapping[str, Any]) -> None:
        """Appends one sampled text with its rewards.

        Args:
          record: {"step", "prompt_id", "prompt", "reference", "initial", "response", "initial_reward", "reward"};
              only "step" is needed here.

        Raises:
          ValueError: the record has no whole number as its step, or a value is neither a finite number nor text.
          OSError: the disk is full or gone.
        """
        if not isinstance(record.get("step"), int):
            raise ValueError(f"a sample needs a whole number as its step, found {record.get('step')!r}")
        line = _line(record)
        with _failure_named(self._workdir / "samples.jsonl"):
            self._samples.write(line)
            self._samples.flush()

    def close(self) -> None:
        """Closes the files.

        Raises:
          OSError: the disk is full or gone.
        """
        with _failure_named(self._workdir):
            try:
                self._tensorboard.close()
            except OSError:
                # It would try once more when the process ends, and print a traceback behind the error.
                events = self._tensorboard.file_writer.event_writer
                events._worker.stop()
                events._closed = True
                raise
            finally:
                self._metrics.close()
                self._samples.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with contextlib.suppress(*([OSError] if error else [])):  # what is wrong with the disk has been said
            self.close()


def _duration(seconds: float) -> str:
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"


def _described(values: Metrics) -> list[tuple[str, str]]:
    described = []
    for name, value in values.items():
        if not isinstance(value, str):
            number = float(value)
            value = f"{number:.0f}" if number.is_integer() else f"{number:.4g}"
        described.append((name, value))
    return described


class Progress:
    """A progress bar on a terminal; plain lines, at most one per 5 s, where the output is piped.

    Args:
      total: units in the whole run.
      unit: what is counted, such as "step".
      start: units done before this process began; rate and remaining time do not count them.
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
        self._bar = None
        if self._stream.isatty():
            # A terminal that does not tell its size counts as 80 x 24 here; tqdm would draw nothing on it.
            columns, lines = shutil.get_terminal_size()
            self._bar = tqdm(total=total, initial=start, unit=unit, file=self._stream, ncols=columns, nrows=lines)

    def update(self, done: int, values: Metrics, *, important: bool = False) -> None:
        """Shows how far the run is.

        Args:
          done: units done in all, those before this process included.
          values: name -> number or text to show beside it, such as {"queries": "48/320", "loss": 0.69}.
          important: print a line that stays, such as the one of an evaluation, even if the last was a moment ago.
        """
        now_s = self._clock()
        if self._bar is not None:
            self._bar.set_postfix_str(", ".join(f"{name}={text}" for name, text in _described(values)), refresh=False)
            self._bar.update(done - self._bar.n)
            if important:
                self._bar.write(self._line(done, values, now_s), file=self._stream)
        elif important or done >= self._total or now_s - self._last_line_s >= PLAIN_LINE_INTERVAL_S:
            self._last_line_s = now_s
            self._stream.write(self._line(done, values, now_s) + "\n")
            self._stream.flush()

    def _line(self, done: int, values: Metrics, now_s: float) -> str:
        elapsed_s = now_s - self._began_s
        here = done - self._start
        remaining = _duration(elapsed_s / here * (self._total - done)) if here > 0 else "?"
        parts = [f"{self._unit} {done}/{self._total}", *(f"{name} {text}" for name, text in _described(values))]
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
