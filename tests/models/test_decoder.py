"""The decoder against itself: cached and whole, padded and not, cut and whole, float32 and bfloat16."""

from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sea_jax.models import decoder, rope
from sea_jax.models.config import ModelConfig
from sea_jax.models.parameters import Params
from tests.support import tiny

TWO_LAYERS = replace(tiny.CONFIG, num_layers=2)  # cut into stacks of one shape: one program for both
NEOX = replace(
    TWO_LAYERS,
    family="gpt_neox",
    num_kv_heads=4,
    activation="gelu",
    rope_fraction=0.5,
    tie_embeddings=False,
    parallel_residual=True,
    attention_bias=True,
    mlp_bias=True,
)
CONFIGS = {
    "llama, three to one": replace(TWO_LAYERS, num_heads=6, attention_bias=True),
    "neox": NEOX,
    # 5 + 4 tokens reach the threshold, past which cached and whole may differ.
    "one key head, longrope": replace(
        TWO_LAYERS, num_kv_heads=1, rope_scaling=rope.LongRope((1.0, 2.0), (4.0, 8.0), 1.0, 9)
    ),
}

_run = jax.jit(decoder.run_stack, static_argnums=1, static_argnames="remat")


def _tokens(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, tiny.CONFIG.vocab_size, shape)


def _left_padded(lengths: list[int], width: int) -> np.ndarray:
    return np.arange(width) >= width - np.array(lengths)[:, None]


def _embedded(params: Params, config: ModelConfig, *given: np.ndarray, dtype: Any = jnp.float32) -> decoder.Streams:
    return decoder.embed(params, config, *map(jnp.asarray, given), dtype=dtype)


def _through(params: Params, config: ModelConfig, *given: np.ndarray, dtype: Any = jnp.float32) -> Any:
    """The streams after the last stack; Any, because they have responses whenever responses are given."""
    streams = _embedded(params, config, *given, dtype=dtype)
    for stack in params["stacks"]:
        streams, _ = _run(stack, config, streams)
    return streams


@pytest.mark.parametrize("name", CONFIGS)
def test_one_token_at_a_time_is_the_whole_response(name: str) -> None:
    config, steps, samples = CONFIGS[name], 4, 3
    params = tiny.draw(decoder.abstract(config, (1,)), seed=0)
    prompt, valid, responses = _tokens(0, 2, 5), _left_padded([3, 5], 5), _tokens(1, 2, samples, steps)
    whole = _through(params, config, prompt, valid, responses, np.ones((2, samples, steps), bool)).responses
    streams, kvs = _embedded(params, config, prompt, valid), []
    for stack in params["stacks"]:
        streams, kv = _run(stack, config, streams)
        kvs.append(kv)
    advance = jax.jit(decoder.decode, static_argnums=1)
    caches = [decoder.empty_cache(stack, config, 2, samples, steps, jnp.float32) for stack in params["stacks"]]
    for step in range(steps):
        hidden = params["embed"][responses[:, :, step]]
        for i, stack in enumerate(params["stacks"]):
            hidden, caches[i] = advance(stack, config, hidden, kvs[i], valid, caches[i], jnp.int32(step))
        np.testing.assert_allclose(hidden, whole[:, :, step], atol=1e-5)


@settings(max_examples=15)
@given(lengths=st.lists(st.integers(1, 8), min_size=2, max_size=2), seed=st.integers(0, 99))
def test_padding_does_not_show(lengths: list[int], seed: int) -> None:
    params, config = tiny.params(), tiny.CONFIG
    prompt, valid, responses = _tokens(seed, 2, 8), _left_padded(lengths, 8), _tokens(seed + 1, 2, 2, 3)
    responses_valid = np.arange(3) < np.array([[[2], [3]], [[1], [3]]])
    found = _through(params, config, prompt, valid, responses, responses_valid)
    # The same tokens in the last places, other tokens in the padding.
    others = _through(
        params,
        config,
        np.where(valid, prompt, 1),
        valid,
        np.where(responses_valid, responses, 1),
        responses_valid,
    )
    np.testing.assert_array_equal(found.prompt[valid], others.prompt[valid])
    np.testing.assert_array_equal(found.responses[responses_valid], others.responses[responses_valid])
    for row, length in enumerate(lengths):
        plain = tiny.hidden_states(params, prompt[row, 8 - length :].tolist() + responses[row, 1].tolist(), 1)
        np.testing.assert_allclose(found.prompt[row, 8 - length :], plain[:length], atol=2e-5)
        np.testing.assert_allclose(found.responses[row, 1], plain[length:], atol=2e-5)


def test_scores_beyond_the_range_of_exp() -> None:
    params, config = jax.tree.map(np.asarray, tiny.params()), tiny.CONFIG
    for name in ("q", "k"):
        params["stacks"][0][name]["kernel"] = 30 * params["stacks"][0][name]["kernel"]
    prompt, responses = _tokens(0, 1, 4), _tokens(1, 1, 2, 3)
    found = _through(params, config, prompt, np.ones((1, 4), bool), responses, np.ones((1, 2, 3), bool))
    for sample in range(2):
        plain = tiny.hidden_states(params, prompt[0].tolist() + responses[0, sample].tolist(), 1)
        np.testing.assert_allclose(found.responses[0, sample], plain[4:], atol=1e-3)


def test_responses_do_not_see_one_another() -> None:
    params, config = tiny.params(), tiny.CONFIG
    prompt, valid, responses = _tokens(0, 1, 4), _left_padded([4], 4), _tokens(1, 1, 3, 4) % 30
    changed = responses.copy()
    changed[0, 1, 2] += 1
    before, after = (_through(params, config, prompt, valid, r, np.ones(r.shape, bool)) for r in (responses, changed))
    moved = np.abs(before.responses - after.responses).max(axis=-1)[0] > 0
    np.testing.assert_array_equal(moved, [[False] * 4, [False, False, True, True], [False] * 4])
    np.testing.assert_array_equal(before.prompt, after.prompt)


@pytest.mark.parametrize("config", [tiny.CONFIG, NEOX], ids=["llama", "neox"])
def test_init_follows_the_abstract_tree(config: ModelConfig) -> None:
    abstract = decoder.abstract(config, (1,))
    params = jax.eval_shape(partial(decoder.init, config, cuts=(1,)), jax.random.key(0))
    jax.tree.map(lambda spec, leaf: np.testing.assert_equal(leaf.shape, spec.shape), abstract, params)
    jax.tree.map(lambda spec: np.testing.assert_equal(len(spec.axes), len(spec.shape)), abstract)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(params))
    assert ("unembed" in params) != config.tie_embeddings
    assert [len(stack["q"]["kernel"]) for stack in params["stacks"]] == [1, config.num_layers - 1]


def test_init_draws_matrices_and_leaves_norms_and_biases_plain() -> None:
    config = replace(tiny.CONFIG, num_layers=1, attention_bias=True, init_std=0.3)
    params = jax.jit(decoder.init, static_argnums=0)(config, jax.random.key(0))
    layers = params["stacks"][0]
    assert 0.25 < np.std(params["embed"]) < 0.35
    assert 0.25 < np.std(layers["q"]["kernel"]) < 0.35
    assert np.abs(layers["q"]["kernel"] - layers["o"]["kernel"]).max() > 0.1  # each of its own key
    np.testing.assert_array_equal(params["final_norm"]["scale"], np.ones(16))
    np.testing.assert_array_equal(layers["q"]["bias"], np.zeros((1, 16)))


def test_recut_moves_no_layer() -> None:
    whole = jax.tree.map(np.asarray, tiny.params())
    for cuts in ((1,), (1, 2), (2,)):
        parts = decoder.recut(whole, cuts)
        assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(parts))
        jax.tree.map(
            lambda leaf, spec: np.testing.assert_equal(leaf.shape, spec.shape),
            parts,
            decoder.abstract(tiny.CONFIG, cuts),
        )
        jax.tree.map(np.testing.assert_array_equal, decoder.recut(parts, ()), whole)
    again = decoder.recut(decoder.recut(tiny.params(), (1,)), (2,))
    assert isinstance(again["stacks"][1]["q"]["kernel"], jax.Array)
    np.testing.assert_array_equal(again["stacks"][1]["q"]["kernel"], whole["stacks"][0]["q"]["kernel"][2:])


@pytest.mark.parametrize("cuts", [(0,), (3,), (2, 1), (1, 1), (-1,)])
def test_cuts_that_divide_nothing_are_refused(cuts: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="must ascend strictly between 0 and 3 layers"):
        decoder.abstract(tiny.CONFIG, cuts)
    with pytest.raises(ValueError, match="must ascend strictly between 0 and 3 layers"):
        decoder.recut(tiny.params(), cuts)


def _streams(params: Params, prompt_lengths: list[int]) -> decoder.Streams:
    """Two prompts of at most 4 tokens, each with two responses of 2 tokens and one of padding."""
    given = _tokens(0, 2, 4), _left_padded(prompt_lengths, 4), _tokens(1, 2, 2, 3), np.arange(3) < np.full((2, 2, 1), 2)
    return _embedded(params, tiny.CONFIG, *given)


@partial(jax.jit, static_argnums=2)
@partial(jax.value_and_grad, argnums=(0, 1), allow_int=True)
def _loss(params: Params, streams: decoder.Streams, remat: bool) -> jax.Array:
    out, _ = decoder.run_stack(params["stacks"][0], tiny.CONFIG, streams, remat=remat)
    assert out.responses is not None
    assert out.responses_valid is not None
    hidden = decoder.final(params, tiny.CONFIG, out.responses)
    return jnp.sum(jnp.where(out.responses_valid[..., None], jnp.sin(hidden), 0.0))


def test_gradients_are_finite_beside_padding_and_the_same_with_remat() -> None:
    params = tiny.params()
    # One prompt is all padding: none of its tokens has anything to attend to.
    streams = _streams(params, [0, 3])
    plain, again = (_loss(params, streams, remat)[1] for remat in (False, True))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(plain[0]))
    assert np.abs(plain[0]["stacks"][0]["k"]["kernel"]).max() > 0
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), plain[0], again[0])
    # The loss reads the prompt through the responses' attention alone, and padding not at all.
    np.testing.assert_array_equal(np.abs(plain[1].prompt[1]).max(axis=-1) > 0, [False, True, True, True])


def test_gradient_agrees_with_finite_differences() -> None:
    params = jax.tree.map(np.asarray, tiny.params())
    streams = _streams(params, [3, 4])
    direction = jax.tree.map(lambda leaf: np.sin(np.arange(leaf.size, dtype=np.float32)).reshape(leaf.shape), params)
    slopes = jax.tree.map(lambda a, b: np.vdot(a, b), _loss(params, streams, False)[1][0], direction)
    step = np.float32(1e-3)
    up, down = (
        _loss(jax.tree.map(lambda p, d, s=s: p + s * step * d, params, direction), streams, False)[0] for s in (1, -1)
    )
    np.testing.assert_allclose((up - down) / (2 * step), sum(jax.tree.leaves(slopes)), rtol=2e-2)


def test_bfloat16_is_close() -> None:
    params = tiny.params()
    given = (_tokens(0, 2, 4), _left_padded([2, 4], 4), _tokens(1, 2, 2, 3), np.ones((2, 2, 3), bool))
    wide = _through(params, tiny.CONFIG, *given)
    narrow = _through(params, tiny.CONFIG, *given, dtype=jnp.bfloat16)
    assert narrow.responses.dtype == jnp.bfloat16
    scale = float(np.abs(wide.responses).max())
    np.testing.assert_allclose(narrow.responses, wide.responses, atol=0.05 * scale)
