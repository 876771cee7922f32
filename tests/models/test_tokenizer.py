import copy
import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from sea_jax.data.prompts import DataSettings, render
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
    assert tokenizer.fitted(byte_tokenizer, 262) is byte_tokenizer
    with pytest.raises(ValueError, match=r"up to 261.*has 261"):
        tokenizer.fitted(byte_tokenizer, 261)


def test_padding_behind_the_last_embedding_is_the_eos_instead(
    byte_tokenizer: Tokenizer, caplog: pytest.LogCaptureFixture
) -> None:
    backend = copy.deepcopy(byte_tokenizer.backend)
    backend.add_special_tokens({"pad_token": "<pad>"})
    padding = dataclasses.replace(byte_tokenizer, backend=backend, pad_id=262, vocab_size=263)
    assert tokenizer.fitted(padding, 263) is padding
    fitted = tokenizer.fitted(padding, 262)
    assert (fitted.pad_id, fitted.eos_id, fitted.vocab_size) == (2, 2, 262)
    assert "pads with the id 262, of which the model has no embedding (262 rows): the EOS 2 pads" in caplog.text
    with pytest.raises(ValueError, match=r"up to 262.*has 261"):
        tokenizer.fitted(padding, 261)


def test_rows_that_are_no_token(byte_tokenizer: Tokenizer) -> None:
    assert byte_tokenizer.absent_ids(262) == ()
    assert byte_tokenizer.absent_ids(264) == (262, 263)


@pytest.mark.parametrize(
    ("generation", "config", "expected"),
    [
        (None, None, (2,)),
        ([2, 0], None, (2, 0)),
        (0, [2, 1], (2, 0, 1)),
        ([0, 99_999], None, (2, 0)),  # of another vocabulary
        (None, 1, (2, 1)),
    ],
)
def test_all_that_the_files_list_end_a_response(
    gguf_directory: Path, tmp_path: Path, generation: object, config: object, expected: tuple[int, ...]
) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(gguf_directory / name, tmp_path)
    for name, listed in (("generation_config.json", generation), ("config.json", config)):
        if listed is not None:
            (tmp_path / name).write_text(json.dumps({"eos_token_id": listed}))
    loaded = tokenizer.load(tmp_path)
    assert (loaded.eos_id, loaded.end_ids) == (2, expected)
    tokenizer.list_end(tmp_path, loaded, 5)
    assert tokenizer.load(tmp_path).end_ids == (*expected, 5)


def test_a_list_of_ends_that_is_none_is_named(gguf_directory: Path, tmp_path: Path) -> None:
    shutil.copy(gguf_directory / "tokenizer.json", tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": "</s>"}))
    with pytest.raises(ValueError, match=r"generation_config\.json field 'eos_token_id' is '</s>'; it must be"):
        tokenizer.load(tmp_path)


def test_quoted_special_tokens_stay_text_where_others_become_tokens(byte_tokenizer: Tokenizer) -> None:
    assert byte_tokenizer.quoted("a<|im_end") == "a<|im_end"
    quoted = byte_tokenizer.quoted("a<|im_end|>b")
    text = f"<|im_start|>hi {quoted}<|im_end|>\n"
    ids = byte_tokenizer.encode(text)
    assert (ids[0], ids[-2], ids.count(2)) == (1, 2, 1)
    assert byte_tokenizer.decode(ids, skip_special=False) == "<|im_start|>hi a<|im_end|>b<|im_end|>\n"
    plain = byte_tokenizer.encode("<|im_start|>hi axb<|im_end|>\n")
    assert byte_tokenizer.backend.convert_ids_to_tokens(ids)[:3] == ["<|im_start|>", "hi", "Ġ"]
    assert (ids[:4], ids[-3:]) == (plain[:4], plain[-3:])
    ending = around(byte_tokenizer)
    inner = byte_tokenizer.encode(quoted)
    assert ending.encode(quoted) == [1, *inner, 2]
    assert ending.encode(quoted, goes_on=True) == [1, *inner]
    assert ending.encode(quoted, add_special=False) == inner
    assert ending.encode(quoted, max_length=5) == [1, *inner[:3], 2]
    assert ending.encode(f"<|im_start|>{quoted}") == [1, *inner]


def around(tokenizer: Tokenizer) -> Tokenizer:
    """A tokenizer that begins and ends every text."""
    backend = copy.deepcopy(tokenizer.backend)
    backend.backend_tokenizer.post_processor = TemplateProcessing(
        "<|im_start|> $A <|im_end|>", None, [("<|im_start|>", 1), ("<|im_end|>", 2)]
    )
    return dataclasses.replace(tokenizer, backend=backend)


def test_arguments_reach_the_chat_template(byte_tokenizer: Tokenizer) -> None:
    backend = copy.deepcopy(byte_tokenizer.backend)
    backend.chat_template = "{{ messages[0]['content'] }}{% if enable_thinking == false %}!{% endif %}"
    thinking = dataclasses.replace(byte_tokenizer, backend=backend)
    turns = [{"role": "user", "content": "hi"}]
    assert thinking.chat(turns) == "hi"
    assert dataclasses.replace(thinking, chat_arguments={"enable_thinking": False}).chat(turns) == "hi!"


def test_what_is_to_be_continued_does_not_end(byte_tokenizer: Tokenizer) -> None:
    ending = around(byte_tokenizer)
    plain = byte_tokenizer.encode("hi<|im_end|>")  # one of the text's own stays
    assert ending.encode("hi<|im_end|>") == [1, *plain, 2]
    assert ending.encode("hi<|im_end|>", goes_on=True) == [1, *plain]
    assert render("hi", ending, DataSettings(template="{prompt}:")) == [1, *byte_tokenizer.encode("hi:")]


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


def write_pieces(directory: Path, name: str, model_type: str, kind: str, **options: Any) -> None:
    """Trains SentencePiece on a few words, and puts its file into a model's directory."""
    text = ["The quick brown fox jumps over the lazy dog.", "A tokenizer cuts words into pieces.", "hi there, hello"]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text * 9),
        model_prefix=str(directory / "pieces"),
        vocab_size=90,
        model_type=kind,
        hard_vocab_limit=False,
        minloglevel=2,
        **options,
    )
    (directory / "pieces.model").rename(directory / name)
    (directory / "config.json").write_text(json.dumps({"model_type": model_type}))


def test_the_file_of_sentencepiece_alone_will_do(tmp_path: Path) -> None:
    ours = {"pad_piece": "[PAD]", "bos_piece": "[CLS]", "eos_piece": "[SEP]", "unk_piece": "[UNK]"}
    ids = {"pad_id": 0, "bos_id": 1, "eos_id": 2, "unk_id": 3, "user_defined_symbols": ["[MASK]"]}
    write_pieces(tmp_path, "spm.model", "deberta-v2", "unigram", **ours, **ids)
    loaded = tokenizer.load(tmp_path)
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "spm.model"))
    for sentence in ("hi there, quick tokenizer", "The dog."):
        assert loaded.encode(sentence) == [1, *pieces.encode(sentence), 2]
        assert loaded.decode(loaded.encode(sentence)) == sentence


def test_a_file_of_sentencepiece_that_transformers_reads_in_another_way_is_refused(tmp_path: Path) -> None:
    write_pieces(tmp_path, "tokenizer.model", "llama", "bpe")
    with pytest.raises(
        ValueError, match=r"tokenizer\.model that cuts text into other pieces than sentencepiece: put the"
    ):
        tokenizer.load(tmp_path)


def test_without_sentencepiece_its_file_says_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tokenizer.model").write_bytes(b"pieces")
    monkeypatch.setattr(tokenizer.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"tokenizer\.model is read by sentencepiece.*: pip install sentencepiece$"):
        tokenizer.load(tmp_path)
