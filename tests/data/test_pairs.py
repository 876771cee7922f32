from typing import Any

import pytest

from sea_jax.data.conversations import messages_of
from sea_jax.data.pairs import parse_pair
from sea_jax.data.records import Columns, records

USER = {"role": "user", "content": "Sky?"}


def answer(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


@pytest.mark.parametrize(
    ("prompt", "chosen", "rejected"),
    [
        ("Sky?", "Blue.", "Green."),
        ("Sky?", [answer("Blue.")], [answer("Green.")]),
        ([USER], [answer("Blue.")], [answer("Green.")]),
        (None, [USER, answer("Blue.")], [USER, answer("Green.")]),
        ("Sky?", [USER, answer("Blue.")], [USER, answer("Green.")]),
    ],
)
def test_the_forms_in_which_pairs_come(prompt: Any, chosen: Any, rejected: Any) -> None:
    pair = parse_pair(prompt, chosen, rejected)
    assert pair == ("Sky?", "Blue.", "Green.")
    assert messages_of(pair.prompt) == (USER,)


@pytest.mark.parametrize(
    ("chosen", "rejected", "prompt"),
    [
        ("The sky is blue.", "The sky is green.", "The sky is"),
        ("The sky is greyish.", "The sky is green.", "The sky is"),
        ("Human: Hi\n\nAssistant:Ho", "Human: Hi\n\nAssistant:Ha", "Human: Hi\n\nAssistant:"),
        ("a b c", "a b", None),
        ("same", "same", None),
        ("one", "other", None),
        ("", "", None),
    ],
)
def test_a_prompt_that_is_not_named_is_the_words_that_both_begin_with(
    chosen: str, rejected: str, prompt: str | None
) -> None:
    if prompt is None:
        with pytest.raises(ValueError, match="both must begin with it and then differ"):
            parse_pair(None, chosen, rejected)
        return
    assert parse_pair(None, chosen, rejected) == (prompt, chosen[len(prompt) :], rejected[len(prompt) :])


def test_pairs_become_prompts_with_the_chosen_answer_as_reference() -> None:
    row = {"chosen": [USER, answer("Blue.")], "rejected": [USER, answer("Green.")], "score": 3}
    columns = Columns("", "chosen", "rejected")
    (record,) = records("f", [("f, row 1", row)], columns)
    assert (record["prompt"], record["reference"]) == ("Sky?", "Blue.")
    other = row | {"rejected": [{"role": "user", "content": "Sea?"}, answer("Green.")]}
    with pytest.raises(
        ValueError, match=r"^f, row 1: the fields 'chosen' and 'rejected' .*: the two conversations differ"
    ):
        records("f", [("f, row 1", other)], columns)
    with pytest.raises(ValueError, match=r"no field 'rejected' \(data\.rejected_field\)"):
        records("f", [("f, row 1", {"chosen": ""})], columns)
