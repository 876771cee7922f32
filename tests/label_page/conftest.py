"""A store, and a page in a process of its own, as a run starts it."""

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from label_page.store import Rules, Store
from sea_jax.oracles.people import People, PeopleSettings

Opened = Callable[..., People]


@pytest.fixture
def over() -> threading.Event:
    """Set, nobody waits for people any more."""
    return threading.Event()


@pytest.fixture
def opened(tmp_path: Path, over: threading.Event) -> Iterator[Opened]:
    """Opens pages with settings of `people`, in the work directory tmp_path/run."""
    with ExitStack() as stack:

        def open_page(**settings: Any) -> People:
            found = People(PeopleSettings(**{"port": 0, "undo_s": 0.0} | settings))
            (tmp_path / "run").mkdir(exist_ok=True)
            stack.enter_context(found.open(tmp_path / "run", 24, over.is_set))
            return found

        yield open_page


@pytest.fixture
def make_store(tmp_path: Path) -> Iterator[Callable[..., Store]]:
    """Makes stores, each in a directory of its own."""
    made: list[Store] = []

    def make(**rules: Any) -> Store:
        plain = {"redundancy": 1, "lease_s": 60.0, "undo_s": 0.0, "slightly": 0.0, "check_every": 3}
        made.append(Store(tmp_path / str(len(made)), Rules(**plain | rules)))
        return made[-1]

    yield make
    for store in made:
        store.close()
