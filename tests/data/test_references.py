"""What a model is taught to write behind a prompt: the ids of the joined text, and the end that its template writes."""

import copy
import dataclasses
from pathlib import Path
from typing import Any

import pytest

from sea_jax.data.prompts import DataSettings, Record, Rendered, render
from sea_jax.data.references import reference_ids
from sea_jax.models.tokenizer import Tokenizer
from tests.support import llama_tokenizer


def ids(tokenizer: Tokenizer, prompt: str, reference: str, **fields: Any) -> list[int]:
    settings = dataclasses.replace(DataSettings(), **fields)
    tokens = render(prompt, tokenizer, settings)
    record = Record(id="1", prompt=prompt, reference=reference)
    return reference_ids(Rendered(record, tokens), tokenizer, settings)


def pieces(tokenizer: Tokenizer, *arguments: str, **fields: Any) -> list[str]:
    return [str(piece) for piece in tokenizer.backend.convert_ids_to_tokens(ids(tokenizer, *arguments, **fields))]


@pytest.mark.parametrize(
    ("ending", "space"), [(" summary:", True), ("\n", False), (" ", False), ("<|im_end|>", False), ("hi", True)]
)
def test_a_space_stands_between_words_and_nowhere_else(byte_tokenizer: Tokenizer, ending: str, space: bool) -> None:
    found = ids(byte_tokenizer, "What", " The end. ", template=f"{{prompt}}{ending}")
    assert found[-1] == byte_tokenizer.eos_id
    assert byte_tokenizer.decode(found) == " " * space + "The end."


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("{prompt}:", ["▁A", "▁bc"]),  # and not "▁", "▁A"
        ("{prompt}:\n", ["A", "▁bc"]),  # and not "▁A"
        ("{prompt}: ", ["A", "▁bc"]),  # behind "▁", which the joined text does not have by itself
        ("{prompt}</s>", ["▁A", "▁bc"]),  # as this tokenizer begins every text, also behind a special token
    ],
)
def test_the_space_that_a_tokenizer_puts_before_every_text_is_not_learnt(
    tmp_path: Path, template: str, expected: list[str]
) -> None:
    tokenizer = llama_tokenizer.load(tmp_path)
    assert pieces(tokenizer, "Q", "A bc", template=template) == [*expected, "</s>"]
    prompt = render("Q", tokenizer, DataSettings(template=template))
    space = " " if template.endswith(":") else ""
    joined = tokenizer.encode(f"{template.replace('{prompt}', 'Q')}{space}A bc</s>")
    assert tokenizer.decode([*prompt, *ids(tokenizer, "Q", "A bc", template=template)]) == tokenizer.decode(joined)


def test_a_chat_is_joined_and_ended_as_its_template_does(tmp_path: Path, byte_tokenizer: Tokenizer) -> None:
    tokenizer = llama_tokenizer.load(tmp_path)
    assert pieces(tokenizer, "Q", "A bc", chat=True) == ["▁A", "▁bc", "▁", "</s>"]
    backend = copy.deepcopy(byte_tokenizer.backend)
    backend.eos_token = "<|endoftext|>"  # as a base model has it, whose template ends a turn with another token
    base = dataclasses.replace(byte_tokenizer, backend=backend, eos_id=0, end_ids=(0,))
    assert pieces(base, "Q", "hi", chat=True) == ["hi", "<|im_end|>"]
    assert pieces(base, "Q", "hi", template="{prompt}\n") == ["hi", "<|endoftext|>"]


def test_what_the_template_writes_before_every_answer_is_learnt(byte_tokenizer: Tokenizer) -> None:
    backend = copy.deepcopy(byte_tokenizer.backend)
    backend.chat_template = (
        "{% for m in messages %}{% if m['role'] == 'user' %}{{ m['content'] }}\n{% else %}12{{ m['content'] }}"
        "<|im_end|>\n{% endif %}{% endfor %}"
    )
    thinking = dataclasses.replace(byte_tokenizer, backend=backend)
    assert pieces(thinking, "Q", "hi", chat=True) == ["1", "2", "hi", "<|im_end|>"]


def test_special_tokens_in_a_reference_stay_text_unless_a_setting_says_otherwise(byte_tokenizer: Tokenizer) -> None:
    for chat in (True, False):
        found = ids(byte_tokenizer, "a<|im_end|>", "b<|im_end|>c", chat=chat)
        assert found.count(byte_tokenizer.eos_id) == 1
        assert byte_tokenizer.decode(found).strip() == "b<|im_end|>c"
        spelt = ids(byte_tokenizer, "a<|im_end|>", "b<|im_end|>c", chat=chat, special_tokens="tokens")
        assert spelt.count(byte_tokenizer.eos_id) == 2
