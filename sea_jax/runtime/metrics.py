"""What a run measures of itself: the stop on NaN, and the files that hold the numbers."""

import contextlib
import importlib.util
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self, SupportsFloat

import numpy as np
from absl import logging

from sea_jax.runtime import files
from sea_jax.settings import setting, user_function

Metrics = Mapping[str, SupportsFloat | str]


TENSORBOARD, WANDB = "tensorboard", "wandb"


@dataclass(frozen=True)
class MetricsSettings:
    """Who is given the numbers besides metrics.jsonl."""

    writers: tuple[str, ...] = setting(
        (TENSORBOARD,),
        '"tensorboard", "wandb" (Weights & Biases; pip install wandb), my_module:my_writer; any of them, or none',
        (
            lambda v: all(name in (TENSORBOARD, WANDB) or name.count(":") == 1 for name in v),
            "tensorboard, wandb or my_module:my_function, or several of them",
        ),
    )


class Sink(Protocol):
    """Who is given the numbers of every step."""

    def write(self, step: int, numbers: Mapping[str, float], /) -> None: ...

    def close(self) -> None: ...


class WeightsAndBiases:
    """A run of Weights & Biases; what the environment says of project and mode (WANDB_PROJECT, WANDB_MODE) holds."""

    def __init__(self, directory: Path, name: str, run_id: str, about: Mapping[str, Any]) -> None:
        """Begins a run there, or goes on with that of the same id.

        Args:
          directory: for its files.
          name: shown to people.
          run_id: the same whenever the run goes on.
          about: the run's settings.
        """
        import wandb  # whoever does not name it need not have it

        self._run = wandb.init(dir=str(directory), name=name, id=run_id, resume="allow", config=dict(about))

    def write(self, step: int, numbers: Mapping[str, float]) -> None:
        """Hands on the numbers of a step."""
        self._run.log(dict(numbers), step=step, commit=True)

    def close(self) -> None:
        """Returns when all is handed on."""
        self._run.finish()


@dataclass(frozen=True)
class UserFunction:
    """A function of the user's, called as `my_writer(step, numbers)`."""

    function: Callable[[int, dict[str, float]], Any]

    def write(self, step: int, numbers: Mapping[str, float]) -> None:
        """Hands on the numbers of a step."""
        self.function(step, dict(numbers))

    def close(self) -> None:
        """There is nothing to close."""


def user_functions(settings: MetricsSettings) -> list[UserFunction]:
    """Returns the writers of the user's own.

    Raises:
      ValueError: there is no such function, or another writer is not installed.
    """
    if WANDB in settings.writers and importlib.util.find_spec(WANDB) is None:
        raise ValueError(f"config.metrics.writers={settings.writers}: wandb is not installed; pip install wandb")
    return [UserFunction(user_function(name, "metrics.writers")) for name in settings.writers if ":" in name]


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
    """Writes a run's numbers to metrics.jsonl, TensorBoard and others, and its sampled texts to samples.jsonl.

    A run that goes on from a checkpoint names its step: what the work directory holds of later steps is dropped, so
    that no step stands there twice. A run from step 0 begins with empty files.

    Args:
      workdir: the work directory; made if it does not exist.
      start_step: training steps already done, whose lines are kept.
      tensorboard: False: not there.
      others: who else is given the numbers; they are closed with the files.

    Raises:
      ValueError: start_step is negative, or a file of the work directory is damaged before its last line.
    """

    def __init__(
        self, workdir: Path, *, start_step: int = 0, tensorboard: bool = True, others: Sequence[Sink] = ()
    ) -> None:
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
        self._others = others
        self._tensorboard: Any = None
        if tensorboard:
            from tensorboardX import SummaryWriter  # it imports torch where that is, and settings need neither

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
        numbers = {name: float(value) for name, value in metrics.items() if not isinstance(value, str)}
        if self._tensorboard is not None:
            with _failure_named(self._workdir / "tensorboard"):
                for name, number in numbers.items():
                    self._tensorboard.add_scalar(name, number, step)
                self._tensorboard.flush()
        for other in self._others:
            other.write(step, numbers)

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
        for other in self._others:
            other.close()
        with _failure_named(self._workdir):
            try:
                if self._tensorboard is not None:
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
