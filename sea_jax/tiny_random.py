"""A tiny decoder with random weights and a tokenizer of bytes, written as a Hugging Face directory: for trying things out."""

import json
from pathlib import Path
from typing import Any

import jax
from tokenizers import pre_tokenizers

from sea_jax.models import decoder, hf
from sea_jax.models.config import ModelConfig, from_hf

SPECIAL = ("<|end|>", "<|start|>")

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
}


def write(directory: Path, name: str, seed: int = 0) -> None:
    """Writes config.json, tokenizer.json, tokenizer_config.json and model.safetensors.

    Args:
      directory: where to; must not exist yet.
      name: one of CONFIGS.
      seed: of the weights.
    """
    pieces = [*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    special = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    vocab = {piece: number for number, piece in enumerate(pieces)}
    files: dict[str, dict[str, Any]] = {
        "config.json": {
            **CONFIGS[name],
            "vocab_size": len(pieces),
            "bos_token_id": 1,
            "eos_token_id": 0,
            "pad_token_id": 0,
        },
        "tokenizer.json": {
            "version": "1.0",
            "added_tokens": [{"id": number, "content": piece, **special} for number, piece in enumerate(SPECIAL)],
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
    origin = directory.with_name(f"{directory.name}-files")
    origin.mkdir(parents=True)
    for file_name, content in files.items():
        (origin / file_name).write_text(json.dumps(content) + "\n", encoding="utf-8")
    config = from_hf(files["config.json"])
    assert isinstance(config, ModelConfig)
    params = jax.device_get(decoder.init(config, jax.random.key(seed)))
    hf.save(directory, config, params, origin)
