"""Several processes, one run: all compute, the first alone asks and writes."""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from sea_jax.types import Preference

Answer = TypeVar("Answer")


def connect(coordinator: str | None = None, num_processes: int | None = None, process_id: int | None = None) -> None:
    """Makes this process one of several.

    Args:
      coordinator: HOST:PORT of the first; None: the cluster tells.
      num_processes: how many there are.
      process_id: which one this is.
    """
    # On CPUs two programs could run at once and meet those of another process in another order: both would wait for ever.
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    jax.distributed.initialize(coordinator, num_processes, process_id)


def is_first() -> bool:
    """Returns whether this process is the one that asks the oracle and writes the ledger."""
    return jax.process_index() == 0


def any_of(flag: bool) -> bool:
    """Returns whether a flag is set in any process."""
    if jax.process_count() == 1:
        return flag
    return bool(multihost_utils.process_allgather(np.array(flag)).any())


def of_first(number: int) -> int:
    """Returns the first process's number in every process."""
    if jax.process_count() == 1:
        return number
    return int(multihost_utils.broadcast_one_to_all(np.int32(number)))


def tree_of_first(tree: Any) -> Any:
    """Returns the first process's arrays in every process.

    Args:
      tree: this process's, of the same shapes and dtypes as the first's; no dtype has 64 bits.
    """
    return tree if jax.process_count() == 1 else multihost_utils.broadcast_one_to_all(tree)


def bytes_of_first(content: bytes) -> bytes:
    """Returns the first process's bytes, fewer than 2^31, in every process; what the others give is not looked at."""
    if jax.process_count() == 1:
        return content
    size = of_first(len(content))
    own = np.frombuffer(content, np.uint8) if is_first() else np.zeros(size, np.uint8)
    return np.asarray(multihost_utils.broadcast_one_to_all(own)).tobytes() if size else b""


def fetch(tree: Any) -> Any:
    """Brings a tree's arrays to the host, whole, whichever processes hold their parts."""

    def whole(x: Any) -> np.ndarray:
        if not isinstance(x, jax.Array) or x.is_fully_addressable or x.is_fully_replicated:
            return np.asarray(x)
        return multihost_utils.process_allgather(x, tiled=True)

    return jax.tree.map(whole, tree)


def together(task: Callable[[], Answer], what: str) -> Answer:
    """Does something in every process; where it fails in one, all stop rather than wait for that one for ever.

    Args:
      task: what is done; it must not wait for other processes.
      what: is worked with, for the error of those in which it did not fail.

    Raises:
      ValueError: the task has failed in another process.
    """
    if jax.process_count() == 1:
        return task()
    try:
        answer = task()
    except BaseException:  # Ctrl-C must not leave the others waiting either
        any_of(True)
        raise
    if any_of(False):
        raise ValueError(f"another process failed with {what}; its message says why")
    return answer


def by_first(task: Callable[[], Answer], otherwise: Answer, what: str) -> Answer:
    """Lets the first process alone do something; where it fails, the others stop, too.

    Args:
      task: what it does.
      otherwise: what the others return.
      what: it works with, for the others' error.

    Raises:
      ValueError: in the others, when the task has failed.
    """
    return together(task if is_first() else lambda: otherwise, what)


def asked_by_first(preference: Preference) -> Preference:
    """Lets the first process ask a preference, once, and tells the others each answer as it comes.

    Every process must call it, with the same arguments.
    """
    if jax.process_count() == 1:
        return preference

    @functools.wraps(preference)  # whoever asks looks for the parameters of the preference's own
    def ask(prompts: Sequence[str], first: Sequence[str], second: Sequence[str], **names: Any) -> Any:
        said = by_first(lambda: preference(prompts, first, second, **names), None, "the oracle")
        if of_first(isinstance(said, Iterator)):
            return one_by_one(said)
        answer = by_first(lambda: np.asarray(said, np.float64), np.zeros(0), "the oracle")
        return np.frombuffer(bytes_of_first(answer.tobytes()))  # JAX would round float64 to float32

    def one_by_one(said: Any) -> Iterator[tuple[int, float]]:
        while True:
            answer = by_first(lambda: next(said, None), None, "the oracle")
            told = bytes_of_first(b"" if answer is None else np.asarray(answer, np.float64).tobytes())
            if not told:
                return
            row, probability = np.frombuffer(told)
            yield int(row), float(probability)

    return ask
