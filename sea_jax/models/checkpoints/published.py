"""Sizes of published models, as in their config.json, for what needs no weights and must not depend on a hub."""

from collections.abc import Mapping
from typing import Any

_PYTHIA: Mapping[str, Any] = {
    "model_type": "gpt_neox",
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-5,
    "max_position_embeddings": 2048,
    "rotary_emb_base": 10_000,
    "rotary_pct": 0.25,
    "use_parallel_residual": True,
    "tie_word_embeddings": False,
}

CONFIGS: Mapping[str, Mapping[str, Any]] = {
    "trl-lib/pythia-1b-deduped-tldr-sft": {
        **_PYTHIA,
        "vocab_size": 50_304,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 8,
    },
    "trl-lib/pythia-2.8b-deduped-tldr-sft": {
        **_PYTHIA,
        "vocab_size": 50_304,
        "hidden_size": 2560,
        "intermediate_size": 10_240,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
    },
    "trl-lib/pythia-6.9b-deduped-tldr-sft": {
        **_PYTHIA,
        "vocab_size": 50_432,
        "hidden_size": 4096,
        "intermediate_size": 16_384,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
    },
    "llm-blender/PairRM-hf": {
        "model_type": "deberta-v2",
        "vocab_size": 128_100,
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-7,
        "max_position_embeddings": 512,
        "max_relative_positions": -1,
        "norm_rel_ebd": "layer_norm",
        "pos_att_type": ["p2c", "c2p"],
        "position_biased_input": False,
        "position_buckets": 256,
        "relative_attention": True,
        "share_att_key": True,
        "type_vocab_size": 0,
    },
    "Skywork/Skywork-Reward-Llama-3.1-8B": {
        "model_type": "llama",
        "architectures": ["LlamaForSequenceClassification"],
        "num_labels": 1,
        "vocab_size": 128_256,
        "hidden_size": 4096,
        "intermediate_size": 14_336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 131_072,
        "rope_theta": 500_000.0,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
        "tie_word_embeddings": False,
    },
}
"""Name on the Hugging Face hub -> the fields of its config.json that `config.from_hf` reads."""
