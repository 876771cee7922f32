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

_LLAMA_3_8B: Mapping[str, Any] = {
    "model_type": "llama",
    "vocab_size": 128_256,
    "hidden_size": 4096,
    "intermediate_size": 14_336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 8192,
    "rope_theta": 500_000.0,
    "tie_word_embeddings": False,
}

_LLAMA_3_ROPE: Mapping[str, Any] = {
    "rope_type": "llama3",
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}

_LLAMA_3_1B: Mapping[str, Any] = {
    **_LLAMA_3_8B,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "head_dim": 64,
    "max_position_embeddings": 131_072,
    "rope_scaling": {**_LLAMA_3_ROPE, "factor": 32.0},
    "tie_word_embeddings": True,
}

_ONE_SCORE: Mapping[str, Any] = {"architectures": ["LlamaForSequenceClassification"], "num_labels": 1}

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
        **_LLAMA_3_8B,
        **_ONE_SCORE,
        "max_position_embeddings": 131_072,
        "rope_scaling": {**_LLAMA_3_ROPE, "factor": 8.0},
    },
    "Skywork/Skywork-Reward-V2-Llama-3.2-1B": {**_LLAMA_3_1B, **_ONE_SCORE},
    "RLHFlow/ArmoRM-Llama3-8B-v0.1": {
        **_LLAMA_3_8B,
        "architectures": ["LlamaForRewardModelWithGating"],
        "num_labels": 1,
        "num_objectives": 19,
        "gating_n_hidden": 3,
        "gating_hidden_dim": 1024,
        "gating_temperature": 10,
        "vocab_size": 128_257,
    },
    "meta-llama/Meta-Llama-3-8B-Instruct": _LLAMA_3_8B,
    "meta-llama/Llama-3.2-1B-Instruct": _LLAMA_3_1B,
}
"""Name on the Hugging Face hub -> the fields of its config.json that `config.from_hf` reads."""
