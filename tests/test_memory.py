"""What fit says of a run against what a run takes, and against sums by hand."""

import dataclasses
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import pytest

from configs import tldr, ultrafeedback
from sea_jax import ensemble, features, memory, wiring
from sea_jax.actors import generation
from sea_jax.config import RunSettings, resolve, unchecked
from sea_jax.data.prompts import evaluation_batches
from sea_jax.heldout import heldout_evaluation
from sea_jax.initial_state import initial_state
from sea_jax.models.checkpoints import tiny_random
from sea_jax.models.config import ModelConfig
from sea_jax.models.mesh import make_mesh
from sea_jax.oracles.ledger import Ledger
from sea_jax.types import Array, Candidates, Params, Prompts
from tests.programs import sharded_run
from tests.support import tiny

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("shape", [(1, 8, 1), (2, 2, 2)])
def test_what_is_held_is_what_a_run_puts_on_each_device(shape: tuple[int, ...], tmp_path: Path) -> None:
    sharded_run.write_models(tmp_path)
    config = resolve(sharded_run.configured(shape, tmp_path))
    mesh = make_mesh(shape)
    with jax.set_mesh(mesh):
        held, steps = memory.measure(config, mesh)
        parts = wiring.parts(config, mesh)
        state = initial_state(config, parts, total_steps=1000)

    def first_device_bytes(tree: object) -> int:
        return sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(tree))

    assert held["policy parameters"] == first_device_bytes((state.learner.trained, parts.policy.frozen))
    assert held["optimiser"] == first_device_bytes(state.learner.opt_state)
    assert held["reference"] == first_device_bytes(parts.policy.reference)
    assert held["ERM heads and replay"] == first_device_bytes((state.ensemble, state.replay))
    assert {step.name for step in steps} == {"train", "sample", "evaluate", "features", "ERM", "score"}
    assert all(step.temporary_bytes > 0 for step in steps)


def settings_of(config: ml_collections.ConfigDict) -> RunSettings:
    """Settings that need not work together: what is measured here does not run."""
    settings = unchecked(config)
    assert isinstance(settings, RunSettings)
    return settings


Planned = tuple[dict[str, int], dict[str, Callable[[], Any]]]  # bytes that are held; what lowers each step


@pytest.fixture
def config(tmp_path: Path) -> ml_collections.ConfigDict:
    """The tiny configuration on two devices, with no two sizes alike where they could be mistaken for each other."""
    sharded_run.write_models(tmp_path)
    config = sharded_run.configured((1, 2, 1), tmp_path)
    config.sampling.batch_size, config.sampling.temperature = 4, 0.6
    config.eval.batch_size, config.eval.max_new_tokens = 6, 5
    return config


@pytest.fixture
def mesh() -> Iterator[jax.sharding.Mesh]:
    mesh = make_mesh((1, 2, 1), jax.devices()[:2])
    with jax.set_mesh(mesh):
        yield mesh


@pytest.fixture
def plan(monkeypatch: pytest.MonkeyPatch, mesh: jax.sharding.Mesh) -> Callable[[ml_collections.ConfigDict], Planned]:
    """Measures without compiling."""

    def planned(config: ml_collections.ConfigDict) -> Planned:
        lowers: dict[str, Callable[[], Any]] = {}

        def note(name: str, step: Callable[[], Any], platform: str, cache_bytes: int = 0) -> memory.Step:
            lowers[name] = step
            return memory.Step(name, 1, cache_bytes, 0.0)

        monkeypatch.setattr(memory, "compiled", note)
        return memory.measure(settings_of(config), mesh)[0], lowers

    return planned


def test_what_is_written_and_read_again_is_what_a_run_writes_and_reads(
    config: ml_collections.ConfigDict,
    mesh: jax.sharding.Mesh,
    plan: Callable[[ml_collections.ConfigDict], Planned],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    config.erm.trunk, config.eval.best_of_n = "", 3
    config.oracle.kind = "configs.tiny_random:prefers_many_es"
    calls: set[object] = set()

    class Generate:
        """In place of the sampler: notes how it is called or lowered, and writes one token to each prompt."""

        def lower(self, params: Params, prompts: Prompts, key: Array, *, config: object, sampling: Any) -> None:
            calls.add((len(prompts.tokens), dataclasses.replace(sampling, eos_ids=(0,), pad_id=0)))

        def __call__(
            self, params: Params, prompts: Prompts, key: Array, *, config: object, sampling: Any, **fewer_rows: Any
        ) -> Candidates:
            self.lower(params, prompts, key, config=config, sampling=sampling)
            shape = (len(prompts.tokens), sampling.num_samples, sampling.max_new_tokens)
            tokens = jnp.zeros(shape, jnp.int32)
            return Candidates(tokens, jnp.ones(shape[:2], jnp.int32), jnp.zeros(shape), jnp.zeros((*shape[:2], 0)))

    class Read:
        """In place of the features' forward pass, likewise."""

        def lower(self, params: Params, prompts: Prompts, tokens: Array, lengths: Array, **how: Any) -> None:
            assert prompts.tokens.shape[:1] == tokens.shape[:1]
            calls.add((jax.tree.structure(params), tokens.shape, lengths.shape, *how.values()))

        def __call__(
            self, params: Params, prompts: Prompts, tokens: Array, lengths: Array, *, rows: int | None, **how: Any
        ) -> Array:
            self.lower(params, prompts, tokens, lengths, **how)  # for all rows, the most there can be
            return jnp.zeros((*lengths.shape, 64))

    monkeypatch.setattr(generation, "generate", Generate())
    monkeypatch.setattr(features, "response_features", Read())
    _, lowers = plan(config)
    for name in ("sample", "evaluate", "best of N", "features", "best-of-N features"):
        lowers[name]()
    compiled, calls = calls, set()
    assert len(compiled) == 5

    settings = settings_of(config)
    parts = wiring.parts(settings, mesh)
    trained, key = parts.policy.reference, jax.random.key(0)
    batch, _ = next(evaluation_batches(parts.train_prompts, batch_size=8, **parts.padding(32)))
    with wiring.responder(settings, parts, lambda number: batch, tmp_path / "responses") as responder:
        asked = Prompts(jnp.asarray(batch["tokens"]), jnp.asarray(batch["valid"]))
        candidates, _ = responder.respond(0, trained, asked, key, 0)
    parts.features(batch, candidates, ())
    heldout = heldout_evaluation(settings, parts, settings.eval.best_of_n, [Ledger(tmp_path / "evaluations.jsonl")])
    heads = ensemble.init(settings.erm, parts.num_features, key)
    heldout.best_of_n(trained, heads, 0)
    assert calls == compiled


def test_objectives_are_counted_in_float32_beside_the_matrices(
    config: ml_collections.ConfigDict, plan: Callable[[ml_collections.ConfigDict], Planned], tmp_path: Path
) -> None:
    sizes = {"hidden_size": 64, "num_attention_heads": 8, "num_key_value_heads": 8, "max_position_embeddings": 2048}
    tiny_random.write(tmp_path / "gated", "tiny-random-llama-gated", changes=sizes)
    config.oracle.reward_model, config.oracle.dtype = str(tmp_path / "gated"), "bfloat16"
    held, lowers = plan(config)
    # A reward model of two devices: half of embeddings and layers in 2 bytes, norms and all behind them whole in 4.
    vocabulary, layer = 2 + 3 + 256, 4 * 64 * 64 + 3 * 64 * 64
    gating = 64 * 24 + 24 + 2 * (24 * 24 + 24) + 24 * 19 + 19 + 1
    assert held["reward model"] == vocabulary * 64 + 2 * layer + 4 * (5 * 64 + 64 * 19 + 19 * 19 + gating)
    lowered = lowers["score"]()
    assert lowered.out_info.shape == (config.oracle.batch_size,)


def test_features_that_the_sampler_reads_are_not_read_again(
    config: ml_collections.ConfigDict, plan: Callable[[ml_collections.ConfigDict], Planned]
) -> None:
    config.erm.trunk, config.erm.feature_layer, config.policy.train_last_layers = "", 1, 1
    assert set(plan(config)[1]) == {"train", "sample", "evaluate", "ERM", "score"}


def test_a_step_on_whole_groups_is_measured_as_it_is_taken(
    config: ml_collections.ConfigDict, plan: Callable[[ml_collections.ConfigDict], Planned]
) -> None:
    config.method, config.sampling.num_samples = "ppo", 5
    config.learner.microbatch_size = config.data.batch_size
    of_all = plan(config)[1]["train"]().as_text()
    config.method = "sea"
    of_pairs = plan(config)[1]["train"]().as_text()
    assert f"tensor<{config.data.batch_size}x5x" in of_all
    assert f"tensor<{config.data.batch_size}x5x" not in of_pairs


@pytest.mark.parametrize(("lag", "sync_every", "copies"), [(0, 1, 0), (1, 1, 1), (0, 3, 1), (1, 3, 1)])
def test_where_servers_write_the_learner_checks_their_log_probs(
    config: ml_collections.ConfigDict,
    plan: Callable[[ml_collections.ConfigDict], Planned],
    lag: int,
    sync_every: int,
    copies: int,
) -> None:
    config.erm.trunk, config.erm.feature_layer, config.policy.train_last_layers = "", 1, 1
    config.eval.best_of_n = 3
    config.actor.kind, config.actor.urls, config.oracle.kind = "bridge", "http://a:1", "remote"
    config.actor.lag, config.actor.sync_every = lag, sync_every
    held, lowers = plan(config)
    assert set(lowers) == {"train", "log-prob check", "features", "best-of-N features", "ERM"}
    assert "reward model" not in held
    assert held.get("policy copy for the engine", 0) == pytest.approx(copies * held["optimiser"] / 2, abs=8)  # a moment
    lowered = lowers["log-prob check"]()
    (own,) = lowered.out_info
    assert own.shape == (8, 2, 8)  # two responses to each prompt of the whole batch
    assert lowered.compile().memory_analysis().temp_size_in_bytes > 0


def test_the_h100_has_what_is_compiled_for() -> None:
    (size,) = (line.split()[1] for line in memory._H100.splitlines() if "device_memory_size" in line)
    assert memory.GPU_BYTES["H100"] == int(0.95 * int(size))
    assert memory.GPU_BYTES["H100"] < memory.GPU_BYTES["A100-80G"]


def test_cached_keys_and_values_by_hand() -> None:
    # Pythia 1B, 128 prompts of 1024 tokens with 20 responses of 53 each: 16 layers x 2 x 2048 features of 2 bytes a token.
    model = memory.describe(tldr.POLICIES["1b"])
    assert isinstance(model, ModelConfig)
    how = tiny.generation_config(num_samples=20, max_new_tokens=53, eos_ids=(0,), pad_id=0, dtype="bfloat16")
    size = memory.cache_bytes(model, how, 128, 1024, make_mesh((1, 8, 1)))
    assert size == 128 * (1024 + 20 * 53) * 16 * 2 * 2048 * 2 // 8


@pytest.mark.parametrize(("size", "parameters"), [("1b", 1.01e9), ("2.8b", 2.78e9), ("6.9b", 6.86e9)])
def test_published_sizes_are_those_that_the_names_promise(size: str, parameters: float) -> None:
    model = memory.describe(tldr.POLICIES[size])
    specs = jax.tree.leaves(memory.hf.abstract(model))
    assert sum(memory.math.prod(spec.shape) for spec in specs) == pytest.approx(parameters, rel=0.01)


def test_published_sizes_of_the_general_setting() -> None:
    def count(tree: Params) -> int:
        return sum(memory.math.prod(spec.shape) for spec in jax.tree.leaves(tree))

    for choice, policy, trunk in (("llama3", 8.03e9, 0.43e9), ("noise", 1.236e9, 1.236e9)):
        config = ultrafeedback.get_config(choice)
        assert count(memory.hf.abstract(memory.describe(config.policy.source))) == pytest.approx(policy, rel=0.002)
        assert count(features.trunk_specs(memory.describe(config.erm.trunk))) == pytest.approx(trunk, rel=0.02)
        # 7.51B as the hub counts it: without an unembedding, with the gating network's 6.3M.
        assert count(memory.hf.abstract(memory.describe(config.oracle.reward_model))) == pytest.approx(
            7.511e9, rel=0.001
        )


def test_what_does_not_fit_says_how_much_is_missing() -> None:
    step = memory.Step("train", temporary_bytes=8 * 10**9, cache_bytes=0, compile_s=1.0)
    lines = memory.table(
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
    command = [sys.executable, "-m", "sea_jax.memory", "--config=configs/tldr.py", "--devices=8", *flags]
    finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert finished.returncode == 1
    assert message in finished.stderr
    assert "Traceback" not in finished.stderr


@pytest.mark.slow
@pytest.mark.parametrize(("size", "parameters"), [("1b", 1.01), ("2.8b", 2.78), ("6.9b", 6.86)])
def test_the_papers_policies_fit_on_eight_gpus(size: str, parameters: float) -> None:
    command = [sys.executable, "-m", "sea_jax.memory", f"--config=configs/tldr.py:{size}", "--devices=8"]
    finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600, check=False)
    assert finished.returncode == 0, finished.stderr
    cells = [line.strip("| ").split(" | ") for line in finished.stdout.splitlines() if line.startswith("|")]
    sizes = {row[0]: row[1] for row in cells}
    # 14 bytes for each parameter, divided over 8 devices: f32 weights, two moments and a bf16 reference.
    found = sum(float(sizes[name]) for name in ("policy parameters", "optimiser", "reference"))
    assert found == pytest.approx(14 * parameters / 8, rel=0.01)
    fits = {row[0]: row[-1] for row in cells}
    assert fits["A100-80G"] == fits["H100"] == "yes"
