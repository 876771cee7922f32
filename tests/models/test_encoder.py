"""The encoder: padding, token types, and the mean over valid tokens."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sea_jax.models import encoder
from sea_jax.models.config import EncoderConfig
from sea_jax.models.parameters import Params

CONFIG = EncoderConfig(
    family="bert",
    vocab_size=30,
    d_model=12,
    num_layers=2,
    num_heads=3,
    d_ff=20,
    activation="gelu",
    norm_eps=1e-12,
    max_positions=8,
    num_token_types=2,
    init_std=0.3,
)


@cache
def _params() -> Params:
    return jax.jit(encoder.init, static_argnums=0)(CONFIG, jax.random.key(0))


def test_init_follows_the_abstract_tree() -> None:
    abstract, params = encoder.abstract(CONFIG), _params()
    jax.tree.map(lambda spec, leaf: np.testing.assert_equal(leaf.shape, spec.shape), abstract, params)
    jax.tree.map(lambda spec: np.testing.assert_equal(len(spec.axes), len(spec.shape)), abstract)
    np.testing.assert_array_equal(params["stacks"][0]["mlp_norm"]["scale"], np.ones((2, 12)))
    assert 0.2 < np.std(params["embed"]["word"]) < 0.4


def test_padding_does_not_show() -> None:
    params = _params()
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 30, (2, 8)))
    valid = jnp.asarray(np.arange(8) < np.array([[5], [0]]))
    found = encoder.apply(params, CONFIG, tokens, valid, dtype=jnp.float32)
    alone = encoder.apply(params, CONFIG, tokens[:1, :5], valid[:1, :5], dtype=jnp.float32)
    np.testing.assert_allclose(found[:1, :5], alone, atol=1e-6)
    pooled = encoder.mean_pool(found, valid)
    np.testing.assert_allclose(pooled[0], alone[0].mean(axis=0), atol=1e-6)
    np.testing.assert_array_equal(pooled[1], np.zeros(12))


def test_bfloat16_is_close() -> None:
    params = _params()
    tokens, valid = jnp.arange(8)[None], jnp.ones((1, 8), bool)
    found = encoder.apply(params, CONFIG, tokens, valid, dtype=jnp.bfloat16)
    assert found.dtype == jnp.bfloat16
    np.testing.assert_allclose(found, encoder.apply(params, CONFIG, tokens, valid, dtype=jnp.float32), atol=0.1)


def test_too_long_a_sequence_is_refused() -> None:
    params = _params()
    with pytest.raises(ValueError, match="9 tokens exceed the encoder's 8 positions"):
        encoder.apply(params, CONFIG, jnp.zeros((1, 9), int), jnp.ones((1, 9), bool), dtype=jnp.float32)
