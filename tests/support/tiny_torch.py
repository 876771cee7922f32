"""Tiny models of transformers with random parameters, handed over to this library through their files."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

from sea_jax.models.checkpoints import hf

torch.set_num_threads(1)  # threads that wait for work this small take longer than the work

SIZES = {
    "vocab_size": 40,
    "hidden_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 28,
    "max_position_embeddings": 64,
}


def llama(**fields: Any) -> transformers.LlamaForCausalLM:
    """A Llama with random parameters; fields change the configuration."""
    return randomised(transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES | fields)))


def mistral(**fields: Any) -> transformers.MistralForCausalLM:
    """A Mistral with random parameters and full attention; fields change the configuration."""
    config = transformers.MistralConfig(**SIZES | {"num_key_value_heads": 2, "sliding_window": None} | fields)
    return randomised(transformers.MistralForCausalLM(config))


def qwen2(**fields: Any) -> transformers.Qwen2ForCausalLM:
    """A Qwen2 with random parameters; fields change the configuration."""
    config = transformers.Qwen2Config(**SIZES | {"num_key_value_heads": 2} | fields)
    return randomised(transformers.Qwen2ForCausalLM(config))


def qwen3(**fields: Any) -> transformers.Qwen3ForCausalLM:
    """A Qwen3 with random parameters; fields change the configuration."""
    config = transformers.Qwen3Config(**SIZES | {"num_key_value_heads": 2, "head_dim": 10} | fields)
    return randomised(transformers.Qwen3ForCausalLM(config))


def llama_reward(**fields: Any) -> transformers.LlamaForSequenceClassification:
    """A Llama that scores, with random parameters; fields change the configuration."""
    config = transformers.LlamaConfig(**SIZES | {"num_key_value_heads": 2, "num_labels": 1} | fields)
    return randomised(transformers.LlamaForSequenceClassification(config))


def gpt_neox_reward(**fields: Any) -> transformers.GPTNeoXForSequenceClassification:
    """A GPT-NeoX that scores, with random parameters; fields change the configuration."""
    config = transformers.GPTNeoXConfig(**SIZES | {"num_labels": 1} | fields)
    return randomised(transformers.GPTNeoXForSequenceClassification(config))


def qwen3_reward(**fields: Any) -> transformers.Qwen3ForSequenceClassification:
    """A Qwen3 that scores, with random parameters and tied embeddings; fields change the configuration."""
    own = {"num_key_value_heads": 2, "head_dim": 10, "num_labels": 1, "tie_word_embeddings": True}
    return randomised(transformers.Qwen3ForSequenceClassification(transformers.Qwen3Config(**SIZES | own | fields)))


def gpt_neox(**fields: Any) -> transformers.GPTNeoXForCausalLM:
    """A GPT-NeoX with random parameters; fields change the configuration."""
    return randomised(transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(**SIZES | fields)))


def bert(**fields: Any) -> transformers.BertModel:
    """A BERT with random parameters; fields change the configuration."""
    return randomised(transformers.BertModel(transformers.BertConfig(**SIZES | fields)))


def deberta(**fields: Any) -> transformers.DebertaV2Model:
    """A DeBERTa like v3, of 8 buckets up to 24 tokens away, with random parameters; fields change the configuration."""
    v3: dict[str, Any] = {
        "relative_attention": True,
        "max_position_embeddings": 24,
        "position_buckets": 8,
        "pos_att_type": ["p2c", "c2p"],
        "share_att_key": True,
        "norm_rel_ebd": "layer_norm",
        "position_biased_input": False,
        "type_vocab_size": 0,
    }
    return randomised(transformers.DebertaV2Model(transformers.DebertaV2Config(**SIZES | v3 | fields)))


def deberta_reward(**fields: Any) -> transformers.DebertaV2ForSequenceClassification:
    """A DeBERTa like v3 that scores, with random parameters; fields change the configuration."""
    config = deberta(num_labels=1, pooler_hidden_size=SIZES["hidden_size"], **fields).config
    return randomised(transformers.DebertaV2ForSequenceClassification(config))


def randomised(model: Any) -> Any:
    """Moves every parameter, biases and norm scales too, so that none of them can be left out unseen."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def handed_over(model: Any, directory: Path, cuts: Sequence[int] = ()) -> hf.Loaded:
    """The model as `hf.load` reads it from what transformers saved."""
    model.save_pretrained(directory)
    return hf.load(directory, cuts=cuts)
