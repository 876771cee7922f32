"""What a run measures of itself: the stop on NaN, and the files that hold the numbers."""

import contextlib
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self, SupportsFloat

import numpy as np
from absl import logging

from sea_jax.runtime import files

Metrics = Mapping[str, SupportsFloat | str]


class NotFiniteError(FloatingPointError):
    """A metric of a training step is NaN or infinite."""


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
    records = files.read_lines(path)
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
        from tensorboardX import SummaryWriter  # brings PyTorch along where there is one, which takes seconds

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
