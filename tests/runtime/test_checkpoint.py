import dataclasses
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import struct

from sea_jax.runtime import checkpoint
from tests.support.full_disk import full_disk


@struct.dataclass
class State:
    """Small and large arrays in all the containers that a run's state is made of."""

    weights: Any
    optimizer: Any
    step: int


def state(step: int) -> State:
    weights = {"w": jax.random.normal(jax.random.key(step), (64, 48)), "layers": (jnp.arange(5), jnp.float32(step))}
    return State(weights, optax.sgd(1.0, momentum=0.9).init(weights), step)


def assert_same(found: State, expected: State) -> None:
    def same(a: Any, b: Any) -> None:
        assert type(a) is type(b)
        np.testing.assert_array_equal(a, b)

    jax.tree.map(same, found, expected)


def restored(opened: checkpoint.Checkpointer) -> tuple[int, State]:
    found = checkpoint.restore(opened, state(0))
    assert found is not None
    return found


def written(directory: Path, *steps: int, keep: int = 3) -> None:
    with checkpoint.open_directory(directory, keep) as opened:
        for step in steps:
            checkpoint.save(opened, step, state(step))


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


@pytest.fixture(scope="module")
def master(tmp_path_factory) -> Path:
    """Checkpoints of the steps 1 to 3."""
    directory = tmp_path_factory.mktemp("master") / "checkpoints"
    written(directory, 1, 2, 3)
    return directory


@pytest.fixture
def directory(master, tmp_path) -> Path:
    return Path(shutil.copytree(master, tmp_path / "checkpoints"))


def test_every_save_is_kept_up_to_the_newest_few_however_fast_they_come(tmp_path):
    written(tmp_path, 1, 2, 3, 4, 4, 5, keep=2)
    assert names(tmp_path) == ["4", "5"]
    with checkpoint.open_directory(tmp_path, 2) as opened:
        step, found = restored(opened)
        assert step == 5
        assert_same(found, state(5))
        checkpoint.save(opened, 5, state(6))
    with checkpoint.open_directory(tmp_path, 2) as opened:
        assert_same(restored(opened)[1], state(5))  # what is there is left as it is


def test_an_empty_directory_has_nothing_to_restore(tmp_path):
    with checkpoint.open_directory(tmp_path / "new", 2) as opened:
        assert checkpoint.restore(opened, state(0)) is None


# ---- Damage


def test_whatever_file_is_cut_short_or_lost_a_state_that_is_restored_is_whole(directory, master, caplog):
    passed_over = 0
    for file in sorted(path.relative_to(master) for path in (master / "3").rglob("*") if path.is_file()):
        for lost in (True, False):
            shutil.rmtree(directory)
            shutil.copytree(master, directory)
            if lost:
                (directory / file).unlink()
            else:
                os.truncate(directory / file, (master / file).stat().st_size // 2)
            caplog.clear()
            with checkpoint.open_directory(directory, 3) as opened:
                step, found = restored(opened)
            assert step in (2, 3)  # Orbax writes some files that it does not need
            assert_same(found, state(step))
            said = [record.getMessage() for record in caplog.records if record.levelname in ("WARNING", "ERROR")]
            assert len(said) == 3 - step
            for message in said:
                assert message.startswith(f"{directory / '3'} cannot be read and is passed over, now as 3.damaged: ")
                assert len(message) < 1000
            passed_over += len(said)
    assert passed_over >= 6


def emptied(path: Path) -> None:
    shutil.rmtree(path)
    path.mkdir()


def unfinished(path: Path) -> None:
    """As a run that is killed while it saves leaves it."""
    path.rename(path.with_name(path.name + ".orbax-checkpoint-tmp"))


@pytest.mark.parametrize("damage", [emptied, lambda path: shutil.rmtree(path / "state"), unfinished])
def test_a_damaged_checkpoint_is_passed_over_and_its_step_saved_again(directory, damage):
    damage(directory / "3")
    for _ in range(2):
        with checkpoint.open_directory(directory, 3) as opened:
            step, found = restored(opened)
            assert step == 2
            assert_same(found, state(2))
    assert set(names(directory)) <= {"1", "2", "3.damaged"}
    written(directory, 3)
    with checkpoint.open_directory(directory, 3) as opened:
        assert_same(restored(opened)[1], state(3))


def test_a_damaged_checkpoint_does_not_count_as_kept(directory):
    emptied(directory / "3")
    with checkpoint.open_directory(directory, 1) as opened:
        assert restored(opened)[0] == 2
    written(directory, 4, keep=1)
    emptied(directory / "4")
    with checkpoint.open_directory(directory, 1) as opened, pytest.raises(ValueError, match=r"none of .* \[4\] can be"):
        checkpoint.restore(opened, state(0))


def test_when_no_checkpoint_can_be_read_the_run_stops_and_leaves_them(directory):
    for step in (1, 2, 3):
        emptied(directory / str(step))
    message = rf"{directory}: none of the checkpoints \[1, 2, 3\] can be read; the newest says: .*Move the directory"
    with checkpoint.open_directory(directory, 3) as opened, pytest.raises(ValueError, match=message):
        checkpoint.restore(opened, state(0))
    assert names(directory) == ["1", "2", "3"]


OTHER: dict[str, tuple[Callable[[dict[str, Any]], dict[str, Any]], str]] = {
    "shape": (lambda w: w | {"w": jnp.zeros((64, 32))}, r"weights/w is float32\[64, 48\] there, .*\[64, 32\] here"),
    "dtype": (lambda w: w | {"w": w["w"].astype(jnp.bfloat16)}, r"weights/w is float32.* there, and bfloat16.* here"),
    "more": (lambda w: w | {"bias": jnp.zeros(3)}, r"weights/bias is missing there, and float32\[3\] here"),
    "fewer": (lambda w: {"w": w["w"]}, r"weights/layers/0 is int32\[5\] there, and missing here"),
    "longer": (lambda w: w | {"layers": (*w["layers"], 1)}, r"weights/layers/2 is missing there, and int here"),
}


@pytest.mark.parametrize("case", OTHER)
def test_a_checkpoint_of_another_model_is_not_taken_for_a_damaged_one(directory, case):
    change, message = OTHER[case]
    like = dataclasses.replace(state(0), weights=change(state(0).weights))
    emptied(directory / "3")  # the one before a damaged one is looked at all the same
    with (
        checkpoint.open_directory(directory, 3) as opened,
        pytest.raises(ValueError, match=rf"{directory / '2'} is a checkpoint of another model: {message}"),
    ):
        checkpoint.restore(opened, like)
    assert names(directory) == ["1", "2", "3"]


# ---- A full disk


def save_on_a_full_disk(directory: Path, room: int, another: bool) -> None:
    with checkpoint.open_directory(directory, 3) as opened:
        with full_disk(room):
            checkpoint.save(opened, 4, state(4))
            while opened.is_saving_in_progress():
                time.sleep(0.01)
        if another:
            checkpoint.save(opened, 5, state(5))


@pytest.mark.parametrize(("room", "another"), [(0, True), (100, False), (5000, False), (5000, True)])
def test_a_save_that_fails_is_one_error_and_the_last_checkpoint_is_whole(directory, caplog, room, another):
    message = rf"{directory}: a checkpoint could not be written, the last whole one is that of step 3: .*File too large"
    with pytest.raises(OSError, match=message) as failed:
        save_on_a_full_disk(directory, room, another)
    assert len(str(failed.value)) < 1000
    assert not [record for record in caplog.records if "/orbax/" in record.pathname and record.levelname != "INFO"]
    with checkpoint.open_directory(directory, 3) as opened:
        step, found = restored(opened)
        assert step == 3
        assert_same(found, state(3))
        checkpoint.save(opened, 5, state(5))
    assert names(directory) == ["2", "3", "5"]  # nothing is left of the one that failed
