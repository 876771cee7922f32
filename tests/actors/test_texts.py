"""What an oracle reads of a response, and where a stop string ends it, whoever writes."""

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from sea_jax.actors import stop
from sea_jax.actors.generation import SamplingSettings
from sea_jax.actors.texts import finished_by, texts_of
from sea_jax.models.tokenizer import Tokenizer
from sea_jax.types import Candidates, Prompts

T = 24


def candidates(tokenizer: Tokenizer, *texts: str) -> Candidates:
    """One response to each of some prompts, padded."""
    rows = [tokenizer.encode(text, add_special=False)[:T] for text in texts]
    tokens = np.full((len(rows), 1, T), tokenizer.pad_id, np.int32)
    logprobs = np.zeros((len(rows), 1, T), np.float32)
    for row, ids in enumerate(rows):
        tokens[row, 0, : len(ids)], logprobs[row, 0, : len(ids)] = ids, -1.0
    lengths = np.array([[len(ids)] for ids in rows], np.int32)
    return Candidates(
        tokens=jnp.asarray(tokens),
        lengths=jnp.asarray(lengths),
        logprobs=jnp.asarray(logprobs),
        features=jnp.ones((len(rows), 1, 3)),
    )


def texts(tokenizer: Tokenizer, *responses: str, **settings: Any) -> list[str]:
    decode = texts_of(tokenizer, dataclasses.replace(SamplingSettings(), **settings))
    return [row[0] for row in decode(candidates(tokenizer, *responses))]


def test_a_response_ends_with_the_token_that_completes_a_stop_string(byte_tokenizer: Tokenizer) -> None:
    asked, strings = Prompts(np.zeros((4, 1), np.int32), np.ones((4, 1), bool)), ("\nQ:", "!")
    written = candidates(byte_tokenizer, "12 hi\nQ: more<|im_end|>", "oh!!\nQ:", "ends\nQ<|im_end|>", "!")

    def generate(*_: object) -> Candidates:
        return written

    found = stop.ending(generate, byte_tokenizer, strings)({}, asked, jnp.zeros(2, jnp.uint32), 0)
    ended = [
        byte_tokenizer.decode(row[0, : n[0]]) for row, n in zip(np.asarray(found.tokens), found.lengths, strict=True)
    ]
    assert ended == ["12 hi\nQ:", "oh!", "ends\nQ", "!"]
    for row, length in enumerate(np.asarray(found.lengths)[:, 0]):
        assert (np.asarray(found.tokens)[row, 0, length:] == byte_tokenizer.pad_id).all()
        np.testing.assert_array_equal(found.logprobs[row, 0], np.where(np.arange(T) < length, -1.0, 0.0))
    assert found.features.shape == (4, 1, 0)  # those of the whole response are another's
    assert stop.ending(generate, byte_tokenizer, ()) is generate
    decode = texts_of(byte_tokenizer, dataclasses.replace(SamplingSettings(), stop=strings))
    assert decode(found) == decode(written) == [["12 hi"], ["oh"], ["ends\nQ"], [""]]


@pytest.mark.parametrize("marks", [("<think>", "</think>"), ("<|endoftext|>", "<|im_start|>")])
def test_thoughts_are_not_shown(byte_tokenizer: Tokenizer, marks: tuple[str, str]) -> None:
    begin, end = marks  # in writing, or special tokens, which are not shown either
    responses = (f"{begin}hm{end} 12<|im_end|>", f"hm{end}\n12", f"{begin}hm", "12<|im_end|>", f"a {begin}hm")
    assert texts(byte_tokenizer, *responses, thoughts=marks) == ["12", "12", "", "12", "a"]
    assert texts(byte_tokenizer, "<|im_start|>hi 12<|im_end|>") == ["hi 12"]


def test_a_response_has_ended_if_its_last_token_or_a_stop_string_says_so(byte_tokenizer: Tokenizer) -> None:
    tokens = jnp.array([[[5, 2, 9], [5, 6, 2], [2, 9, 9], [5, 6, 7]]], jnp.int32)
    written = Candidates(tokens, jnp.array([[2, 3, 1, 3]]), jnp.zeros((1, 4, 3)), jnp.zeros((1, 4, 0)))
    assert finished_by((2, 3), byte_tokenizer, ())(written).tolist() == [[True, True, True, False]]
    said = candidates(byte_tokenizer, "hi!", "hi", "hi<|im_end|>")
    assert finished_by((2,), byte_tokenizer, ("!",))(said).tolist() == [[True], [False], [True]]
