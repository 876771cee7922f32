"""Llama weights from a GGUF file, under the names and in the arrangement of Hugging Face checkpoints."""

import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from sea_jax.models import rope
from sea_jax.models.checkpoints.safetensors import Stored
from sea_jax.models.config import ModelConfig

_OUTER = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def tensors(path: Path, config: ModelConfig) -> dict[str, Stored]:
    """Lists the tensors of a GGUF file of the architecture llama; reading one dequantises it to float32.

    Args:
      path: of the file.
      config: the model's, from the config.json beside the file.

    Returns:
      Hugging Face tensor name -> Stored; a tensor without a counterpart keeps its own name.

    Raises:
      ValueError: a file that is truncated or corrupt, another architecture, a quantisation that cannot be undone, or
        metadata or rotary frequencies that differ from the configuration.
    """
    try:
        reader = gguf.GGUFReader(path)
    except (ValueError, IndexError, KeyError, OSError) as error:
        raise ValueError(f"{path} is not a whole GGUF file ({error}); fetch it again") from error
    field = reader.fields.get("general.architecture")
    architecture = None if field is None else field.contents()
    if architecture != "llama":
        raise ValueError(f"{path} has architecture {architecture!r}; supported is 'llama'")
    _check_metadata(path, reader.fields, config)
    # The rows of queries and keys stand in another order than in Hugging Face checkpoints.
    heads = {"attn_q": config.num_heads, "attn_k": config.num_kv_heads}
    found = {}
    for tensor in reader.tensors:
        if tensor.name == "rope_freqs.weight":
            _check_frequencies(path, _reader(path, tensor, None)(), config)
            continue
        layer = re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", tensor.name)
        name, rotated_heads = _OUTER.get(tensor.name, tensor.name), None
        if layer and layer[2] in _LAYER:
            name, rotated_heads = f"model.layers.{layer[1]}.{_LAYER[layer[2]]}.{layer[3]}", heads.get(layer[2])
        # GGUF lists the fastest axis first.
        shape = tuple(int(size) for size in reversed(tensor.shape))
        found[name] = Stored(path, shape, _reader(path, tensor, rotated_heads))
    return found


def _check_metadata(path: Path, fields: Mapping[str, Any], config: ModelConfig) -> None:
    """Whatever the file says of the model (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md) must be so."""
    scaling = config.rope_scaling
    # Llama 3's factor stands in the tensor rope_freqs.weight instead.
    factor = scaling.factor if isinstance(scaling, rope.Linear | rope.Yarn) else 1.0
    expected = {
        "llama.block_count": ("num_hidden_layers", config.num_layers),
        "llama.embedding_length": ("hidden_size", config.d_model),
        "llama.attention.head_count": ("num_attention_heads", config.num_heads),
        "llama.attention.head_count_kv": ("num_key_value_heads", config.num_kv_heads),
        "llama.attention.layer_norm_rms_epsilon": ("rms_norm_eps", config.norm_eps),
        "llama.rope.freq_base": ("rope_theta", config.rope_theta),
        "llama.rope.scaling.factor": ("rope_scaling", factor),
    }
    for key, (name, value) in expected.items():
        # GGUF stores float32.
        if key in fields and not np.allclose(found := fields[key].contents(), value, rtol=1e-6, atol=0):
            raise ValueError(
                f"{path} has {key} {found}, but config.json field {name!r} says {value}; is the config.json its own?"
            )


def _check_frequencies(path: Path, divisors: np.ndarray, config: ModelConfig) -> None:
    """The divisors of the plain rotary frequencies, as llama.cpp stores them, must give those of the configuration."""
    any_length = np.ones(1, np.int32)
    plain = np.asarray(rope.inverse_frequencies(replace(config, rope_scaling=None), any_length))[0]
    scaled = np.asarray(rope.inverse_frequencies(config, any_length))[0]
    if divisors.shape != scaled.shape or not np.allclose(divisors * scaled, plain, rtol=1e-4, atol=0):
        raise ValueError(
            f"tensor 'rope_freqs.weight' in {path} divides the {len(divisors)} rotary frequencies by "
            f"{divisors.min():g} to {divisors.max():g}, but config.json field 'rope_scaling' says "
            f"{config.rope_scaling}; write the model's own scaling there"
        )


def _reader(path: Path, tensor: Any, rotated_heads: int | None) -> Callable[[], np.ndarray]:
    """Dequantises a tensor and, for queries and keys, puts the rows of each head back into two halves.

    GGUF pairs rows 2 i and 2 i + 1 for the rotation; Hugging Face, and `rope.rotate`, pair i and i + head_dim / 2.
    """

    def read() -> np.ndarray:
        try:
            rows = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        except NotImplementedError as error:
            raise ValueError(f"tensor {tensor.name!r} in {path}: {error}; use another quantisation") from error
        if rotated_heads is None:
            return rows
        return rows.reshape(rotated_heads, -1, 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)

    return read
