"""Llama weights from a GGUF file, under the names and in the arrangement of Hugging Face checkpoints."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from sea_jax.models.stored import Stored

_OUTER = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
    # Frequencies that follow from the rope scaling rule in the configuration.
    "rope_freqs.weight": "model.rotary_emb.inv_freq",
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


def tensors(path: Path, num_heads: int, num_kv_heads: int) -> dict[str, Stored]:
    """Lists the tensors of a GGUF file of the architecture llama; reading one dequantises it to float32.

    Args:
      path: the file.
      num_heads: query heads, whose rows the file holds in another order than Hugging Face checkpoints do.
      num_kv_heads: key heads, likewise.

    Returns:
      Hugging Face tensor name -> Stored; a tensor without a counterpart keeps its own name.

    Raises:
      ValueError: a file that is truncated or corrupt, another architecture, a quantisation that cannot be undone.
    """
    try:
        reader = gguf.GGUFReader(path)
    except (ValueError, IndexError, KeyError, OSError) as error:
        raise ValueError(f"{path} is not a whole GGUF file ({error}); fetch it again") from error
    field = reader.fields.get("general.architecture")
    architecture = None if field is None else field.contents()
    if architecture != "llama":
        raise ValueError(f"{path} has architecture {architecture!r}; supported is 'llama'")
    heads = {"attn_q": num_heads, "attn_k": num_kv_heads}
    found = {}
    for tensor in reader.tensors:
        layer = re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", tensor.name)
        name, rotated_heads = _OUTER.get(tensor.name, tensor.name), None
        if layer and layer[2] in _LAYER:
            name, rotated_heads = f"model.layers.{layer[1]}.{_LAYER[layer[2]]}.{layer[3]}", heads.get(layer[2])
        # GGUF lists the fastest axis first.
        shape = tuple(int(size) for size in reversed(tensor.shape))
        found[name] = Stored(path, shape, _reader(path, tensor, rotated_heads))
    return found


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
