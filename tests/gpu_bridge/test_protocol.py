"""The messages between learner and servers: what is written can be read, and what is wrong is named."""

import dataclasses
import json
from typing import Any

import pytest

from gpu_bridge import protocol
from gpu_bridge.protocol import (
    Failure,
    GenerateAnswer,
    GenerateRequest,
    Health,
    ProtocolError,
    Response,
    ScoreAnswer,
    ScoreRequest,
    WeightsAnswer,
    WeightsRequest,
)

GENERATE = GenerateRequest([[1, 2], [3]], 2, 3, 0.7, 5, 0.9, [7, 2**62], [0])
ANSWER = GenerateAnswer(
    "step-1", [[Response([4, 0], [-0.5, -1.0]), Response([4, 4, 4], [-0.5, -1, -2.0])], [Response([0], [-3.0])] * 2]
)


@pytest.mark.parametrize(
    "message",
    [
        GENERATE,
        ANSWER,
        WeightsRequest("run-a.1", path="/dev/shm/w"),
        WeightsRequest("run-a.1", url="http://host:1/w", bearer="secret", base="run-a.0"),
        WeightsAnswer("run-a.1"),
        ScoreRequest([[1], [2, 3]]),
        ScoreAnswer("initial", [0.1, -7]),
        Health("ready", "policy", "llama", "initial", "ab"),
        Failure("no"),
    ],
    ids=lambda message: type(message).__name__,
)
def test_what_is_written_is_read_again(message):
    assert protocol.parse(type(message), protocol.to_json(message)) == message


def changed(**changes: Any) -> bytes:
    """A request for responses with other fields."""
    return json.dumps({**dataclasses.asdict(GENERATE), **changes}).encode()


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"prompts": []}, "prompts: expected 1 to"),
        ({"prompts": [[1], []]}, "prompts: expected 1 to .* ids in each, found 0"),
        ({"prompts": [[1], [2.0]]}, "prompts: expected an integer from 0 to 2147483647, found 2.0"),
        ({"prompts": [[1], [True]]}, "found True"),
        ({"prompts": [[1], [-1]]}, "found -1"),
        ({"prompts": "ab"}, "prompts: expected a list, found 'ab'"),
        ({"prompts": [[1], 2]}, "prompts: expected a list, found 2"),
        ({"seeds": [1]}, "seeds: expected one per prompt, 2, found 1"),
        ({"seeds": [1, 2**63]}, "seeds: expected an integer"),
        ({"num_samples": 0}, "num_samples: expected an integer from 1 to 1024, found 0"),
        ({"max_new_tokens": None}, "max_new_tokens: expected an integer"),
        ({"temperature": -0.1}, "temperature: expected a number from 0.01"),
        ({"temperature": 0.001}, "temperature: expected a number from 0.01"),
        ({"temperature": False}, "temperature: expected a number"),
        ({"temperature": "1"}, "temperature: expected a number"),
        ({"top_p": 0}, "top_p: expected a number above 0"),
        ({"top_k": 1.5}, "top_k: expected an integer"),
        ({"num_samples": 1024, "max_new_tokens": 2**20}, "a product of at most"),
        ({"stop": "x"}, "stop: no such field"),
    ],
)
def test_a_wrong_field_is_named(changes, error):
    with pytest.raises(ProtocolError, match=error):
        protocol.parse(GenerateRequest, changed(**changes))


@pytest.mark.parametrize(
    ("body", "error"),
    [
        (b"", "expected JSON"),
        (b"{", "expected JSON"),
        (b"\xff", "expected JSON"),
        (b"[" * 100_000, "expected JSON"),
        (b"[1]", "expected a JSON object"),
        (b'{"version": "v", "scores": [NaN]}', "scores: expected finite numbers, found nan"),
        (b'{"version": "v", "scores": [1e999]}', "scores: expected finite numbers, found inf"),
        (b'{"scores": [1]}', "version: the field is missing"),
        (b'{"version": "a b", "scores": [1]}', "version: expected 1 to 128"),
        (b'{"version": "v", "scores": [null]}', "scores: expected finite numbers, found None"),
    ],
)
def test_garbage_is_refused(body, error):
    with pytest.raises(ProtocolError, match=error):
        protocol.parse(ScoreAnswer, body)


@pytest.mark.parametrize(
    ("fields", "error"),
    [
        ({"version": "v"}, "path, url: expected one of them"),
        ({"version": "v", "path": "/dev/shm/w", "url": "http://h/w"}, "path, url: expected one of them"),
        ({"version": "v", "path": "w"}, "path: expected an absolute path"),
        ({"version": "v", "url": "file:///etc/passwd"}, "url: expected one that begins with http"),
        ({"version": "v", "url": "http://h/w\r\nX: y"}, "url: expected"),
        ({"version": "v", "path": "/dev/shm/w", "bearer": "b"}, "bearer: expected"),
        ({"version": "initial", "path": "/dev/shm/w"}, "version: expected another name"),
        ({"version": "v" * 129, "path": "/dev/shm/w"}, "version: expected 1 to 128"),
        ({"version": "v", "path": "/dev/shm/w", "base": 3}, "base: expected 1 to 128"),
    ],
)
def test_weights_come_from_one_place(fields, error):
    with pytest.raises(ProtocolError, match=error):
        protocol.parse(WeightsRequest, json.dumps(fields).encode())


def test_responses_are_those_to_the_question():
    ANSWER.check(GENERATE)
    row = ANSWER.responses[0]
    for responses, error in [
        ([row], "expected those to 2 prompts, found 1"),
        ([row, row[:1]], "expected 2 to each prompt, found 1"),
        ([row, [row[0], Response([4, 4], [-1.0, -1.0])]], "expected 3, or fewer and an end, found 2 ending with 4"),
        ([row, [row[0], Response([4, 4, 4, 0], [-1.0] * 4)]], "found 4 ending with 0"),
    ]:
        with pytest.raises(ProtocolError, match=error):
            GenerateAnswer("v", responses).check(GENERATE)
    with pytest.raises(ProtocolError, match="as many of both"):
        Response([1, 2], [-1.0])
    with pytest.raises(ProtocolError, match="scores: expected 2, found 1"):
        ScoreAnswer("v", [1.0]).check(ScoreRequest([[1], [2]]))
