import json
import shutil
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from sea_jax.models import tokenizer
from sea_jax.models.tokenizer import Tokenizer


@pytest.fixture
def beginning(gguf_directory: Path, tmp_path: Path) -> Tokenizer:
    """A tokenizer that puts its BOS before every text and names no padding token."""
    rules = json.loads((gguf_directory / "tokenizer.json").read_text())
    bos = {"SpecialToken": {"id": "<|im_start|>", "type_id": 0}}
    rules["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [bos, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [bos, {"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<|im_start|>": {"id": "<|im_start|>", "ids": [1], "tokens": ["<|im_start|>"]}},
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(rules))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|im_start|>",
        "eos_token": "<|endoftext|>",
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    return tokenizer.load(tmp_path)


def test_a_bos_is_added_where_the_model_wants_one_and_never_twice(
    byte_tokenizer: Tokenizer, beginning: Tokenizer
) -> None:
    assert beginning.encode("hi") == [1, *byte_tokenizer.encode("hi")]
    assert beginning.encode("<|im_start|>hi") == [1, *byte_tokenizer.encode("hi")]
    assert beginning.encode("hi", add_special=False) == byte_tokenizer.encode("hi")


def test_padding_falls_back_to_the_eos(beginning: Tokenizer) -> None:
    assert (beginning.eos_id, beginning.pad_id) == (0, 0)


def test_nothing_is_cut_unless_asked_for(byte_tokenizer: Tokenizer, beginning: Tokenizer) -> None:
    assert len(byte_tokenizer.encode("x" * 5000)) == 5000
    assert beginning.encode("xyz" * 100, max_length=3) == [1, *byte_tokenizer.encode("xy")]
    assert len(beginning.encode("xyz" * 100)) == 301


def test_special_tokens_are_decoded_only_if_asked_for(byte_tokenizer: Tokenizer) -> None:
    ids = byte_tokenizer.encode("hi , it 's<|im_end|>")
    assert byte_tokenizer.decode(ids) == "hi , it 's"
    assert byte_tokenizer.decode(ids, skip_special=False) == "hi , it 's<|im_end|>"


def test_a_chat_ends_where_the_assistant_begins(byte_tokenizer: Tokenizer) -> None:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hi"}]
    assert byte_tokenizer.chat(messages) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    )


def test_a_chat_may_end_with_the_answer(byte_tokenizer: Tokenizer) -> None:
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "12"}]
    assert byte_tokenizer.chat(messages, generation_prompt=False) == (
        "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n12<|im_end|>\n"
    )


def test_a_chat_without_a_template_is_refused(beginning: Tokenizer) -> None:
    with pytest.raises(ValueError, match="no chat template"):
        beginning.chat([{"role": "user", "content": "hi"}])


def test_it_agrees_with_transformers(gguf_directory: Path, byte_tokenizer: Tokenizer) -> None:
    backend = PreTrainedTokenizerFast.from_pretrained(gguf_directory)
    text = "hi hi\n\t1234 <|im_start|>été"
    assert byte_tokenizer.encode(text) == backend(text)["input_ids"]
    messages = [{"role": "user", "content": "hi"}]
    expected = backend.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    assert byte_tokenizer.encode(byte_tokenizer.chat(messages), add_special=False) == expected


def test_ids_beyond_the_model_are_refused(byte_tokenizer: Tokenizer) -> None:
    tokenizer.check(byte_tokenizer, 262)
    with pytest.raises(ValueError, match=r"up to 261.*has 261"):
        tokenizer.check(byte_tokenizer, 261)


def test_a_missing_directory_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere"):
        tokenizer.load(tmp_path / "nowhere")


def test_a_directory_without_a_readable_tokenizer_is_named(gguf_directory: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=tmp_path.name):
        tokenizer.load(tmp_path)
    shutil.copy(gguf_directory / "tokenizer_config.json", tmp_path)
    (tmp_path / "tokenizer.json").write_text((gguf_directory / "tokenizer.json").read_text()[:500])
    with pytest.raises(ValueError, match=tmp_path.name):
        tokenizer.load(tmp_path)


def test_a_tokenizer_without_an_end_is_refused(gguf_directory: Path, tmp_path: Path) -> None:
    shutil.copy(gguf_directory / "tokenizer.json", tmp_path)
    with pytest.raises(ValueError, match="names no EOS"):
        tokenizer.load(tmp_path)
