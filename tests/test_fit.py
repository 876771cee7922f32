"""What fit says of a run against what a run takes, and against sums by hand."""

import subprocess
import sys
from pathlib import Path

import jax
import pytest

from configs import tldr
from sea_jax import fit, sharding, wiring
from sea_jax.models.config import ModelConfig
from tests import sharded_run

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("shape", [(1, 8, 1), (2, 2, 2)])
def test_what_is_held_is_what_a_run_puts_on_each_device(shape: tuple[int, ...], tmp_path: Path) -> None:
    sharded_run.write_models(tmp_path)
    config = sharded_run.configured(shape, tmp_path)
    mesh = sharding.make(shape)
    with jax.set_mesh(mesh):
        held, steps = fit.measure(config, mesh)
        parts = wiring.parts(config, mesh)
        state = wiring.initial_state(config, parts, total_steps=1000)

    def first_device_bytes(tree: object) -> int:
        return sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(tree))

    assert held["policy parameters"] == first_device_bytes((state.learner.trained, parts.policy.frozen))
    assert held["optimiser"] == first_device_bytes(state.learner.opt_state)
    assert held["reference"] == first_device_bytes(parts.policy.reference)
    assert held["ERM heads and replay"] == first_device_bytes((state.ensemble, state.replay))
    assert {step.name for step in steps} == {"train", "sample", "evaluate", "features", "ERM", "score"}
    assert all(step.temporary_bytes > 0 for step in steps)


def test_cached_keys_and_values_by_hand() -> None:
    # Pythia 1B, 128 prompts of 1024 tokens with 20 responses of 53 each: 16 layers x 2 x 2048 features of 2 bytes a token.
    model = fit.describe(tldr.POLICIES["1b"])
    assert isinstance(model, ModelConfig)
    how = wiring.SamplingConfig(num_samples=20, max_new_tokens=53, eos_ids=(0,), pad_id=0, dtype="bfloat16")
    size = fit.cache_bytes(model, how, 128, 1024, sharding.make((1, 8, 1)))
    assert size == 128 * (1024 + 20 * 53) * 16 * 2 * 2048 * 2 // 8


@pytest.mark.parametrize(("size", "parameters"), [("1b", 1.01e9), ("2.8b", 2.78e9), ("6.9b", 6.86e9)])
def test_published_sizes_are_those_that_the_names_promise(size: str, parameters: float) -> None:
    model = fit.describe(tldr.POLICIES[size])
    specs = jax.tree.leaves(fit.hf.abstract(model))
    assert sum(fit.math.prod(spec.shape) for spec in specs) == pytest.approx(parameters, rel=0.01)


def test_what_does_not_fit_says_how_much_is_missing() -> None:
    step = fit.Step("train", temporary_bytes=8 * 10**9, cache_bytes=0, compile_s=1.0)
    lines = fit.table(
        {"policy parameters": 10 * 10**9}, [step], {"small": 19 * 10**9, "large": 20 * 10**9}
    ).splitlines()
    assert "| small | 19.00 | no, 1.00 GB short |" in lines
    assert "| large | 20.00 | yes |" in lines


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--target=v9:2x2"], "--target=v9:2x2: it can be cpu, h100 or the topology of a TPU"),
        (["--config.mesh=(1,3,1)"], r"config.mesh=(1, 3, 1) (data, fsdp, tensor) does not fit"),
        (["--config.oracle.reward_model=builtin:tiny-random-llama"], "reward model"),
    ],
)
def test_bad_input_is_one_error(flags: list[str], message: str) -> None:
    command = [sys.executable, "-m", "sea_jax.fit", "--config=configs/tldr.py", "--devices=8", *flags]
    finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert finished.returncode == 1
    assert message in finished.stderr
    assert "Traceback" not in finished.stderr


@pytest.mark.slow
@pytest.mark.parametrize(("size", "parameters"), [("1b", 1.01), ("2.8b", 2.78), ("6.9b", 6.86)])
def test_the_papers_policies_fit_on_eight_gpus(size: str, parameters: float) -> None:
    command = [sys.executable, "-m", "sea_jax.fit", f"--config=configs/tldr.py:{size}", "--devices=8"]
    finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600, check=False)
    assert finished.returncode == 0, finished.stderr
    cells = [line.strip("| ").split(" | ") for line in finished.stdout.splitlines() if line.startswith("|")]
    sizes = {row[0]: row[1] for row in cells}
    # 14 bytes for each parameter, divided over 8 devices: f32 weights, two moments and a bf16 reference.
    found = sum(float(sizes[name]) for name in ("policy parameters", "optimiser", "reference"))
    assert found == pytest.approx(14 * parameters / 8, rel=0.01)
    fits = {row[0]: row[-1] for row in cells}
    assert fits["A100-80G"] == fits["H100"] == "yes"
