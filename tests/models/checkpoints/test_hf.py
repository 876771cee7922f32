"""Loading and saving: what is refused, each with a message that names it."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import huggingface_hub
import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from sea_jax.models import decoder
from sea_jax.models.checkpoints import builtin, hf, layouts
from sea_jax.models.checkpoints import config_json as configs
from tests.support import tiny

CONFIG = replace(tiny.CONFIG, attention_bias=True)
PARAMS = tiny.draw(decoder.abstract(CONFIG), seed=0)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A model that loads."""
    hf.save(tmp_path / "model", CONFIG, PARAMS)
    return tmp_path / "model"


def _change_config(directory: Path, **fields: Any) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def _change_tensors(directory: Path, change: Callable[[dict[str, np.ndarray]], Any]) -> None:
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors")


@pytest.mark.parametrize("cuts", [(), (1,), (1, 2)])
@pytest.mark.parametrize("family", ["llama", "gpt_neox", "qwen3"])
def test_saved_and_loaded_again(family: Any, cuts: tuple[int, ...], tmp_path: Path) -> None:
    config = CONFIG
    if family == "gpt_neox":
        config = replace(CONFIG, family=family, num_kv_heads=4, mlp_bias=True, tie_embeddings=False)
    if family == "qwen3":
        config = replace(CONFIG, family=family, scalar_head=True)
    params = tiny.draw(decoder.abstract(config, (2,)), seed=1)
    hf.save(tmp_path / "model", config, jax.device_put(params))
    loaded = hf.load(str(tmp_path / "model"), cuts=cuts)
    assert loaded.config == config
    assert loaded.directory == tmp_path / "model"
    assert hf.read_config(tmp_path / "model") == config
    expected = decoder.recut(params, cuts)
    jax.tree.map(np.testing.assert_array_equal, loaded.params, expected)
    assert all(isinstance(leaf, np.ndarray) and leaf.dtype == np.float32 for leaf in jax.tree.leaves(loaded.params))


def test_a_tensor_without_a_place(directory: Path) -> None:
    _change_tensors(directory, lambda tensors: tensors.update({"score.weight": np.ones((1, 16), np.float32)}))
    with pytest.raises(
        ValueError, match=r"tensor 'score\.weight' in .*model\.safetensors has no place in a llama of 3"
    ):
        hf.load(directory)


def test_more_layers_than_the_config_says(directory: Path) -> None:
    _change_config(directory, num_hidden_layers=2)
    with pytest.raises(
        ValueError, match=r"tensor 'model\.layers\.2\.input_layernorm\.weight' .* no place in a llama of 2"
    ):
        hf.load(directory)


def test_a_bias_that_the_config_does_not_have(directory: Path) -> None:
    _change_config(directory, attention_bias=False)
    with pytest.raises(ValueError, match=r"tensor 'model\.layers\.0\.self_attn\.k_proj\.bias' .* has no place"):
        hf.load(directory)


def test_missing_tensors(directory: Path) -> None:
    _change_tensors(directory, lambda tensors: [tensors.pop(f"model.layers.{i}.mlp.up_proj.weight") for i in (1, 2)])
    with pytest.raises(ValueError, match=r"tensor 'model\.layers\.1\.mlp\.up_proj\.weight' and 1 more .* not found in"):
        hf.load(directory)


def test_a_tensor_of_another_shape(directory: Path) -> None:
    _change_config(directory, intermediate_size=25)
    with pytest.raises(ValueError, match=r"\.mlp\.gate_proj\.weight' in .* has shape \(24, 16\), expected \(25, 16\)"):
        hf.load(directory)


def test_a_tensor_of_integers(directory: Path) -> None:
    def quantise(tensors: dict[str, np.ndarray]) -> None:
        tensors["model.norm.weight"] = tensors["model.norm.weight"].astype(np.int8)

    _change_tensors(directory, quantise)
    with pytest.raises(ValueError, match=r"tensor 'model\.norm\.weight' in .* has dtype I8; supported are"):
        hf.load(directory)


@pytest.mark.parametrize("size_bytes", [0, 5, 100, 5000])
def test_a_truncated_file(directory: Path, size_bytes: int) -> None:
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:size_bytes])
    with pytest.raises(ValueError, match=r"model\.safetensors is not a whole safetensors file .* fetch it again"):
        hf.load(directory)


def test_pickles_are_never_read(directory: Path) -> None:
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"pytorch_model\.bin is a pickle, which can run any code.* convert it"):
        hf.load(directory)


def test_an_empty_directory(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"config\.json is missing"):
        hf.load(tmp_path)


def test_no_weights(directory: Path) -> None:
    (directory / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"holds no \*\.safetensors and no \*\.gguf"):
        hf.load(directory)


def test_no_config(directory: Path) -> None:
    (directory / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"config\.json is missing"):
        hf.load(directory)


@pytest.mark.parametrize(("text", "message"), [("{", "is not valid JSON"), ("[]", "holds a list; a JSON object")])
def test_a_config_that_is_no_object(directory: Path, text: str, message: str) -> None:
    (directory / "config.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        hf.load(directory)


def test_an_unknown_model_type(directory: Path) -> None:
    _change_config(directory, model_type="mamba")
    with pytest.raises(ValueError, match="'model_type' is 'mamba'"):
        hf.load(directory)


@pytest.mark.parametrize("source", ["./nowhere", "/nowhere/at/all", "a/b/c", Path("nowhere")])
def test_a_path_that_is_no_directory(source: str | Path) -> None:
    with pytest.raises(FileNotFoundError, match="is not a directory; pass one that holds"):
        hf.load(source)


def test_a_file_is_no_directory(directory: Path) -> None:
    with pytest.raises(FileNotFoundError, match="is not a directory"):
        hf.load(str(directory / "model.safetensors"))


def test_a_hub_that_cannot_be_asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(FileNotFoundError, match=r"'owner/nothing-here' is no directory here, and .* pass a directory"):
        hf.load("owner/nothing-here")
    with pytest.raises(FileNotFoundError, match="'a name of no repository' is no directory here"):
        hf.load("a name of no repository")


def test_names_of_the_hub_are_fetched_without_pickles(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}
    times = 0

    def snapshot_download(name: str, **given: Any) -> str:
        nonlocal times
        times += 1
        asked.update(given, name=name)
        return str(directory)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert hf.load("owner/fetched-once").directory == directory
    assert asked["name"] == "owner/fetched-once"
    assert {"*.safetensors", "*.json"} <= set(asked["allow_patterns"])
    assert not any(pattern.endswith((".bin", ".pt")) for pattern in asked["allow_patterns"])
    hf.read_config("owner/fetched-once")
    assert times == 1  # else the hub could change in between


def test_names_of_what_is_built_in(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(builtin, "directory", {"some-model": directory}.__getitem__)
    assert hf.load("builtin:some-model").directory == directory


def _shard(directory: Path) -> dict[str, str]:
    """Divides the weights among two files and returns the index's map."""
    tensors = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    placed = {name: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, name in enumerate(sorted(tensors))}
    for file in set(placed.values()):
        save_file({name: tensors[name] for name in placed if placed[name] == file}, directory / file)
    _write_index(directory, placed)
    return placed


def _write_index(directory: Path, placed: dict[str, str]) -> None:
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": placed}))


def test_shards(directory: Path) -> None:
    _shard(directory)
    jax.tree.map(np.testing.assert_array_equal, hf.load(directory).params, PARAMS)
    (directory / "model.safetensors.index.json").unlink()
    jax.tree.map(np.testing.assert_array_equal, hf.load(directory).params, PARAMS)


def test_a_single_file_comes_before_an_index(directory: Path, caplog: pytest.LogCaptureFixture) -> None:
    _shard(directory)
    again = tiny.draw(decoder.abstract(CONFIG), seed=2)
    hf.save(directory / "again", CONFIG, again)
    (directory / "again" / "model.safetensors").rename(directory / "model.safetensors")
    jax.tree.map(np.testing.assert_array_equal, hf.load(directory).params, again)
    assert f"{directory / 'model.safetensors.index.json'} beside it and its shards are ignored" in caplog.text


def test_a_missing_shard(directory: Path) -> None:
    _shard(directory)
    (directory / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"model-00002-of-00002\.safetensors is missing though"):
        hf.load(directory)


def test_an_index_that_does_not_tell_the_truth(directory: Path) -> None:
    placed = _shard(directory)
    _write_index(directory, placed | {"lm_head.weight": "model-00001-of-00002.safetensors"})
    with pytest.raises(ValueError, match=r"tensor 'lm_head\.weight' is not in .*00001.* but model\.safetensors\.index"):
        hf.load(directory)
    (directory / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(ValueError, match="is not an index of shards"):
        hf.load(directory)


def test_a_tensor_in_two_shards(directory: Path) -> None:
    _shard(directory)
    save_file({"model.norm.weight": np.ones(16, np.float32)}, directory / "model-00003-of-00003.safetensors")
    (directory / "model.safetensors.index.json").unlink()
    with pytest.raises(ValueError, match=r"tensor 'model\.norm\.weight' is in both"):
        hf.load(directory)


def test_tied_embeddings_may_stand_twice_if_they_are_one(directory: Path) -> None:
    def untie(tensors: dict[str, np.ndarray]) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()

    _change_tensors(directory, untie)
    jax.tree.map(np.testing.assert_array_equal, hf.load(directory).params, PARAMS)
    _change_tensors(directory, lambda tensors: tensors["lm_head.weight"].__setitem__((0, 0), 9.0))
    with pytest.raises(ValueError, match=r"'lm_head\.weight' in .* differs from 'model\.embed_tokens\.weight' though"):
        hf.load(directory)
    _change_config(directory, tie_word_embeddings=False)
    assert hf.load(directory).params["unembed"][0, 0] == 9.0


def test_cuts_of_an_encoder_are_refused(tmp_path: Path) -> None:
    fields = {"model_type": "bert", "vocab_size": 9, "hidden_size": 4, "num_hidden_layers": 2}
    fields |= {"num_attention_heads": 2, "intermediate_size": 5}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    with pytest.raises(ValueError, match=r"cuts \(1,\) divide the layers of a decoder"):
        hf.load(tmp_path, cuts=(1,))


def test_save_refuses_what_is_there_already(directory: Path) -> None:
    before = (directory / "config.json").read_bytes()
    with pytest.raises(FileExistsError, match="is not empty"):
        hf.save(directory, CONFIG, PARAMS)
    assert (directory / "config.json").read_bytes() == before


def test_save_leaves_nothing_behind_when_it_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full_disk(*_: Any, **__: Any) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(hf, "save_file", full_disk)
    with pytest.raises(OSError, match="no space left"):
        hf.save(tmp_path / "model", CONFIG, PARAMS)
    assert list(tmp_path.iterdir()) == []


def test_save_refuses_parameters_of_another_configuration(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"parameter 'k/bias' of layer 0: it is given, but not in the configuration"):
        hf.save(tmp_path / "model", replace(CONFIG, attention_bias=False), PARAMS)
    with pytest.raises(ValueError, match=r"parameter 'unembed' of layer None: it is not given, but in"):
        hf.save(tmp_path / "model", replace(CONFIG, tie_embeddings=False), PARAMS)
    with pytest.raises(
        ValueError, match=r"parameter 'down/kernel' of layer 0 has shape \(24, 16\), expected \(30, 16\)"
    ):
        hf.save(tmp_path / "model", replace(CONFIG, d_ff=30), PARAMS)
    assert list(tmp_path.iterdir()) == []


def test_layouts_and_abstract_trees_name_the_same_parameters() -> None:
    config = replace(CONFIG, mlp_bias=True, tie_embeddings=False)
    neox = replace(config, family="gpt_neox", num_kv_heads=4)
    # Every name is that of a parameter in one of the models that share the layout.
    qwen3 = replace(config, family="qwen3", scalar_head=True)
    for shared in ([config, qwen3], [neox, replace(neox, scalar_head=True)]):
        places = [set(hf._places(tiny.draw(decoder.abstract(one), seed=0))) for one in shared]
        held = {place for holds in layouts.layout(shared[0].family, 3).values() for place in holds}
        assert held == places[0] | places[1]


def test_a_reward_model_has_a_score_and_no_unembedding(tmp_path: Path) -> None:
    config = replace(CONFIG, scalar_head=True, tie_embeddings=False)
    hf.save(tmp_path / "model", config, tiny.draw(decoder.abstract(config), seed=0))
    tensors = load_file(tmp_path / "model" / "model.safetensors")
    assert tensors["score.weight"].shape == (1, CONFIG.d_model)
    assert "lm_head.weight" not in tensors
    _change_tensors(tmp_path / "model", lambda tensors: tensors.update({"score.weight": np.ones((2, 16), np.float32)}))
    with pytest.raises(ValueError, match=r"'score.weight' .* has shape \(2, 16\), expected \(1, 16\)"):
        hf.load(tmp_path / "model")
    _change_tensors(tmp_path / "model", lambda tensors: tensors.update({"lm_head.weight": tensors["score.weight"]}))
    with pytest.raises(ValueError, match=r"'lm_head.weight' in .* has no place in a llama"):
        hf.load(tmp_path / "model")
    _change_config(tmp_path / "model", architectures=["LlamaForCausalLM"])
    with pytest.raises(ValueError, match=r"'score.weight' in .* has no place in a llama"):
        hf.load(tmp_path / "model")


@pytest.mark.parametrize(
    ("family", "spelling", "other"),  # in the order of the alphabet
    [
        ("gpt_neox", "embed_out.weight", "lm_head.weight"),
        ("bert", "bert.embeddings.LayerNorm.beta", "embeddings.LayerNorm.bias"),
        ("deberta-v2", "deberta.embeddings.LayerNorm.bias", "pretrained_model.embeddings.LayerNorm.bias"),
    ],
)
def test_two_spellings_of_one_tensor(family: str, spelling: str, other: str, tmp_path: Path) -> None:
    fields = {"model_type": family, "vocab_size": 9, "hidden_size": 8, "num_hidden_layers": 1}
    fields |= {"num_attention_heads": 2, "intermediate_size": 5, "hidden_act": "gelu", "relative_attention": True}
    config = configs.from_hf(fields)
    params = tiny.draw(hf.abstract(config), seed=0)
    hf.save(tmp_path / "model", config, params)

    def respell(tensors: dict[str, np.ndarray]) -> None:
        tensors[spelling] = tensors.pop(layouts.canonical(family, spelling))
        tensors[other] = tensors[spelling].copy()

    _change_tensors(tmp_path / "model", respell)
    jax.tree.map(np.testing.assert_array_equal, hf.load(tmp_path / "model").params, params)
    _change_tensors(tmp_path / "model", lambda tensors: tensors[other].__setitem__(0, 9.0))
    with pytest.raises(
        ValueError, match=rf"'{spelling}' in .*'{other}' in .*model\.safetensors .* a {family} but differ"
    ):
        hf.load(tmp_path / "model")


def test_other_spellings_of_names() -> None:
    assert layouts.canonical("gpt_neox", "lm_head.weight") == "embed_out.weight"
    assert layouts.canonical("bert", "bert.embeddings.LayerNorm.gamma") == "embeddings.LayerNorm.weight"
    assert layouts.canonical("llama", "lm_head.weight") == "lm_head.weight"
