"""Every fault of a server, and what the learner makes of it; times are short, the waits are counted rather than timed."""

import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from gpu_bridge import client, protocol, weights
from gpu_bridge.client import OracleClient, Patience, PolicyClient, Refused, Unavailable
from gpu_bridge.weights import Route
from sea_jax.types import OtherVersion
from tests.support import fake
from tests.support.fake import TOKEN, Fake

PATIENCE = Patience(timeout_s=5.0, retries=3, backoff_s=0.1)
SHORT = Patience(timeout_s=0.3, retries=1, backoff_s=0.01)
HOW: dict[str, Any] = {"num_samples": 2, "max_new_tokens": 5, "eos_ids": (fake.EOS,), "vocab_size": fake.VOCAB_SIZE}
HOW |= {"absent_ids": (), "temperature": 0.7, "top_k": 0, "top_p": 1.0}
PROMPTS = [[1, 2], [4], [5, 6, 7], [8, 9], [10]]
SEEDS = [11, 12, 13, 14, 15]
INPUTS = [[i, 2 * i + 1] for i in range(10)]


@pytest.fixture
def start() -> Iterator[Callable[..., Fake]]:
    """Starts servers and ends them after the test."""
    started: list[Fake] = []

    def one(*arguments: str) -> Fake:
        started.append(Fake(*arguments))
        return started[-1]

    yield one
    for server in started:
        server.close()


def policy(*servers: Fake, patience: Patience = PATIENCE) -> PolicyClient:
    return PolicyClient([server.url for server in servers], TOKEN, patience)


def oracle(*servers: Fake, patience: Patience = PATIENCE, batch_size: int = 2) -> OracleClient:
    return OracleClient([server.url for server in servers], TOKEN, patience, batch_size)


def written(servers: PolicyClient, version: str = protocol.INITIAL) -> list[list[tuple[list[int], list[float]]]]:
    rows = servers.generate(PROMPTS, SEEDS, version, **HOW)
    return [[(one.tokens, one.logprobs) for one in row] for row in rows]


def wanted() -> list[list[tuple[list[int], list[float]]]]:
    """What all servers would write."""
    rows = [fake.answer(prompt, seed, 2, 5) for prompt, seed in zip(PROMPTS, SEEDS, strict=True)]
    return [[(one["tokens"], one["logprobs"]) for one in row] for row in rows]


SCORES = [fake.score(ids) for ids in INPUTS]


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_servers_share_the_prompts_evenly_and_answers_come_in_order(start, count):
    servers = [start() for _ in range(count)]
    assert written(policy(*servers)) == wanted()
    shares = [len(message["prompts"]) for one in servers for message in one.sent(protocol.GENERATE)]
    assert sum(shares) == 5
    assert max(shares) - min(shares) <= 1
    assert len(shares) == min(count, 5)


def test_servers_work_at_the_same_time(start):
    servers = [start(protocol.ORACLE), start(protocol.ORACLE)]
    meeting = threading.Barrier(2, timeout=5)
    for one in servers:
        plain = one.reply
        one.reply = lambda path, message, plain=plain: (
            path == protocol.SCORE and meeting.wait(),
            plain(path, message),
        )[1]
    np.testing.assert_array_equal(oracle(*servers, batch_size=5).score(INPUTS), SCORES)


PASSING = {
    "reset": "reset",
    "error": "error",
    "late": "late",
    "half an answer": "half",
    "not JSON": "garbage <html>bad gateway</html>",
    "no object": "garbage [1, 2]",
    "nothing": "garbage {}",
}


def test_what_must_not_be_drawn_is_told_and_looked_for(start):
    alone = start()
    with pytest.raises(Unavailable, match=r"tokens: \d+ is no token, and asked was not to draw it"):
        policy(alone, patience=SHORT).generate(
            PROMPTS, SEEDS, protocol.INITIAL, **HOW | {"absent_ids": tuple(range(4, fake.VOCAB_SIZE))}
        )
    written(policy(alone))
    first, *_, last = alone.sent(protocol.GENERATE)
    assert first["absent_ids"] == list(range(4, fake.VOCAB_SIZE))
    assert "absent_ids" not in last  # so that servers which do not know of it go on


SPOILED = {
    "a token outside the vocabulary": "set responses.0.0.tokens.0 37",
    "a token that is no integer": "set responses.0.0.tokens.0 1.5",
    "more log-probs than tokens": "set responses.0.0.logprobs [-1.0]",
    "a NaN log-prob": "set responses.0.0.logprobs.0 NaN",
    "a log-prob above 0": "set responses.0.0.logprobs.0 0.5",
    "a sample too few": "set responses.0 []",
    "a prompt too few": "set responses []",
    "broken off without an end": 'set responses.0.0 {"tokens": [1], "logprobs": [-1.0]}',
    "on behind the end": 'set responses.0.0 {"tokens": [3, 1, 3], "logprobs": [-1.0, -1.0, -1.0]}',
    "no version": "set version null",
}


@pytest.mark.parametrize("fault", [*PASSING.values(), *SPOILED.values()], ids=[*PASSING, *SPOILED])
def test_a_fault_that_passes_changes_no_number(start, fault):
    alone = start()
    alone.faults[protocol.GENERATE] = [fault]
    assert written(policy(alone)) == wanted()
    assert len(alone.sent(protocol.GENERATE)) == (1 if fault == "late" else 2)


@pytest.mark.parametrize("fault", ["reset", "error", "half", "garbage <html>", *SPOILED.values()])
def test_a_fault_that_stays_is_one_clear_error(start, fault):
    alone = start()
    alone.faults[protocol.GENERATE] = [fault] * 9
    with pytest.raises(Unavailable) as error:
        written(policy(alone, patience=SHORT))
    text = str(error.value)
    assert f"no policy server of config.actor.urls has answered in 2 tries over 0 s: {alone.url}" in text
    assert "python -m gpu_bridge.serve_policy" in text
    assert "goes on from the last checkpoint" in text
    assert len(alone.sent(protocol.GENERATE)) == 2


def test_a_server_that_hangs_is_left_and_another_does_its_share(start):
    hanging, well = start(), start()
    hanging.faults[protocol.GENERATE] = ["hang"]
    assert written(policy(hanging, well, patience=SHORT)) == wanted()
    assert [len(message["prompts"]) for message in well.sent(protocol.GENERATE)] == [2, 3]
    hanging.faults[protocol.GENERATE] = ["hang"] * 9
    with pytest.raises(Unavailable, match=rf"{hanging.url} has not answered within 0\.3 s"):
        written(policy(hanging, patience=SHORT))


def test_an_answer_that_trickles_is_late_too(start):
    trickling = start()
    handler = trickling.server.RequestHandlerClass

    def trickle(self, status, body, length=None):
        self.send_response(status)
        self.send_header("Content-Length", "1000")
        self.end_headers()
        while not trickling.released.wait(0.05):
            self.wfile.write(b" ")

    handler.send = trickle
    with pytest.raises(Unavailable, match=r"has not answered within 0\.3 s"):
        policy(trickling, patience=SHORT).versions()


def test_a_server_that_is_down_leaves_its_share_to_the_others_and_all_down_are_waited_for(start):
    down, well = start(), start()
    down.stop()
    assert written(policy(down, well)) == wanted()
    well.stop()
    threading.Timer(0.15, well.start).start()
    assert written(policy(down, well)) == wanted()
    well.stop()
    with pytest.raises(Unavailable, match=rf"{down.url}: Connection refused; {well.url}: Connection refused"):
        written(policy(down, well, patience=SHORT))
    down.start()
    well.start()


def test_the_waits_double_up_to_a_limit(monkeypatch):
    slept: list[float] = []
    monkeypatch.setattr(client.time, "sleep", slept.append)
    servers = PolicyClient(["http://127.0.0.1:1"], TOKEN, Patience(retries=8))
    with pytest.raises(Unavailable, match="in 9 tries"):
        servers.versions()
    assert slept == [1, 2, 4, 8, 16, 32, 60, 60]


def test_a_wrong_token_is_not_tried_again(start):
    alone = start()
    alone.token = "another"
    for ask in (policy(alone).versions, lambda: written(policy(alone))):
        alone.asked.clear()
        with pytest.raises(
            Refused, match=r"config\.actor\.urls: .* SEA_JAX_BRIDGE_TOKEN.*config\.bridge_token_file"
        ) as error:
            ask()
        assert len(alone.asked) == 1
        assert TOKEN not in str(error.value)
        assert alone.url in str(error.value)


def test_a_server_that_starts_is_waited_for_longer_than_one_that_is_down(start):
    alone = start()
    alone.status = protocol.STARTING

    def ready() -> None:
        alone.status = protocol.READY

    threading.Timer(0.4, ready).start()
    patient = Patience(timeout_s=5.0, retries=0, backoff_s=0.05, max_backoff_s=0.05)
    assert policy(alone, patience=patient).versions() == {alone.url: "initial"}
    alone.status = protocol.FAILED
    with pytest.raises(Unavailable, match=f"{alone.url} is failed"):
        policy(alone, patience=patient).versions()


def test_a_server_of_another_kind_or_a_request_it_refuses_is_not_tried_again(start):
    alone = start(protocol.ORACLE)
    with pytest.raises(Refused, match=rf"config\.actor\.urls: {alone.url} is a server of kind oracle; .*serve_policy"):
        policy(alone).versions()
    plain = alone.reply
    alone.reply = lambda path, message: (
        (400, {"error": "inputs: 9 tokens are more than the model's 8"})
        if path == protocol.SCORE
        else plain(path, message)
    )
    with pytest.raises(Refused, match=rf"{alone.url} refuses what it was asked \(inputs: 9 tokens"):
        oracle(alone).score(INPUTS)
    assert len(alone.sent(protocol.SCORE)) == 1
    alone.reply = lambda path, message: (404, {"detail": "no such page"})
    with pytest.raises(Refused, match=rf"config\.oracle\.urls: {alone.url} is no server of the bridge"):
        oracle(alone).score(INPUTS)
    writer = start()
    with pytest.raises(Refused, match=rf"oracle\.urls: {writer.url} is a server of kind policy; .*serve_oracle"):
        oracle(writer).score(INPUTS)


def test_a_server_with_other_weights_writes_nothing_and_the_others_do_its_share(start):
    old, new = start(protocol.POLICY, "run.1"), start(protocol.POLICY, "run.2")
    assert written(policy(old, new), "run.2") == wanted()
    assert not old.sent(protocol.GENERATE)
    with pytest.raises(OtherVersion, match=rf"{old.url} has version run\.1, asked for is run\.2"):
        written(policy(old), "run.2")


def test_weights_that_change_while_a_server_writes(start):
    alone = start(protocol.POLICY, "run.2")
    alone.faults[protocol.GENERATE] = ['set version "run.3"']
    with pytest.raises(OtherVersion, match=rf"{alone.url} wrote with version run\.3, asked for is run\.2"):
        written(policy(alone), "run.2")
    plain = alone.reply
    alone.reply = lambda path, message: (
        (409, {"error": "the weights changed", "version": "run.3"})
        if path == protocol.GENERATE
        else plain(path, message)
    )
    with pytest.raises(OtherVersion, match=rf"{alone.url} has version run\.3: the weights changed"):
        written(policy(alone), "run.2")


def test_a_push_reaches_the_servers_that_are_up(start):
    up, down = start(), start()
    down.stop()
    servers = policy(up, down)
    tensors = {"a": np.arange(3, dtype=np.float32)}
    servers.push(tensors, "run.1", [up.url, down.url])
    assert servers.versions() == {up.url: "run.1"}
    np.testing.assert_array_equal(up.tensors["a"], tensors["a"])
    with pytest.raises(OtherVersion, match=rf"{down.url}: Connection refused"):
        servers.push(tensors, "run.2", [down.url])
    with pytest.raises(OtherVersion, match=rf"{up.url} has version run\.1: another base"):
        servers.push(tensors, "run.2", [up.url], base="run.0")
    down.start()


def test_a_push_to_another_host(start, tmp_path):
    one, two = start(), start()
    route = Route(weights.HTTP, tmp_path)
    servers = PolicyClient([one.url, two.url], TOKEN, PATIENCE, route)
    servers.push({"a": np.arange(3, dtype=np.float32)}, "run.1", [one.url, two.url])
    assert set(servers.versions().values()) == {"run.1"}
    for server in (one, two):
        np.testing.assert_array_equal(server.tensors["a"], np.arange(3))
        assert not {"path", "base"} & server.sent(protocol.WEIGHTS)[0].keys()


@pytest.mark.parametrize("fault", ["reset", "error", "garbage {", "set scores.1 NaN", "set scores [1.0]", "half"])
def test_what_an_oracle_has_answered_before_it_fails_is_not_asked_again(start, fault):
    alone = start(protocol.ORACLE)
    alone.faults[protocol.SCORE] = ["", "", fault]
    np.testing.assert_array_equal(oracle(alone).score(INPUTS), SCORES)
    asked = [ids for message in alone.sent(protocol.SCORE) for ids in message["inputs"]]
    assert asked == [*INPUTS[:6], *INPUTS[4:]]


def test_the_half_that_one_of_two_oracles_fails_to_do_goes_to_the_other(start):
    failing, well = start(protocol.ORACLE), start(protocol.ORACLE)
    failing.faults[protocol.SCORE] = ["", *["error"] * 9]
    np.testing.assert_array_equal(oracle(failing, well).score(INPUTS), SCORES)
    asked = [ids for message in well.sent(protocol.SCORE) for ids in message["inputs"]]
    assert sorted(asked) == sorted(INPUTS[2:])
    with pytest.raises(Unavailable, match=r"config\.oracle\.urls .*out of memory.*serve_oracle"):
        oracle(failing, patience=SHORT).score(INPUTS)


def test_an_oracle_that_starts_is_waited_for_and_one_that_is_well_is_asked_for_scores_alone(start):
    alone = start(protocol.ORACLE)
    plain = alone.reply
    alone.reply = lambda path, message: (
        (503, {"error": "the engine is starting"})
        if path == protocol.SCORE and alone.status == protocol.STARTING
        else plain(path, message)
    )

    def starts_for_a_while() -> None:
        alone.status = protocol.STARTING
        threading.Timer(0.4, setattr, (alone, "status", protocol.READY)).start()

    patient = Patience(timeout_s=5.0, retries=1, backoff_s=0.05, max_backoff_s=0.05)
    scores = oracle(alone, patience=patient).score
    starts_for_a_while()
    np.testing.assert_array_equal(scores(INPUTS), SCORES)
    asked = len(alone.sent(protocol.HEALTH))
    np.testing.assert_array_equal(scores(INPUTS), SCORES)
    assert len(alone.sent(protocol.HEALTH)) == asked
    starts_for_a_while()  # again, as after its engine's end
    np.testing.assert_array_equal(scores(INPUTS), SCORES)


def test_ctrl_c_does_not_wait_for_a_server_that_hangs(start):
    alone = start(protocol.ORACLE)
    alone.faults[protocol.SCORE] = ["hang"]
    main, before = threading.get_ident(), set(threading.enumerate())
    former = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        threading.Timer(0.3, lambda: signal.pthread_kill(main, signal.SIGINT)).start()
        begin = time.monotonic()
        with pytest.raises(KeyboardInterrupt):
            oracle(alone).score(INPUTS)
    finally:
        signal.signal(signal.SIGINT, former)
    assert time.monotonic() - begin < PATIENCE.timeout_s / 2
    assert all(thread.daemon for thread in set(threading.enumerate()) - before)  # nor does the interpreter's end


def test_nothing_to_ask_is_not_asked():
    assert OracleClient(["http://127.0.0.1:1"], TOKEN, SHORT).score([]).shape == (0,)


def test_the_token(monkeypatch, tmp_path):
    monkeypatch.delenv(protocol.TOKEN_VARIABLE, raising=False)
    with pytest.raises(ValueError, match=r"SEA_JAX_BRIDGE_TOKEN holds no token"):
        client.read_token()
    monkeypatch.setenv(protocol.TOKEN_VARIABLE, "from-the-environment\n")
    assert client.read_token() == "from-the-environment"
    file = tmp_path / "token"
    with pytest.raises(ValueError, match=rf"^config\.bridge_token_file={file}: No such file"):
        client.read_token(str(file))
    file.write_text("from-a-file\n")
    assert client.read_token(str(file)) == "from-a-file"
    file.write_text("two\nlines")
    with pytest.raises(ValueError, match="holds no token"):
        client.read_token(str(file))
