"""The DeBERTa encoder: its tree, padding, the compute dtype, and the configurations that it refuses."""

from dataclasses import replace
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sea_jax.models import deberta
from sea_jax.models.checkpoints import config_json as configs
from sea_jax.models.config import DebertaConfig
from sea_jax.models.parameters import Params

CONFIG = DebertaConfig(
    family="deberta-v2",
    vocab_size=30,
    d_model=12,
    num_layers=2,
    num_heads=3,
    d_ff=20,
    activation="gelu",
    norm_eps=1e-7,
    max_positions=8,
    absolute_positions=False,
    num_token_types=0,
    max_relative_positions=8,
    position_buckets=4,
    relative_terms=("c2p", "p2c"),
    share_projections=True,
    norm_relative=True,
    conv_width=3,
    init_std=0.3,
)

FIELDS = {
    "model_type": "deberta-v2",
    "vocab_size": 30,
    "hidden_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 20,
    "relative_attention": True,
}


@cache
def _params() -> Params:
    return jax.jit(deberta.init, static_argnums=0)(CONFIG, jax.random.key(0))


def test_the_tree_holds_what_the_configuration_switches_on() -> None:
    abstract, params = deberta.abstract(CONFIG), _params()
    jax.tree.map(lambda spec, leaf: np.testing.assert_equal(leaf.shape, spec.shape), abstract, params)
    jax.tree.map(lambda spec: np.testing.assert_equal(len(spec.axes), len(spec.shape)), abstract)
    assert set(abstract["embed"]) == {"word"}
    assert abstract["relative"].shape == (8, 12)
    other = deberta.abstract(
        replace(
            CONFIG, absolute_positions=True, num_token_types=2, conv_width=0, norm_relative=False, position_buckets=0
        )
    )
    assert set(other) == {"embed", "embed_norm", "relative", "stacks"}
    assert set(other["embed"]) == {"word", "position", "token_type"}
    assert other["relative"].shape == (16, 12)
    own = deberta.abstract(replace(CONFIG, share_projections=False, relative_terms=("p2c",)))["stacks"][0]
    assert set(own) - set(abstract["stacks"][0]) == {"relative_q"}


def test_padding_does_not_show() -> None:
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 30, (2, 16)))
    valid = jnp.asarray(np.arange(16) < np.array([[9], [0]]))
    found = deberta.apply(_params(), CONFIG, tokens, valid, dtype=jnp.float32)
    alone = deberta.apply(_params(), CONFIG, tokens[:1, :9], valid[:1, :9], dtype=jnp.float32)
    np.testing.assert_allclose(found[:1, :9], alone, atol=1e-5)
    assert np.isfinite(found).all()


def test_bfloat16_is_close() -> None:
    tokens, valid = jnp.arange(16)[None], jnp.ones((1, 16), bool)
    found = deberta.apply(_params(), CONFIG, tokens, valid, dtype=jnp.bfloat16)
    assert found.dtype == jnp.bfloat16
    np.testing.assert_allclose(found, deberta.apply(_params(), CONFIG, tokens, valid, dtype=jnp.float32), atol=0.1)


def test_only_absolute_positions_limit_the_length() -> None:
    config = replace(CONFIG, absolute_positions=True)
    params = jax.eval_shape(lambda: deberta.init(config, jax.random.key(0)))
    with pytest.raises(ValueError, match="sequences of 9 tokens exceed the encoder's 8 positions"):
        deberta.apply(params, config, jnp.ones((1, 9), int), jnp.ones((1, 9), bool), dtype=jnp.float32)


@pytest.mark.parametrize("config", [CONFIG, replace(CONFIG, position_buckets=0, num_token_types=2, relative_terms=())])
def test_fields_come_back(config: DebertaConfig) -> None:
    assert configs.from_hf(configs.to_hf(config)) == config


def test_older_spellings_and_defaults() -> None:
    config = configs.from_hf(FIELDS | {"pos_att_type": "p2c|c2p", "max_relative_positions": -1})
    assert isinstance(config, DebertaConfig)
    assert (config.relative_terms, config.max_relative_positions, config.position_buckets) == (("c2p", "p2c"), 512, 0)
    assert (config.absolute_positions, config.share_projections, config.conv_width) == (True, False, 0)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"relative_attention": None}, "'relative_attention' is False; supported for this DeBERTa is True"),
        ({"embedding_size": 8}, "'embedding_size' is 8; supported for this DeBERTa is 12"),
        ({"attention_head_size": 6}, "'attention_head_size' is 6; supported for this DeBERTa is 4"),
        ({"conv_groups": 2}, "'conv_groups' is 2"),
        ({"conv_kernel_size": 4}, "'conv_kernel_size' is 4; supported are 0 and odd numbers"),
        ({"conv_act": "mish"}, "'conv_act' is 'mish'; supported are"),
        ({"pos_att_type": ["c2p", "p2p"]}, r"'pos_att_type' is \['c2p', 'p2p'\]"),
        ({"norm_rel_ebd": "batch_norm"}, "'norm_rel_ebd' is 'batch_norm'"),
        ({"position_buckets": 256, "max_relative_positions": 128}, "'position_buckets' is 256; .* distance 127"),
        ({"type_vocab_size": -1}, "'type_vocab_size' is -1"),
    ],
)
def test_a_configuration_that_is_not_supported_names_the_field(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        configs.from_hf(FIELDS | fields)
