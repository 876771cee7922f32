"""Tiny models with random weights and a tokenizer of bytes, written as a Hugging Face directory: for trying things out."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from tokenizers import pre_tokenizers

from sea_jax.models.checkpoints import hf
from sea_jax.models.checkpoints.config_json import from_hf
from sea_jax.models.parameters import initialise

SPECIAL = ("<|end|>", "<|start|>")
PREFIXES = ("<|source|>", "<|candidate|>")  # of a pair ranker, behind the ones above
HEADERS = ("<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>")  # of Llama 3's conversations, likewise

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}{{ eos_token }}"
    "{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
)

LLAMA3_CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'"
    " + message['content'] | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)

CONFIGS = {
    "tiny-random-llama": {
        "model_type": "llama",
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
        "max_position_embeddings": 256,
        "initializer_range": 0.3,  # far from uniform, so that responses differ in likelihood
    },
    "tiny-random-gpt-neox": {
        "model_type": "gpt_neox",
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "rotary_pct": 0.25,
        "max_position_embeddings": 256,
        "initializer_range": 0.3,
    },
    "tiny-random-llama-reward": {
        "model_type": "llama",
        "architectures": ["LlamaForSequenceClassification"],
        "num_labels": 1,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 1024,
        "initializer_range": 0.3,
    },
    "tiny-random-llama-gated": {
        "model_type": "llama",
        "architectures": ["LlamaForRewardModelWithGating"],
        "num_labels": 1,
        "num_objectives": 19,
        "gating_n_hidden": 3,
        "gating_hidden_dim": 24,
        "gating_temperature": 10,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 1024,
        "initializer_range": 0.3,
    },
    "tiny-random-deberta": {
        "model_type": "deberta-v2",
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "relative_attention": True,
        "max_position_embeddings": 64,
        "position_buckets": 16,
        "pos_att_type": ["p2c", "c2p"],
        "share_att_key": True,
        "norm_rel_ebd": "layer_norm",
        "position_biased_input": False,
        "initializer_range": 0.3,
    },
}


def write(directory: Path, name: str, seed: int = 0, changes: Mapping[str, Any] | None = None) -> None:
    """Writes config.json, tokenizer.json, tokenizer_config.json and model.safetensors into a new directory.

    Args:
      directory: must not exist yet.
      name: one of CONFIGS.
      seed: of the weights.
      changes: fields of config.json that differ from CONFIGS.
    """
    ranks_pairs = CONFIGS[name]["model_type"] == "deberta-v2"
    is_gated = "num_objectives" in CONFIGS[name]
    tokens = (*SPECIAL, *(PREFIXES if ranks_pairs else HEADERS if is_gated else ()))
    pieces = [*tokens, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    special = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    vocab = {piece: number for number, piece in enumerate(pieces)}
    files: dict[str, dict[str, Any]] = {
        "config.json": {
            **CONFIGS[name],
            **(changes or {}),
            "vocab_size": len(pieces),
            "bos_token_id": 1,
            "eos_token_id": 0,
            "pad_token_id": 0,
        },
        "tokenizer.json": {
            "version": "1.0",
            "added_tokens": [{"id": number, "content": piece, **special} for number, piece in enumerate(tokens)],
            "pre_tokenizer": byte_level,
            "decoder": byte_level,
            "model": {"type": "BPE", "vocab": vocab, "merges": []},
        },
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": SPECIAL[0],
            "pad_token": SPECIAL[0],
            "bos_token": SPECIAL[1],
        },
    }
    if "architectures" in CONFIGS[name]:  # reward models read conversations
        files["tokenizer_config.json"]["chat_template"] = LLAMA3_CHAT_TEMPLATE if is_gated else CHAT_TEMPLATE
    if ranks_pairs:  # and end every text
        around = [{"SpecialToken": {"id": token, "type_id": 0}} for token in SPECIAL]
        files["tokenizer.json"]["post_processor"] = {
            "type": "TemplateProcessing",
            "single": [around[1], {"Sequence": {"id": "A", "type_id": 0}}, around[0]],
            "pair": [],
            "special_tokens": {token: {"id": token, "ids": [vocab[token]], "tokens": [token]} for token in SPECIAL},
        }
    origin = directory.with_name(f"{directory.name}-files")
    origin.mkdir(parents=True)
    for file_name, content in files.items():
        (origin / file_name).write_text(json.dumps(content) + "\n", encoding="utf-8")
    config = from_hf(files["config.json"])
    params = jax.device_get(initialise(hf.abstract(config), jax.random.key(seed)))
    hf.save(directory, config, params, origin)
