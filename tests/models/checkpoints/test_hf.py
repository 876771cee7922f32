"""Loading and saving: what is refused, each with a message that names it."""

import json
import shutil
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
from sea_jax.models.checkpoints import builtin, hf, layouts, safetensors
from sea_jax.models.checkpoints import config_json as configs
from sea_jax.models.config import Gating
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


@pytest.mark.parametrize("kept", ["index", "single", "other names"])
def test_of_a_repository_of_the_hub_only_what_is_read_is_fetched(
    directory: Path, kept: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (directory / "tokenizer.json").write_text("{}")
    if kept == "index":
        _shard(directory)
    if kept == "other names":
        (directory / "model.safetensors").rename(directory / "pytorch_model.safetensors")
    else:
        (directory / "consolidated.safetensors").write_bytes(b"the same again")
    (directory / "pytorch_model.bin").write_bytes(b"a pickle")
    here, asked = tmp_path / "snapshots" / "c0ffee", []

    def snapshot_download(
        name: str, *, revision: str | None, allow_patterns: list[str], ignore_patterns: list[str]
    ) -> str:
        asked.append((name, revision))
        here.mkdir(parents=True, exist_ok=True)
        for path in directory.iterdir():
            if any(path.match(pattern) for pattern in allow_patterns):
                shutil.copy(path, here)
        return str(here)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    name = f"owner/fetched-once-{kept.replace(' ', '-')}"
    assert hf.locate(f"{name}@v1.0", weights=False) == here
    assert not list(here.glob("*.safetensors"))
    jax.tree.map(np.testing.assert_array_equal, hf.load(f"{name}@v1.0").params, PARAMS)
    assert {path.name for path in here.iterdir()} == (
        {path.name for path in directory.iterdir()} - {"consolidated.safetensors", "pytorch_model.bin"}
    )
    assert asked[0] == (name, "v1.0")
    assert set(asked) == {(name, "v1.0"), (name, "c0ffee")}  # the weights are of the commit that the files are of
    times = len(asked)
    hf.read_config(f"{name}@v1.0")
    assert len(asked) == times  # else the hub could change in between


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

    monkeypatch.setattr(safetensors, "save_file", full_disk)
    with pytest.raises(OSError, match="no space left"):
        hf.save(tmp_path / "model", CONFIG, PARAMS)
    assert list(tmp_path.iterdir()) == []


def test_weights_that_are_written_are_kept_when_a_file_beside_them_cannot_be_copied(
    directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreadable(*_: Any) -> None:
        raise PermissionError("tokenizer.json: not yours")

    (directory / "tokenizer.json").write_text("{}")
    monkeypatch.setattr(hf.shutil, "copyfile", unreadable)
    with pytest.raises(OSError, match=r"not yours; .*saved is not complete, but its weights are, in (.*)$") as error:
        hf.save(tmp_path / "saved", CONFIG, PARAMS, directory)
    kept = Path(str(error.value).rpartition(" in ")[2])
    assert load_file(kept / "model.safetensors").keys() == load_file(directory / "model.safetensors").keys()


def test_directories_beside_the_tokenizers_files_are_left_alone(directory: Path, tmp_path: Path) -> None:
    (directory / "tokenizer_old").mkdir()
    (directory / "tokenizer_config.json").write_text("{}")
    hf.save(tmp_path / "saved", CONFIG, PARAMS, directory)
    found = {path.name for path in (tmp_path / "saved").iterdir()}
    assert found == {"config.json", "model.safetensors", "tokenizer_config.json"}


def test_large_models_are_saved_in_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(safetensors, "SHARD_BYTES", 3000)
    hf.save(tmp_path / "saved", CONFIG, PARAMS)
    shards = sorted((tmp_path / "saved").glob("*.safetensors"))
    index = json.loads((tmp_path / "saved" / "model.safetensors.index.json").read_text())
    assert [path.name for path in shards] == [
        f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))
    ]
    sizes = [sum(x.nbytes for x in load_file(path).values()) for path in shards]
    assert len(shards) > 3
    assert max(sizes) <= 3000
    assert index["metadata"]["total_size"] == sum(sizes)
    assert set(index["weight_map"].values()) == {path.name for path in shards}
    jax.tree.map(np.testing.assert_array_equal, hf.load(tmp_path / "saved").params, PARAMS)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_dtype_of_what_is_stored(dtype: str, tmp_path: Path) -> None:
    hf.save(tmp_path / "saved", CONFIG, PARAMS, dtype=dtype)
    assert hf.stored_dtype(tmp_path / "saved") == dtype
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["dtype"] == dtype
    loaded = hf.load(tmp_path / "saved").params
    rounded = jax.tree.map(lambda x: x.astype(jax.numpy.dtype(dtype)).astype(np.float32), PARAMS)
    jax.tree.map(np.testing.assert_array_equal, loaded, rounded)
    _change_tensors(tmp_path / "saved", lambda tensors: tensors.update({"model.norm.weight": np.ones(16, np.float32)}))
    assert hf.stored_dtype(tmp_path / "saved") == dtype  # of most


def test_an_adapter_is_called_one(directory: Path) -> None:
    adapter = {"peft_type": "LORA", "base_model_name_or_path": "owner/base"}
    (directory / "adapter_config.json").write_text(json.dumps(adapter))
    assert hf.read_config(directory) == CONFIG  # a whole model with an adapter beside it
    (directory / "model.safetensors").rename(directory / "adapter_model.safetensors")
    message = r"holds an adapter \(LORA\) of owner/base, not a whole model: name what merge_and_unload\(\) of peft"
    with pytest.raises(ValueError, match=message):
        hf.load(directory)
    (directory / "config.json").unlink()
    for weights in (True, False):
        with pytest.raises(ValueError, match=message):
            hf.read_config(directory, weights=weights)


@pytest.mark.parametrize("method", ["fp8", "gptq", "awq"])
def test_quantised_weights_are_called_so(directory: Path, method: str) -> None:
    _change_config(directory, quantization_config={"quant_method": method, "bits": 4})
    with pytest.raises(
        ValueError, match=rf"field 'quantization_config' says {method}: quantised weights are not read.*name"
    ):
        hf.load(directory)
    assert hf.read_config(directory, weights=False) == CONFIG  # servers may well read them


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
    gated = replace(config, scalar_head=True, gating=Gating(5, num_hidden=1, hidden_size=4, temperature=1.0))
    for shared in ([config, qwen3, gated], [neox, replace(neox, scalar_head=True)]):
        places = [set(hf._places(tiny.draw(decoder.abstract(one), seed=0))) for one in shared]
        layout = layouts.layout(shared[0].family, 3, 2 if gated in shared else 0)
        held = {place for holds in layout.values() for place in holds}
        assert held == set().union(*places)


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
