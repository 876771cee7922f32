"""How Hugging Face checkpoints name and arrange the parameters of each model family."""

import re
from collections.abc import Mapping
from dataclasses import dataclass

Layout = Mapping[str, tuple[str, ...]]
"""Tensor name -> the path of the parameter it holds, or three where the rows interleave q, k and v head by head."""


@dataclass(frozen=True)
class Names:
    """The tensors of one family.

    Attributes:
      outer: the tensors outside the layers.
      layer_prefix: what stands before a layer's number.
      layer: the tensors of each layer, by the name after its number and a dot.
      ignored: names of tensors that hold no parameter.
      spellings: (pattern, replacement) that bring other spellings of a name to the one above.
    """

    outer: Layout
    layer_prefix: str
    layer: Layout
    ignored: re.Pattern[str]
    spellings: tuple[tuple[str, str], ...] = ()


_LLAMA = Names(
    outer={
        "model.embed_tokens.weight": ("embed",),
        "model.norm.weight": ("final_norm/scale",),
        "lm_head.weight": ("unembed",),
        "score.weight": ("score",),
        "regression_layer.weight": ("objectives/kernel",),
        "reward_transform_matrix": ("transform",),
        "gating.logit_scale": ("gating/scale",),
    },
    layer_prefix="model.layers.",
    layer={
        "input_layernorm.weight": ("attention_norm/scale",),
        "self_attn.q_proj.weight": ("q/kernel",),
        "self_attn.q_proj.bias": ("q/bias",),
        "self_attn.k_proj.weight": ("k/kernel",),
        "self_attn.k_proj.bias": ("k/bias",),
        "self_attn.v_proj.weight": ("v/kernel",),
        "self_attn.v_proj.bias": ("v/bias",),
        "self_attn.o_proj.weight": ("o/kernel",),
        "self_attn.o_proj.bias": ("o/bias",),
        "self_attn.q_norm.weight": ("q_norm/scale",),
        "self_attn.k_norm.weight": ("k_norm/scale",),
        "post_attention_layernorm.weight": ("mlp_norm/scale",),
        "mlp.gate_proj.weight": ("gate/kernel",),
        "mlp.gate_proj.bias": ("gate/bias",),
        "mlp.up_proj.weight": ("up/kernel",),
        "mlp.up_proj.bias": ("up/bias",),
        "mlp.down_proj.weight": ("down/kernel",),
        "mlp.down_proj.bias": ("down/bias",),
    },
    # Buffers that older versions of transformers saved.
    ignored=re.compile(r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq"),
)

_GPT_NEOX = Names(
    outer={
        "gpt_neox.embed_in.weight": ("embed",),
        "gpt_neox.final_layer_norm.weight": ("final_norm/scale",),
        "gpt_neox.final_layer_norm.bias": ("final_norm/bias",),
        "embed_out.weight": ("unembed",),
        "score.weight": ("score",),
    },
    layer_prefix="gpt_neox.layers.",
    layer={
        "input_layernorm.weight": ("attention_norm/scale",),
        "input_layernorm.bias": ("attention_norm/bias",),
        "attention.query_key_value.weight": ("q/kernel", "k/kernel", "v/kernel"),
        "attention.query_key_value.bias": ("q/bias", "k/bias", "v/bias"),
        "attention.dense.weight": ("o/kernel",),
        "attention.dense.bias": ("o/bias",),
        "post_attention_layernorm.weight": ("mlp_norm/scale",),
        "post_attention_layernorm.bias": ("mlp_norm/bias",),
        "mlp.dense_h_to_4h.weight": ("up/kernel",),
        "mlp.dense_h_to_4h.bias": ("up/bias",),
        "mlp.dense_4h_to_h.weight": ("down/kernel",),
        "mlp.dense_4h_to_h.bias": ("down/bias",),
    },
    # Rotary buffers and causal masks that older versions of transformers saved.
    ignored=re.compile(r"gpt_neox\.(layers\.\d+\.attention\.)?(rotary_emb\.inv_freq|bias|masked_bias)"),
    # The name inside transformers 5, which saves it under the older one.
    spellings=((r"^lm_head\.", "embed_out."),),
)

_BERT = Names(
    outer={
        "embeddings.word_embeddings.weight": ("embed/word",),
        "embeddings.position_embeddings.weight": ("embed/position",),
        "embeddings.token_type_embeddings.weight": ("embed/token_type",),
        "embeddings.LayerNorm.weight": ("embed_norm/scale",),
        "embeddings.LayerNorm.bias": ("embed_norm/bias",),
    },
    layer_prefix="encoder.layer.",
    layer={
        "attention.self.query.weight": ("q/kernel",),
        "attention.self.query.bias": ("q/bias",),
        "attention.self.key.weight": ("k/kernel",),
        "attention.self.key.bias": ("k/bias",),
        "attention.self.value.weight": ("v/kernel",),
        "attention.self.value.bias": ("v/bias",),
        "attention.output.dense.weight": ("o/kernel",),
        "attention.output.dense.bias": ("o/bias",),
        "attention.output.LayerNorm.weight": ("attention_norm/scale",),
        "attention.output.LayerNorm.bias": ("attention_norm/bias",),
        "intermediate.dense.weight": ("up/kernel",),
        "intermediate.dense.bias": ("up/bias",),
        "output.dense.weight": ("down/kernel",),
        "output.dense.bias": ("down/bias",),
        "output.LayerNorm.weight": ("mlp_norm/scale",),
        "output.LayerNorm.bias": ("mlp_norm/bias",),
    },
    # The pooler and the pretraining heads stand after the hidden states that the encoder returns.
    ignored=re.compile(r"embeddings\.(position_ids|token_type_ids)|pooler\..*|cls\..*"),
    # Saved with a head on top, and by the first TensorFlow conversions.
    spellings=((r"^bert\.", ""), (r"\.gamma$", ".weight"), (r"\.beta$", ".bias")),
)

_DEBERTA = Names(
    outer={
        "embeddings.word_embeddings.weight": ("embed/word",),
        "embeddings.position_embeddings.weight": ("embed/position",),
        "embeddings.token_type_embeddings.weight": ("embed/token_type",),
        "embeddings.LayerNorm.weight": ("embed_norm/scale",),
        "embeddings.LayerNorm.bias": ("embed_norm/bias",),
        "encoder.rel_embeddings.weight": ("relative",),
        "encoder.LayerNorm.weight": ("relative_norm/scale",),
        "encoder.LayerNorm.bias": ("relative_norm/bias",),
        "encoder.conv.conv.weight": ("conv/kernel",),
        "encoder.conv.conv.bias": ("conv/bias",),
        "encoder.conv.LayerNorm.weight": ("conv_norm/scale",),
        "encoder.conv.LayerNorm.bias": ("conv_norm/bias",),
        "pooler.dense.weight": ("pooler/kernel",),
        "pooler.dense.bias": ("pooler/bias",),
        "classifier.weight": ("classifier/kernel",),
        "classifier.bias": ("classifier/bias",),
    },
    layer_prefix="encoder.layer.",
    layer={
        "attention.self.query_proj.weight": ("q/kernel",),
        "attention.self.query_proj.bias": ("q/bias",),
        "attention.self.key_proj.weight": ("k/kernel",),
        "attention.self.key_proj.bias": ("k/bias",),
        "attention.self.value_proj.weight": ("v/kernel",),
        "attention.self.value_proj.bias": ("v/bias",),
        "attention.self.pos_query_proj.weight": ("relative_q/kernel",),
        "attention.self.pos_query_proj.bias": ("relative_q/bias",),
        "attention.self.pos_key_proj.weight": ("relative_k/kernel",),
        "attention.self.pos_key_proj.bias": ("relative_k/bias",),
        "attention.output.dense.weight": ("o/kernel",),
        "attention.output.dense.bias": ("o/bias",),
        "attention.output.LayerNorm.weight": ("attention_norm/scale",),
        "attention.output.LayerNorm.bias": ("attention_norm/bias",),
        "intermediate.dense.weight": ("up/kernel",),
        "intermediate.dense.bias": ("up/bias",),
        "output.dense.weight": ("down/kernel",),
        "output.dense.bias": ("down/bias",),
        "output.LayerNorm.weight": ("mlp_norm/scale",),
        "output.LayerNorm.bias": ("mlp_norm/bias",),
    },
    # Other heads stand after the hidden states that the encoder returns; some checkpoints kept positions that are not added.
    ignored=re.compile(
        r"embeddings\.(position_ids|position_embeddings\.weight)"
        r"|(pooler|classifier|cls|lm_predictions|mask_predictions|head_layer)\..*"
    ),
    # Saved with a head on top, the second one by PairRM (https://arxiv.org/abs/2306.02561).
    spellings=((r"^(deberta|pretrained_model)\.", ""),),
)

FAMILIES: Mapping[str, Names] = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "gpt_neox": _GPT_NEOX,
    "bert": _BERT,
    "deberta-v2": _DEBERTA,
}
"""The names of each family, by the family of a configuration."""


def canonical(family: str, tensor: str) -> str:
    """The one spelling of a tensor's name that a family's layouts use, unchanged where there is no other."""
    for pattern, replacement in FAMILIES[family].spellings:
        tensor = re.sub(pattern, replacement, tensor)
    return tensor


def layout(family: str, num_layers: int, num_gating_layers: int = 0) -> dict[str, tuple[tuple[int | None, str], ...]]:
    """Every tensor that a checkpoint of a family, a key of FAMILIES, may hold, with the parameters in it.

    Args:
      family: a key of FAMILIES.
      num_layers: of the model.
      num_gating_layers: of the network that weighs a reward model's objectives.

    Returns:
      Tensor name -> (layer number, or None outside the layers; path of the parameter) for each parameter it holds.
    """
    names = FAMILIES[family]
    whole: dict[str, tuple[tuple[int | None, str], ...]] = {
        tensor: tuple((None, path) for path in paths) for tensor, paths in names.outer.items()
    }
    for layer in range(num_layers):
        for tensor, paths in names.layer.items():
            whole[f"{names.layer_prefix}{layer}.{tensor}"] = tuple((layer, path) for path in paths)
    for layer in range(num_gating_layers):
        for tensor, path in (("weight", "kernel"), ("bias", "bias")):
            whole[f"gating.layers.{layer}.{tensor}"] = ((None, f"gating/{layer}/{path}"),)
    return whole
