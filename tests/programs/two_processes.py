"""What two processes do together, in a process of its own: python -m tests.programs.two_processes DIRECTORY COORDINATOR NUMBER.

Every function is told a directory of its own, which both share, and returns what is to be seen of it as JSON.
"""

import functools
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from sea_jax.actors.journal import Journal, Written
from sea_jax.oracles import labelling, preferences
from sea_jax.runtime import checkpoint, processes
from sea_jax.types import Candidates
from sea_jax.workdir import open_ledger
from tests.support.full_disk import full_disk


def said(task: Callable[[], Any]) -> str:
    """What a task that fails says."""
    try:
        task()
    except BaseException as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def state(step: int) -> dict[str, jax.Array]:
    """Numbers of which each process has a half."""
    halves = NamedSharding(jax.make_mesh((2,), ("data",)), PartitionSpec("data"))
    numbers = np.arange(step * 1000, step * 1000 + 4000, dtype=np.float32)
    return {"numbers": jax.make_array_from_callback(numbers.shape, halves, lambda index: numbers[index])}


def saved(directory: Path, *steps: int) -> None:
    with checkpoint.open_directory(directory, 3) as opened:
        for step in steps:
            checkpoint.save(opened, step, state(step))


def restored(directory: Path) -> list[float]:
    """The step and the first number, of this process."""
    with checkpoint.open_directory(directory, 3) as opened:
        found = checkpoint.restore(opened, state(0))
    assert found is not None
    return [found[0], float(found[1]["numbers"].addressable_data(0)[0])]


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def a_checkpoint_that_one_cannot_read(directory: Path) -> Any:
    """The second process's half is cut short; the run goes on from the one before, and saves again."""
    saved(directory, 1, 2)

    def cut() -> None:
        for path in (directory / "2").rglob("ocdbt.process_1/d/*"):
            os.truncate(path, path.stat().st_size // 2)

    processes.by_first(cut, None, "")
    parts = {"numbers": checkpoint.abstract(state(0)["numbers"])}
    read = checkpoint.read(directory, parts)[0]
    with checkpoint.open_directory(directory, 3) as opened:
        found = checkpoint.restore(opened, state(0))
        assert found is not None
        checkpoint.save(opened, 2, state(2))
    return read, found[0], restored(directory), names(directory)


def metadata_that_one_cannot_read(directory: Path) -> Any:
    """Fails in one process before it would come to the arrays."""
    saved(directory, 1, 2)
    with checkpoint.open_directory(directory, 3) as opened:
        real = opened.metadata

        def broken(step: int) -> Any:
            if step == 2 and not processes.is_first():
                raise OSError("stale file handle")
            return real(step)

        opened.metadata = broken  # type: ignore[method-assign]
        found = checkpoint.restore(opened, state(0))
        assert found is not None
        checkpoint.save(opened, 3, state(3))
    return found[0], restored(directory), names(directory)


def a_file_system_that_does_not_answer(directory: Path) -> Any:
    """Is no damage: both stop, and everything stays where it is."""
    saved(directory, 1)
    with checkpoint.open_directory(directory, 3) as opened:

        def late(*_: Any) -> Any:
            raise TimeoutError("timed out")

        if not processes.is_first():
            opened.load = late  # type: ignore[method-assign]
        error = said(lambda: checkpoint.restore(opened, state(0)))
    return error, names(directory)


def responses_of_the_first(directory: Path) -> Any:
    """Each process has a directory of its own, and what the first finds there is found by both."""
    own = directory / str(jax.process_index())
    journal = Journal(own, keep=1)
    before = journal.find(0) is None
    tokens = jnp.full((2, 3, 4), 7 + jax.process_index(), jnp.int32)
    candidates = Candidates(tokens, jnp.full((2, 3), 2), jnp.full((2, 3, 4), -0.1), jnp.zeros((2, 3, 0)))
    for number in range(3):
        journal.record(number, Written(candidates, 5, 0.01))
    journal.checkpointed(1)
    journal.checkpointed(2)
    found = journal.find(2)
    assert found is not None
    kept = [journal.find(number) is not None for number in range(3)]
    return (
        before,
        np.unique(found.candidates.tokens).tolist(),
        found.candidates.features.shape,
        found.version,
        found.logprob_gap,
        kept,
        own.exists(),
    )


def a_ledger_that_another_run_writes(directory: Path) -> Any:
    path = directory / "queries.jsonl"
    with open_ledger(path):
        return said(lambda: open_ledger(path))


def a_work_directory_that_is_not_shared(directory: Path) -> Any:
    own = directory / str(jax.process_index())
    own.mkdir()
    if processes.is_first():
        with labelling.Ledger(own / "queries.jsonl") as ledger:
            ledger.record([{"key": "1-0", "digest": "d", "label": 1.0, "counted": True}])
    return said(lambda: open_ledger(own / "queries.jsonl"))


def a_disk_that_is_full(directory: Path) -> Any:
    """Before the asks are written, and before the labels are: where the oracle was asked, it is said so."""
    asked: list[int] = []

    def preference(prompts: Sequence[str], first: Sequence[str], second: Sequence[str]) -> np.ndarray:
        asked.append(len(prompts))
        return np.full(len(prompts), 0.125 if first[0] == "first" else 0.875)  # whichever is shown first

    oracle = preferences.labelled(processes.asked_by_first(preference), preferences.soft)
    question = labelling.Question("1-0", 1, "0", "prompt", "first", "second", None)
    keys = jax.random.split(jax.random.key(0), 1)

    def label(own: Path) -> list[float]:
        with open_ledger(own / "queries.jsonl") as ledger:
            return labelling.label([question], oracle, ledger, keys)

    def label_on_a_full_disk(own: Path, room: int) -> list[float]:
        with open_ledger(own / "queries.jsonl") as ledger, full_disk(room if processes.is_first() else 1 << 30):
            return labelling.label([question], oracle, ledger, keys)

    errors, labels = [], []
    for room in (0, 180):
        own = directory / str(room)
        own.mkdir(exist_ok=True)
        errors.append(said(functools.partial(label_on_a_full_disk, own, room)))
        labels += label(own)
    return errors, labels, sum(asked)


def ctrl_c_in_the_first(directory: Path) -> Any:
    def stopped() -> None:
        raise KeyboardInterrupt

    return said(lambda: processes.by_first(stopped, None, "the oracle"))


SCENES: list[Callable[[Path], Any]] = [
    a_checkpoint_that_one_cannot_read,
    metadata_that_one_cannot_read,
    a_file_system_that_does_not_answer,
    responses_of_the_first,
    a_ledger_that_another_run_writes,
    a_work_directory_that_is_not_shared,
    a_disk_that_is_full,
    ctrl_c_in_the_first,
]


if __name__ == "__main__":
    processes.connect(sys.argv[2], 2, int(sys.argv[3]))
    seen = {}
    for scene in SCENES:
        own = Path(sys.argv[1]) / scene.__name__
        own.mkdir(exist_ok=True)
        seen[scene.__name__] = scene(own)
    (Path(sys.argv[1]) / f"seen-{sys.argv[3]}.json").write_text(json.dumps(seen))
