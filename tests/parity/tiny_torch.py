"""Tiny models of transformers with random parameters, handed over to this library through their files."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

from sea_jax.models import hf

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


def gpt_neox(**fields: Any) -> transformers.GPTNeoXForCausalLM:
    """A GPT-NeoX with random parameters; fields change the configuration."""
    return randomised(transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(**SIZES | fields)))


def bert(**fields: Any) -> transformers.BertModel:
    """A BERT with random parameters; fields change the configuration."""
    return randomised(transformers.BertModel(transformers.BertConfig(**SIZES | fields)))


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
