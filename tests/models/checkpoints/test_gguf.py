"""GGUF weights: their names, the order of their rows, quantisation, and what is refused."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf as gguf_files
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sea_jax.models import decoder, rope
from sea_jax.models.checkpoints import builtin, hf
from sea_jax.models.checkpoints import config_json as configs
from sea_jax.models.config import ModelConfig
from tests.support import tiny

CONFIG = ModelConfig(
    family="llama",
    vocab_size=40,
    d_model=64,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    d_ff=96,
    activation="silu",
    norm_eps=1e-5,
    max_positions=64,
    tie_embeddings=True,
)
PARAMS = tiny.draw(decoder.abstract(CONFIG), seed=0)
QUANTISED = gguf_files.GGMLQuantizationType


def _interleaved(rows: np.ndarray, heads: int) -> np.ndarray:
    """The rows of every head as llama.cpp wants them: the two halves of a head taking turns."""
    return np.concatenate([row for head in np.split(rows, heads) for row in np.stack(np.split(head, 2), axis=1)])


def _write(
    directory: Path,
    extra: Mapping[str, np.ndarray] | None = None,
    kind: Any = None,
    arch: str = "llama",
    metadata: Mapping[str, float] | None = None,
) -> Path:
    """A GGUF file of the parameters, of extra tensors and of metadata, with config.json beside it."""
    (directory / "config.json").write_text(json.dumps(configs.to_hf(CONFIG)))
    writer = gguf_files.GGUFWriter(directory / "model.gguf", arch)
    for key, value in (metadata or {}).items():
        if isinstance(value, int):
            writer.add_uint32(f"llama.{key}", value)
        else:
            writer.add_float32(f"llama.{key}", value)
    layers = PARAMS["stacks"][0]

    def add(name: str, rows: np.ndarray) -> None:
        if kind is None or rows.ndim == 1:
            writer.add_tensor(name, np.ascontiguousarray(rows))
        else:
            data = gguf_files.quants.quantize(np.ascontiguousarray(rows), kind)
            writer.add_tensor(name, data, raw_dtype=kind)

    add("token_embd.weight", PARAMS["embed"])
    add("output_norm.weight", PARAMS["final_norm"]["scale"])
    kernels = {"attn_v": "v", "attn_output": "o", "ffn_gate": "gate", "ffn_up": "up", "ffn_down": "down"}
    for i in range(CONFIG.num_layers):
        add(f"blk.{i}.attn_q.weight", _interleaved(layers["q"]["kernel"][i].T, CONFIG.num_heads))
        add(f"blk.{i}.attn_k.weight", _interleaved(layers["k"]["kernel"][i].T, CONFIG.num_kv_heads))
        add(f"blk.{i}.attn_norm.weight", layers["attention_norm"]["scale"][i])
        add(f"blk.{i}.ffn_norm.weight", layers["mlp_norm"]["scale"][i])
        for name, ours in kernels.items():
            add(f"blk.{i}.{name}.weight", layers[ours]["kernel"][i].T)
    for name, rows in (extra or {}).items():
        add(name, rows)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return directory / "model.gguf"


def test_every_parameter_finds_its_place(tmp_path: Path) -> None:
    _write(tmp_path, {"rope_freqs.weight": np.ones(8, np.float32)})
    loaded = hf.load(tmp_path, cuts=(1,))
    assert loaded.config == CONFIG
    jax.tree.map(np.testing.assert_array_equal, loaded.params, decoder.recut(PARAMS, (1,)))


METADATA = {
    "block_count": 2,
    "embedding_length": 64,
    "attention.head_count": 4,
    "attention.head_count_kv": 2,
    "attention.layer_norm_rms_epsilon": 1e-5,
    "rope.freq_base": 10_000.0,
    "rope.scaling.factor": 1.0,
}


def test_metadata_that_agrees(tmp_path: Path) -> None:
    _write(tmp_path, metadata=METADATA)
    assert hf.load(tmp_path).config == CONFIG


@pytest.mark.parametrize(
    ("key", "value", "field"),
    [
        ("block_count", 3, "'num_hidden_layers' says 2"),
        ("embedding_length", 32, "'hidden_size' says 64"),
        ("attention.head_count", 8, "'num_attention_heads' says 4"),
        ("attention.head_count_kv", 4, "'num_key_value_heads' says 2"),
        ("attention.layer_norm_rms_epsilon", 2.0**-20, "'rms_norm_eps' says 1e-05"),
        ("rope.freq_base", 500_000.0, "'rope_theta' says 10000.0"),
        ("rope.scaling.factor", 4.0, "'rope_scaling' says 1.0"),
    ],
)
def test_metadata_of_another_model(tmp_path: Path, key: str, value: float, field: str) -> None:
    _write(tmp_path, metadata=METADATA | {key: value})
    with pytest.raises(ValueError, match=rf"model\.gguf has llama\.{key} {value}, but config\.json field {field}; is"):
        hf.load(tmp_path)


# Of wavelengths 2 pi 10 ** (i / 2) those under 64 / 4 are kept, those over 64 / 1 divided by 8, two are in between.
LLAMA3 = rope.Llama3(8.0, 1.0, 4.0, 64)
DIVISORS = np.array([1, 1.293976, 7.667385, 8, 8, 8, 8, 8], np.float32)


def test_rotary_frequencies_must_be_those_of_the_config(tmp_path: Path) -> None:
    _write(tmp_path, {"rope_freqs.weight": DIVISORS})
    named = r"'rope_freqs\.weight' in .*model\.gguf divides the 8 .* by 1 to 8, but .* field 'rope_scaling' says"
    with pytest.raises(ValueError, match=f"{named} None"):
        hf.load(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(configs.to_hf(replace(CONFIG, rope_scaling=LLAMA3))))
    assert hf.load(tmp_path).config == replace(CONFIG, rope_scaling=LLAMA3)
    other = replace(CONFIG, rope_scaling=replace(LLAMA3, low_freq_factor=1.01))
    (tmp_path / "config.json").write_text(json.dumps(configs.to_hf(other)))
    with pytest.raises(ValueError, match=f"{named} Llama3"):
        hf.load(tmp_path)


@pytest.mark.parametrize(("kind", "tolerance"), [(QUANTISED.Q8_0, 0.01), (QUANTISED.Q4_1, 0.1), (QUANTISED.BF16, 0.01)])
def test_quantised_weights(tmp_path: Path, kind: Any, tolerance: float) -> None:
    _write(tmp_path, kind=kind)
    params = hf.load(tmp_path).params
    jax.tree.map(lambda found, expected: np.testing.assert_allclose(found, expected, atol=tolerance), params, PARAMS)
    assert not np.array_equal(params["embed"], PARAMS["embed"])


def test_a_tensor_without_a_place(tmp_path: Path) -> None:
    _write(tmp_path, {"blk.0.attn_q.bias": np.ones(64, np.float32)})
    with pytest.raises(
        ValueError, match=r"tensor 'model\.layers\.0\.self_attn\.q_proj\.bias' in .*model\.gguf has no place"
    ):
        hf.load(tmp_path)


def test_an_unknown_tensor_keeps_its_name(tmp_path: Path) -> None:
    _write(tmp_path, {"blk.0.ffn_gate_exps.weight": np.ones((4, 64), np.float32)})
    with pytest.raises(ValueError, match=r"tensor 'blk\.0\.ffn_gate_exps\.weight' in"):
        hf.load(tmp_path)


def test_another_architecture(tmp_path: Path) -> None:
    _write(tmp_path, arch="gptneox")
    with pytest.raises(ValueError, match=r"model\.gguf has architecture 'gptneox'; supported is 'llama'"):
        hf.load(tmp_path)


def test_a_config_of_another_family(tmp_path: Path) -> None:
    _write(tmp_path)
    fields = json.loads((tmp_path / "config.json").read_text()) | {"model_type": "gpt_neox"}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    with pytest.raises(ValueError, match=r"GGUF, which is supported for llama, but config\.json says gpt_neox"):
        hf.load(tmp_path)


def test_two_files(tmp_path: Path) -> None:
    path = _write(tmp_path)
    (tmp_path / "other.gguf").write_bytes(path.read_bytes())
    with pytest.raises(ValueError, match=r"holds model\.gguf, other\.gguf; keep one GGUF file"):
        hf.load(tmp_path)


@pytest.mark.parametrize("part", [0.0, 0.01, 0.5, 0.999])
def test_a_truncated_file(tmp_path: Path, part: float) -> None:
    path = _write(tmp_path)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(part * len(whole))])
    with pytest.raises(ValueError, match=r"model\.gguf is not a whole GGUF file .* fetch it again"):
        hf.load(tmp_path)


@pytest.mark.slow
def test_smollm2_knows_the_capital_of_france() -> None:
    from sea_jax.models import tokenizer

    directory = builtin.directory("smollm2-135m-instruct")
    loaded, own_tokenizer = hf.load(directory), tokenizer.load(directory)
    assert isinstance(loaded.config, ModelConfig)
    params = jax.device_put(loaded.params)
    tokens = own_tokenizer.encode("The capital of France is")
    for _ in range(4):
        given = jnp.array([tokens]), jnp.ones((1, len(tokens)), bool)
        streams = decoder.embed(params, loaded.config, *given, dtype=jnp.float32)
        for stack in params["stacks"]:
            streams, _ = decoder.run_stack(stack, loaded.config, streams)
        last = decoder.final(params, loaded.config, streams.prompt[0, -1])
        tokens.append(int(jnp.argmax(decoder.unembedding(params) @ last)))
    assert own_tokenizer.decode(tokens).startswith("The capital of France is Paris.")
