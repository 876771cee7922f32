"""Reading and writing config.json."""

from dataclasses import replace
from typing import Any

import pytest

from sea_jax.models import rope
from sea_jax.models.checkpoints import config_json as configs
from sea_jax.models.config import Gating, ModelConfig

LLAMA = {
    "model_type": "llama",
    "vocab_size": 100,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 30,
}
NEOX = LLAMA | {"model_type": "gpt_neox"}
BERT = LLAMA | {"model_type": "bert"}
MISTRAL = LLAMA | {"model_type": "mistral", "num_key_value_heads": 2, "sliding_window": None}
QWEN2 = LLAMA | {"model_type": "qwen2", "num_key_value_heads": 2}
QWEN3 = QWEN2 | {"model_type": "qwen3"}
REWARD = {"architectures": ["LlamaForSequenceClassification"], "id2label": {"0": "LABEL_0"}}


def test_defaults_of_llama() -> None:
    config = configs.from_hf(LLAMA)
    assert isinstance(config, ModelConfig)
    assert (config.num_kv_heads, config.head_dim, config.norm_eps, config.max_positions) == (4, 6, 1e-6, 2048)
    assert (config.activation, config.rope_theta, config.rope_fraction) == ("silu", 10_000.0, 1.0)
    assert not any((config.tie_embeddings, config.attention_bias, config.mlp_bias, config.parallel_residual))


def test_original_length_beside_the_rope_parameters_wins() -> None:
    llama3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    for beside, inside, expected in ((16, 32, 16), (None, 32, 32), (16, None, 16), (None, None, 2048)):
        parameters = llama3 | {"original_max_position_embeddings": inside}
        fields = LLAMA | {"rope_scaling": parameters, "original_max_position_embeddings": beside}
        config = configs.from_hf(fields)
        assert isinstance(config, ModelConfig)
        assert config.rope_scaling == rope.Llama3(8.0, 1.0, 4.0, expected)


def test_defaults_of_gpt_neox() -> None:
    config = configs.from_hf(NEOX)
    assert isinstance(config, ModelConfig)
    assert (config.num_kv_heads, config.activation, config.rope_fraction, config.norm_eps) == (4, "gelu", 0.25, 1e-5)
    assert config.parallel_residual
    assert config.attention_bias
    assert config.mlp_bias


def test_defaults_of_mistral_and_qwen() -> None:
    mistral, qwen2, qwen3 = map(configs.from_hf, (MISTRAL, QWEN2, QWEN3))
    assert isinstance(mistral, ModelConfig)
    assert isinstance(qwen2, ModelConfig)
    assert isinstance(qwen3, ModelConfig)
    assert [c.max_positions for c in (mistral, qwen2, qwen3)] == [131_072, 32_768, 32_768]
    assert [c.head_dim for c in (mistral, qwen2, qwen3)] == [6, 6, 128]
    assert [(c.attention_bias, c.output_bias) for c in (mistral, qwen2, qwen3)] == [
        (False, False),
        (True, False),
        (False, False),
    ]
    with pytest.raises(ValueError, match="not a multiple of 'num_key_value_heads' 8"):
        configs.from_hf({name: value for name, value in MISTRAL.items() if name != "num_key_value_heads"})


@pytest.mark.parametrize(
    ("fields", "scalar"),
    [
        ({}, False),
        (REWARD, True),
        ({"architectures": REWARD["architectures"], "num_labels": 1}, True),
        ({"architectures": ["LlamaForCausalLM"], "id2label": {"0": "LABEL_0"}}, False),
    ],
)
def test_a_scalar_head_is_known_by_the_architecture(fields: dict[str, Any], scalar: bool) -> None:
    config = configs.from_hf(LLAMA | fields)
    assert isinstance(config, ModelConfig)
    assert config.scalar_head == scalar


GATED = LLAMA | {"architectures": ["LlamaForRewardModelWithGating"]}


def test_a_model_that_weighs_objectives_by_the_prompt() -> None:
    config = configs.from_hf(GATED)
    assert isinstance(config, ModelConfig)
    assert config.scalar_head
    assert config.gating == Gating(num_objectives=19, num_hidden=3, hidden_size=1024, temperature=10.0)
    told = {"num_objectives": 5, "gating_n_hidden": 0, "gating_hidden_dim": 7, "gating_temperature": 3}
    other = configs.from_hf(GATED | told)
    assert isinstance(other, ModelConfig)
    assert other.gating == Gating(num_objectives=5, num_hidden=0, hidden_size=7, temperature=3.0)
    assert configs.from_hf(configs.to_hf(other)) == other


def test_rope_of_the_older_and_the_newer_style_agree() -> None:
    older = LLAMA | {"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2}}
    newer = LLAMA | {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 5e5}}
    assert configs.from_hf(older) == configs.from_hf(newer)
    older = NEOX | {"rotary_emb_base": 50, "rotary_pct": 0.5}
    newer = NEOX | {"rope_parameters": {"rope_type": "default", "rope_theta": 50.0, "partial_rotary_factor": 0.5}}
    assert configs.from_hf(older) == configs.from_hf(newer)


@pytest.mark.parametrize(
    "scaling",
    [
        None,
        rope.Linear(2.0),
        rope.Dynamic(3.0),
        rope.Yarn(4.0, 1.2, 512, 24.0, 2.0, False),
        rope.LongRope((1.0, 2.0, 3.0), (4.0, 5.0, 6.0), 1.3, 512),
        rope.Llama3(8.0, 1.0, 4.0, 512),
        rope.Proportional(1.5),
    ],
    ids=lambda scaling: type(scaling).__name__,
)
def test_written_and_read_again(scaling: rope.RopeScaling | None) -> None:
    llama = configs.from_hf(LLAMA | {"num_key_value_heads": 2, "head_dim": 6, "tie_word_embeddings": True})
    neox = configs.from_hf(NEOX | {"rotary_pct": 1.0, "use_parallel_residual": False, "attention_bias": False})
    fields = (MISTRAL, QWEN2, QWEN3 | {"head_dim": 6, "attention_bias": True})
    others = map(configs.from_hf, fields)
    for config in (llama, neox, *others):
        assert isinstance(config, ModelConfig)
        scaled = replace(config, rope_scaling=scaling, rope_theta=123.0, scalar_head=scaling is None)
        assert configs.from_hf(configs.to_hf(scaled)) == scaled


def test_encoder_written_and_read_again() -> None:
    config = configs.from_hf(BERT | {"type_vocab_size": 3, "hidden_act": "relu", "layer_norm_eps": 1e-6})
    assert configs.from_hf(configs.to_hf(config)) == config


def test_configs_are_hashable() -> None:
    longrope = {"rope_type": "longrope", "short_factor": [1, 2, 3], "long_factor": [1, 2, 3]}
    assert (
        len({configs.from_hf(LLAMA), configs.from_hf(LLAMA), configs.from_hf(LLAMA | {"rope_scaling": longrope})}) == 2
    )


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model_type": "mamba"}, "'model_type' is 'mamba'; supported are llama, .* and deberta-v2"),
        ({"model_type": None}, "'model_type' is None"),
        (LLAMA | {"vocab_size": None}, "no field 'vocab_size'"),
        (LLAMA | {"vocab_size": "100"}, "'vocab_size' is '100'; it must be of type int"),
        (LLAMA | {"num_hidden_layers": 0}, "'num_hidden_layers' is 0; it must be at least 1"),
        (LLAMA | {"num_hidden_layers": True}, "'num_hidden_layers' is True"),
        (LLAMA | {"hidden_act": "mish"}, "'hidden_act' is 'mish'; supported are gelu"),
        (LLAMA | {"hidden_size": 25}, "'hidden_size' is 25, not a multiple of 'num_attention_heads' 4"),
        (LLAMA | {"num_key_value_heads": 3}, "not a multiple of 'num_key_value_heads' 3"),
        (LLAMA | {"head_dim": 5}, "rope over 5 of the 5 features"),
        (NEOX | {"rotary_pct": 0.1}, "rope over 0 of the 6 features"),
        (LLAMA | {"partial_rotary_factor": 0.5}, "'partial_rotary_factor' is 0.5; llama rotates whole heads"),
        (
            LLAMA | {"rope_scaling": {"type": "su", "factor": 2.0}},
            "'rope_type' is 'su'; supported are default, dynamic",
        ),
        (LLAMA | {"rope_scaling": {"type": "linear"}}, "no field 'factor'"),
        (LLAMA | {"rope_scaling": {"type": "linear", "factor": "2"}}, "'factor' is '2'; it must be of type float"),
        (LLAMA | {"rope_scaling": {"type": "longrope", "short_factor": [1.0]}}, "'short_factor' has 1 numbers; 3 are"),
        (LLAMA | {"rope_parameters": {"full_attention": {"rope_theta": 1.0}}}, "one rule for all layers"),
        (LLAMA | {"rope_scaling": {"type": "dynamic", "factor": 2.0}, "head_dim": 2}, "more than 2 rotated features"),
        (LLAMA | {"architectures": REWARD["architectures"]}, "LlamaForSequenceClassification with 2 labels"),
        (LLAMA | REWARD | {"num_labels": 2}, "with 2 labels"),
        (
            NEOX | {"architectures": ["GPTNeoXForSequenceClassification"], "id2label": {"0": "a", "1": "b", "2": "c"}},
            "GPTNeoXForSequenceClassification with 3 labels",
        ),
        (BERT | {"position_embedding_type": "relative_key"}, "'position_embedding_type' is 'relative_key'"),
        (BERT | {"is_decoder": True}, "'is_decoder' is True"),
        (
            GATED | {"num_quantiles": 19},
            "'num_quantiles' 19; supported are LlamaForSequenceClassification with one label, and",
        ),
        (QWEN2 | {"architectures": ["LlamaForRewardModelWithGating"]}, "a reward model in a form of its own"),
        (
            LLAMA | {"architectures": ["LlamaForSequenceClassification"], "num_objectives": 5},
            "'num_objectives' 5; supported",
        ),
        (LLAMA | {"architectures": ["LlamaRewardModel"]}, r"'architectures' \['LlamaRewardModel'\]; supported are"),
        (GATED | {"gating_temperature": 0}, "'gating_temperature' are 3 and 0.0"),
    ],
)
def test_what_is_not_supported_is_named(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        configs.from_hf(fields)


@pytest.mark.parametrize(
    ("fields", "longest"),
    [
        (LLAMA | {"max_position_embeddings": 2048}, 2048),
        ({name: value for name, value in MISTRAL.items() if name != "sliding_window"}, 4096),
        (QWEN3 | {"use_sliding_window": True, "sliding_window": 512, "max_window_layers": 1}, 512),
        (LLAMA | {"max_position_embeddings": 2048, "rope_scaling": {"type": "linear", "factor": 4.0}}, 8192),
        (LLAMA | {"max_position_embeddings": 2048, "rope_scaling": {"type": "dynamic", "factor": 2.0}}, 4096),
        # Extended by hand, and as published: https://arxiv.org/abs/2309.00071.
        (LLAMA | {"max_position_embeddings": 2048, "rope_scaling": {"type": "yarn", "factor": 4.0}}, 8192),
        (
            LLAMA
            | {
                "max_position_embeddings": 8192,
                "rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 2048},
            },
            8192,
        ),
    ],
)
def test_the_longest_sequence_that_is_read_as_the_model_was_made_to(fields: dict[str, Any], longest: int) -> None:
    config = configs.from_hf(fields)
    assert isinstance(config, ModelConfig)
    assert config.longest_sequence == longest
