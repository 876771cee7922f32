"""Runs on meshes of eight devices against the same run on one; the devices are the host's, see conftest.py."""

import functools
import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from sea_jax import agent, train, wiring
from sea_jax.config import resolve
from sea_jax.initial_state import initial_state
from sea_jax.models import partition
from sea_jax.models.mesh import make_mesh, resolve_mesh
from sea_jax.oracles.ledger import Ledger
from sea_jax.runtime import checkpoint
from sea_jax.workdir import saved_settings
from tests.programs import sharded_run
from tests.support import pair

MESHES = [(8, 1, 1), (1, 8, 1), (1, 1, 8), (2, 2, 2)]


def metrics(workdir: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if not name.endswith("_time")} for line in lines]


def ledger(workdir: Path) -> list[dict[str, Any]]:
    with Ledger(workdir / "queries.jsonl", writes=False) as labelled:
        return [{k: round(v, 4) if isinstance(v, float) else v for k, v in line.items()} for line in labelled.lines()]


def assert_equal_up_to_rounding(workdir: Path, other: Path) -> None:
    assert ledger(workdir) == ledger(other)
    for line, expected in zip(metrics(workdir), metrics(other), strict=True):
        assert line.keys() == expected.keys()
        for name, value in line.items():
            np.testing.assert_allclose(value, expected[name], rtol=2e-3, atol=2e-5, err_msg=f"{name} at {line['step']}")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("models")
    sharded_run.write_models(directory)
    return directory


@pytest.fixture(scope="module")
def on_mesh(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[tuple[int, ...]], Path]:
    """The work directory of a run on a mesh, which is made once."""

    @functools.cache
    def run(mesh: tuple[int, ...]) -> Path:
        workdir = tmp_path_factory.mktemp("mesh") / "run"
        train.train(sharded_run.configured(mesh, models), workdir)
        return workdir

    return run


@pytest.fixture(scope="module")
def on_one_device(on_mesh: Callable[[tuple[int, ...]], Path]) -> Path:
    return on_mesh((1, 1, 1))


@pytest.mark.slow
@pytest.mark.parametrize("mesh", MESHES)
def test_a_run_on_a_mesh_has_the_numbers_of_one_device(
    mesh: tuple[int, ...], on_mesh: Callable[[tuple[int, ...]], Path], on_one_device: Path
) -> None:
    assert_equal_up_to_rounding(on_mesh(mesh), on_one_device)


@pytest.mark.slow
def test_two_processes_make_one_run_and_a_signal_to_one_stops_both_which_then_go_on(
    models: Path, on_one_device: Path, tmp_path: Path
) -> None:
    workdir = tmp_path / "run"

    def one_step_done() -> bool:
        lines = workdir / "metrics.jsonl"
        return lines.exists() and len(lines.read_bytes().splitlines()) > 1

    # A device each: many of one host's threads in collectives of two processes can wait for each other when it is busy.
    run = functools.partial(
        pair.run, tmp_path, "tests.programs.sharded_run", "1,2,1", str(workdir), str(models), devices=1
    )
    run(ends=130, stop_second=one_step_done)
    before = metrics(workdir)
    assert 1 <= before[-1]["step"] < metrics(on_one_device)[-1]["step"]
    run()
    assert metrics(workdir)[: len(before)] == before
    assert_equal_up_to_rounding(workdir, on_one_device)
    assert metrics(workdir / "process-1") == metrics(workdir)
    assert not list(workdir.glob("process-1/queries*"))
    assert checkpoint.steps(workdir / "checkpoints")[-1] == checkpoint.steps(on_one_device / "checkpoints")[-1]


@pytest.fixture
def cubic() -> Iterator[jax.sharding.Mesh]:
    mesh = make_mesh((2, 2, 2))
    with jax.set_mesh(mesh):
        yield mesh


def test_policy_reference_optimiser_and_replay_are_divided_and_so_is_what_is_restored(
    cubic: jax.sharding.Mesh, models: Path, tmp_path: Path
) -> None:
    config = resolve(sharded_run.configured((2, 2, 2), models))
    parts = wiring.parts(config, cubic)
    state = initial_state(config, parts, total_steps=10)
    with checkpoint.open_directory(tmp_path, keep=1) as checkpoints:
        checkpoint.save(checkpoints, 0, state)
    with checkpoint.open_directory(tmp_path, keep=1) as checkpoints:
        restored = checkpoint.restore(checkpoints, state)
    assert restored is not None
    adam = [state.learner.opt_state[1][0].mu, restored[1].learner.opt_state[1][0].nu]
    for params in (parts.policy.reference, state.learner.trained, restored[1].learner.trained, *adam):
        stack = params["stacks"][0]
        assert stack["q"]["kernel"].sharding.shard_shape((2, 64, 64)) == (2, 32, 32)
        assert stack["down"]["kernel"].sharding.shard_shape((2, 64, 64)) == (2, 32, 32)
        assert params["embed"].sharding.shard_shape((258, 64)) == (129, 32)
        assert stack["attention_norm"]["scale"].is_fully_replicated
    shape = state.replay.features.shape
    for replay in (state.replay, restored[1].replay):
        assert replay.features.sharding.shard_shape(shape) == (shape[0] // 4, *shape[1:])


def test_an_axis_that_its_mesh_axes_do_not_divide_stays_whole() -> None:
    sizes = {"data": 2, "fsdp": 4, "tensor": 2}
    assert partition.spec(("vocab", "embed"), (258, 64), sizes) == PartitionSpec("tensor", "fsdp")
    assert partition.spec(("vocab", "embed"), (257, 62), sizes) == PartitionSpec()
    assert partition.spec((None, "heads"), (64, 64), sizes) == PartitionSpec(None, "tensor")
    assert partition.spec(("batch", None), (16, 3), sizes) == PartitionSpec(("data", "fsdp"))
    assert partition.spec(("layers", "embed"), (2, 64), {**sizes, "fsdp": 1}) == PartitionSpec()


def test_minus_one_takes_the_devices_that_are_left() -> None:
    assert resolve_mesh((1, -1, 1), 8) == (1, 8, 1)
    assert resolve_mesh((2, 2, -1), 8) == (2, 2, 2)
    assert resolve_mesh((1, 1, 1), 8) == (1, 1, 1)


@pytest.mark.parametrize("shape", [(3, -1, 1), (16, 1, 1), (2, 8, 1), (16, -1, 1)])
def test_a_mesh_that_the_devices_do_not_make_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"config.mesh=.*there are 8"):
        resolve_mesh(shape, 8)


@pytest.mark.parametrize(
    ("mesh", "fields", "message"),
    [
        ((8, 1, 1), {"data.batch_size": 12, "learner.microbatch_size": 12}, r"data.batch_size=12.*multiple of 8"),
        ((2, 4, 1), {"learner.microbatch_size": 4}, r"learner.microbatch_size=4.*multiple of 8"),
        ((1, 8, 1), {"eval.batch_size": 20}, r"eval.batch_size=20.*multiple of 8"),
        (
            (1, 1, 8),
            {"policy.source": "builtin:tiny-random-llama"},
            r"policy.source: its 4 attention heads.*of 8.*tensor",
        ),
        ((1, 1, 4), {"policy.source": "builtin:tiny-random-llama"}, r"policy.source: its 2 key and value heads.*of 4"),
        ((1, 8, 1), {"erm.trunk_batch_size": 12}, r"erm.trunk_batch_size=12.*multiple of 8"),
        (
            (1, 1, 4),
            {"oracle.reward_model": "builtin:tiny-random-llama-reward"},
            r"oracle.reward_model: its 2 key and value heads.*of 4",
        ),
    ],
)
def test_a_mesh_that_divides_neither_batch_nor_heads_is_refused(
    mesh: tuple[int, ...], fields: dict[str, Any], message: str, models: Path, tmp_path: Path
) -> None:
    config = sharded_run.configured(mesh, models)
    config.update_from_flattened_dict(fields)
    with pytest.raises(ValueError, match=message):
        train.train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_run_on_a_mesh_that_was_stopped_goes_on_to_the_same_numbers_bit_for_bit(
    models: Path,
    on_mesh: Callable[[tuple[int, ...]], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    undisturbed = on_mesh((2, 2, 2))
    config = sharded_run.configured((2, 2, 2), models)
    real_step = agent.step

    def interrupted(this: agent.Agent, state: agent.State, key: Any) -> Any:
        if state.step == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return real_step(this, state, key)

    monkeypatch.setattr(agent, "step", interrupted)
    with pytest.raises(SystemExit):
        train.train(config, tmp_path / "stopped")
    monkeypatch.setattr(agent, "step", real_step)
    train.train(config, tmp_path / "stopped")
    assert metrics(tmp_path / "stopped") == metrics(undisturbed)
    ledgers = [(workdir / "queries.jsonl").read_bytes() for workdir in (tmp_path / "stopped", undisturbed)]
    assert ledgers[0] == ledgers[1]


@pytest.mark.slow
def test_a_finished_run_is_taken_up_on_another_mesh(on_one_device: Path, models: Path, tmp_path: Path) -> None:
    workdir = Path(shutil.copytree(on_one_device, tmp_path / "run"))
    train.train(sharded_run.configured((2, 1, 1), models), workdir)
    assert metrics(workdir) == metrics(on_one_device)
    assert saved_settings(workdir).mesh == (2, 1, 1)
