import copy
import json
import pickle

import pytest

from sea_jax.data.conversations import Conversation, messages_of, parse_answer, parse_prompt, without_beginning

TURNS = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"}]


def test_one_message_is_its_text_and_several_name_their_roles() -> None:
    assert Conversation(TURNS[1:]) == "Hi"
    whole = Conversation(TURNS)
    assert whole == "system: Be kind.\n\nuser: Hi"
    assert json.loads(json.dumps(whole)) == whole
    for copied in (copy.deepcopy(whole), pickle.loads(pickle.dumps(whole))):
        assert (copied, copied.messages) == (whole, tuple(TURNS))
    assert messages_of(whole) == tuple(TURNS)
    assert messages_of("Hi") == tuple(TURNS[1:])


def test_the_beginning_of_what_is_said_is_cut_and_the_turns_stay() -> None:
    assert without_beginning("abc", 2) == "c"
    for count, contents in ((0, ["Be kind.", "Hi"]), (3, ["kind.", "Hi"]), (9, ["", "i"]), (99, ["", ""])):
        cut = without_beginning(Conversation(TURNS), count)
        assert [message["content"] for message in messages_of(cut)] == contents
        assert [message["role"] for message in messages_of(cut)] == ["system", "user"]


def test_prompts_and_answers_of_files() -> None:
    nulls = [{"role": "user", "content": "Hi", "name": None}]  # as Parquet fills columns
    assert messages_of(parse_prompt(nulls)) == tuple(TURNS[1:])
    assert parse_prompt(" Hi ") == " Hi "
    answer = {"role": "assistant", "content": "Ho"}
    assert [parse_answer(value) for value in (None, "Ho", [answer])] == ["", "Ho", "Ho"]
    for value, reason in (
        (None, "is None"),
        (" ", "is ' '"),
        ([], "no messages"),
        (["Hi"], "holds 'Hi' as message 1"),
        ([{"role": "user", "content": ["Hi"]}], "as message 1"),
        ([{"role": "user"}], "as message 1"),
        ([*TURNS, answer], "ends with a message of the assistant"),
        ([{"role": "user", "content": " "}], "says nothing"),
    ):
        with pytest.raises(ValueError, match=reason):
            parse_prompt(value)
    for other, reason in ((5, "is 5"), (TURNS, "messages of system, user; one of the assistant")):
        with pytest.raises(ValueError, match=reason):
            parse_answer(other)
