"""What `hf.save` writes and what other versions wrote, against transformers."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from sea_jax.models.checkpoints import hf  # noqa: E402
from tests.support import tiny_torch  # noqa: E402

MODELS = {
    "llama": lambda: tiny_torch.llama(num_key_value_heads=2, attention_bias=True, mlp_bias=True, head_dim=10),
    "llama, tied, llama3": lambda: tiny_torch.llama(
        tie_word_embeddings=True,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 50.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        },
    ),
    "llama, longrope": lambda: tiny_torch.llama(
        rope_parameters={
            "rope_type": "longrope",
            "short_factor": [1.0, 2.0, 3.0],
            "long_factor": [2.0, 4.0, 6.0],
            "original_max_position_embeddings": 4,
        },
    ),
    "llama, yarn": lambda: tiny_torch.llama(rope_parameters={"rope_type": "yarn", "factor": 2.0, "beta_fast": 16.0}),
    "neox": lambda: tiny_torch.gpt_neox(rotary_pct=0.5, rotary_emb_base=100),
    "neox, no bias, dynamic": lambda: tiny_torch.gpt_neox(
        attention_bias=False,
        use_parallel_residual=False,
        max_position_embeddings=4,
        rope_parameters={"rope_type": "dynamic", "factor": 4.0, "partial_rotary_factor": 1.0},
    ),
    "mistral": lambda: tiny_torch.mistral(head_dim=10),
    "qwen2": lambda: tiny_torch.qwen2(rope_theta=50.0),
    "qwen2, tied": lambda: tiny_torch.qwen2(tie_word_embeddings=True),
    "qwen3": lambda: tiny_torch.qwen3(attention_bias=True),
    "llama, reward": lambda: tiny_torch.llama_reward(),
    "neox, reward": lambda: tiny_torch.gpt_neox_reward(),
    "qwen3, reward": lambda: tiny_torch.qwen3_reward(),
    "bert": lambda: tiny_torch.bert(layer_norm_eps=1e-3),
}


def _from_pretrained(model: Any, directory: Path, **given: Any) -> Any:
    """What transformers makes of the directory, as a model of the same class."""
    return type(model).from_pretrained(directory, **given)


def _outputs(model: Any) -> np.ndarray:
    """Logits, or hidden states, for some tokens."""
    with torch.no_grad():
        return model(torch.arange(1, 9)[None])[0].numpy()


@pytest.mark.parametrize("name", MODELS)
def test_transformers_loads_what_we_save(name: str, tmp_path: Path) -> None:
    model = MODELS[name]()
    loaded = tiny_torch.handed_over(model, tmp_path / "theirs")
    hf.save(tmp_path / "ours", loaded.config, loaded.params)
    again, report = _from_pretrained(model, tmp_path / "ours", output_loading_info=True)
    missing = {name for name in report["missing_keys"] if not name.startswith("pooler.")}
    assert not missing
    assert not report["unexpected_keys"]
    np.testing.assert_array_equal(_outputs(again.eval()), _outputs(model))
    fields = json.loads((tmp_path / "ours" / "config.json").read_text())
    assert fields["architectures"] == [type(model).__name__]


def test_layers_saved_from_several_stacks_keep_their_order(tmp_path: Path) -> None:
    model = tiny_torch.gpt_neox()
    loaded = tiny_torch.handed_over(model, tmp_path / "theirs", cuts=(1, 2))
    hf.save(tmp_path / "ours", loaded.config, loaded.params)
    again = _from_pretrained(model, tmp_path / "ours")
    np.testing.assert_array_equal(_outputs(again.eval()), _outputs(model))


def test_shards_and_half_precision(tmp_path: Path) -> None:
    model = tiny_torch.llama().to(torch.bfloat16)
    model.save_pretrained(tmp_path / "sharded", max_shard_size="10KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 2
    loaded = hf.load(tmp_path / "sharded")
    expected = model.model.layers[2].mlp.up_proj.weight.detach().float().numpy().T
    np.testing.assert_array_equal(loaded.params["stacks"][0]["up"]["kernel"][2], expected)
    assert loaded.params["stacks"][0]["up"]["kernel"].dtype == np.float32


def test_what_older_versions_saved_besides_parameters(tmp_path: Path) -> None:
    buffers: dict[str, dict[str, np.ndarray]] = {
        "llama": {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": np.ones(3, np.float32) for i in range(3)},
        "gpt_neox": {
            "gpt_neox.layers.0.attention.rotary_emb.inv_freq": np.ones(3, np.float32),
            "gpt_neox.layers.1.attention.bias": np.ones((1, 1, 4, 4), bool),
            "gpt_neox.layers.1.attention.masked_bias": np.array([-1e9], np.float32),
        },
        "bert": {"embeddings.position_ids": np.arange(64)[None], "cls.predictions.bias": np.ones(40, np.float32)},
    }
    for model in (tiny_torch.llama(), tiny_torch.gpt_neox(), tiny_torch.bert()):
        family = model.config.model_type
        loaded = tiny_torch.handed_over(model, tmp_path / family)
        path = tmp_path / family / "model.safetensors"
        tensors = load_file(path)
        if family == "bert":
            tensors = {f"bert.{name}".replace("LayerNorm.weight", "LayerNorm.gamma"): t for name, t in tensors.items()}
        save_file(tensors | buffers[family], path)
        again = hf.load(tmp_path / family)
        for found, expected in zip(_leaves(again.params), _leaves(loaded.params), strict=True):
            np.testing.assert_array_equal(found, expected)


def _leaves(tree: Any) -> list[np.ndarray]:
    if isinstance(tree, np.ndarray):
        return [tree]
    return [leaf for part in (tree.values() if isinstance(tree, dict) else tree) for leaf in _leaves(part)]


def test_token_ids_and_tokenizer_files_go_along(tmp_path: Path) -> None:
    model = tiny_torch.llama(bos_token_id=3, eos_token_id=[4, 5], pad_token_id=6)
    loaded = tiny_torch.handed_over(model, tmp_path / "theirs")
    (tmp_path / "theirs" / "tokenizer.json").write_text("{}")
    (tmp_path / "theirs" / "chat_template.jinja").write_text("{{ messages }}")
    hf.save(tmp_path / "ours", loaded.config, loaded.params, tokenizer_files_from=tmp_path / "theirs")
    again = transformers.AutoConfig.from_pretrained(tmp_path / "ours")
    assert (again.bos_token_id, again.eos_token_id, again.pad_token_id) == (3, [4, 5], 6)
    for name in ("tokenizer.json", "chat_template.jinja", "generation_config.json"):
        assert (tmp_path / "ours" / name).read_text() == (tmp_path / "theirs" / name).read_text()
    hf.save(tmp_path / "alone", loaded.config, loaded.params)
    assert json.loads((tmp_path / "alone" / "config.json").read_text())["eos_token_id"] is None
