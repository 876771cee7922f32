"""The benchmark of a step at sizes so small that it measures nothing: its two sides agree, and its counts are right."""

from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import pytest
import torch

from benchmarks import agreement, growth, machine, step, work
from benchmarks.inputs import Inputs, Settings
from benchmarks.jax_step import JaxStep
from benchmarks.torch_step import TorchStep
from sea_jax.data.prompts import Rendered
from sea_jax.models import encoder
from sea_jax.models.checkpoints import hf, tiny_random
from sea_jax.models.config import EncoderConfig, ModelConfig
from sea_jax.policy import load_policy

torch.set_num_threads(1)  # threads that wait for work this small take longer than the work

SIZES = Settings(
    samples=3,
    new_tokens=4,
    temperature=0.7,
    dtype="float32",
    feature_layer=1,
    num_heads=4,
    hidden_size=8,
    erm_learning_rate=3e-3,
    erm_weight_decay=5e-5,
    anchor_strength=0.5,
    erm_steps=2,
    erm_batch_size=6,
    learning_rate=1e-3,
    b1=0.9,
    b2=0.95,
    clip_norm=1.0,
    beta=0.1,
    oracle_scale=10.0,
)
POSTS = ["Why is the sea salt?", "Rivers carry it", "One"]


class Small(NamedTuple):
    """Two tiny models on disk and what both sides work on."""

    inputs: Inputs
    policy: Path
    encoder: Path
    config: ModelConfig
    encoder_config: EncoderConfig


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Small:
    directory = tmp_path_factory.mktemp("models")
    tiny_random.write(directory / "policy", "tiny-random-llama")
    policy = load_policy(
        str(directory / "policy"), train_last_layers=0, feature_layer=SIZES.feature_layer, dtype="float32"
    )
    config = EncoderConfig(
        family="bert",
        vocab_size=policy.config.vocab_size,
        d_model=16,
        num_layers=2,
        num_heads=2,
        d_ff=24,
        activation="gelu",
        norm_eps=1e-12,
        max_positions=64,
        num_token_types=2,
        init_std=0.3,
    )
    params = jax.device_get(encoder.init(config, jax.random.key(0)))
    hf.save(directory / "encoder", config, params, directory / "policy")
    rendered = [
        Rendered({"id": post, "prompt": post, "reference": ""}, policy.tokenizer.encode(post)) for post in POSTS
    ]
    inputs = step.make_inputs(SIZES, policy, rendered, prompt_tokens=8)
    return Small(inputs, directory / "policy", directory / "encoder", policy.config, config)


def both_sides(small: Small) -> tuple[JaxStep, TorchStep]:
    arguments = (SIZES, small.inputs, small.policy, small.encoder)
    return JaxStep(*arguments), TorchStep(*arguments)


@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)])
def test_both_sides_agree(small, dtype):
    found = agreement.check(replace(SIZES, dtype=dtype), small.inputs, small.policy, small.encoder)
    assert found["loss"] > 0 or found["update"] > 0  # two programs, not one compared with itself


def test_a_side_that_computes_something_else_is_found(small, monkeypatch):
    right = TorchStep.features
    monkeypatch.setattr(TorchStep, "features", lambda self: right(self) + 0.01)
    with pytest.raises(AssertionError, match="float32: feature differs by"):
        agreement.check(SIZES, small.inputs, small.policy, small.encoder)


def test_rounds_and_table(small):
    ours, baseline = both_sides(small)
    seconds = step.measure(ours, baseline, SIZES, small.inputs.posts, rounds=1)
    for side in (seconds.ours, seconds.torch):
        assert all(len(values) == 1 for values in side.values())
        np.testing.assert_allclose(side["step"], np.sum([side[part] for part in step.PARTS], axis=0))
    counted = work.count(small.config, small.encoder_config, SIZES, small.inputs, [5, 6])
    lines = step.table(seconds, counted, flops=1e9, bandwidth=1e9).splitlines()
    assert [line.split("|")[1].strip() for line in lines[2:]] == [
        "generate", "... first token", "... other tokens", "features", "oracle", "ERM", "learn", "step"
    ]  # fmt: skip
    assert len({line.count("|") for line in lines}) == 1


def test_generation_goes_on_behind_the_end_of_sequence(small):
    """With every token an end, both sides still write all tokens."""
    ours, baseline = both_sides(small)
    assert ours.sampling.eos_ids == ()
    baseline.sampler.generation_config.eos_token_id = list(range(small.config.vocab_size))
    own, theirs = (side.generate(0, SIZES.new_tokens, greedy=True) for side in (ours, baseline))
    assert own.shape == (3, 1, SIZES.new_tokens)
    np.testing.assert_array_equal(own, theirs)


def test_counted_work_is_that_of_the_products(small):
    """Every product of a forward pass, token by token and key by key."""
    config, new = small.config, SIZES.new_tokens
    width = config.num_heads * config.head_dim

    def token(position: int) -> int:
        """One token in one layer that attends to itself and the tokens before it."""
        kv_width = config.num_kv_heads * config.head_dim
        matrices = config.d_model * (width + 2 * kv_width + width + 3 * config.d_ff)
        return 2 * matrices + 2 * (position + 1) * 2 * width

    counted = work.count(small.config, small.encoder_config, SIZES, small.inputs, [5])
    lengths = [len(post.encode()) for post in POSTS]  # a token per byte
    unembed = 2 * config.d_model * config.vocab_size
    prompts = sum(token(position) for length in lengths for position in range(length))
    responses = sum(token(length + t) for length in lengths for t in range(new))
    fed = sum(token(length + t) for length in lengths for t in range(new - 1))
    assert counted["first token"].flops == config.num_layers * prompts + 3 * unembed
    assert counted["other tokens"].flops == SIZES.samples * (config.num_layers * fed + 3 * (new - 1) * unembed)
    assert counted["features"].flops == SIZES.feature_layer * (prompts + SIZES.samples * responses)
    assert counted["learn"].flops == 4 * (config.num_layers * (prompts + 2 * responses) + 2 * 3 * new * unembed)
    assert counted["step"].flops == sum(counted[part].flops for part in step.PARTS)


def test_threads_that_are_not_there():
    with pytest.raises(ValueError, match="--threads=100000: this process may use"):
        machine.confine(100_000)


def test_slopes_of_growth():
    assert growth.slope([1, 2, 4, 8], [9, 10, 20, 40]) == pytest.approx(1)
    assert growth.slope([1, 2, 4], [1, 4, 16]) == pytest.approx(2)
    assert growth.slope([1, 2, 4], [5, 5, 5]) == pytest.approx(0)
