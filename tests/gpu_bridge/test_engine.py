"""Real vLLM and mosec servers behind their gateways against the JAX policy and reward model; skipped without `make bridge`."""

import contextlib
import os
import secrets
import shutil
import signal
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from gpu_bridge import protocol
from gpu_bridge.protocol import GenerateAnswer, GenerateRequest, Health, ScoreAnswer, ScoreRequest, WeightsAnswer
from sea_jax import generation, tiny_random
from sea_jax.generation import SamplingConfig
from sea_jax.models import hf, reward
from sea_jax.types import Candidates, Prompts

ROOT = Path(__file__).parents[2]
PYTHON = Path(os.environ.get("BRIDGE_PYTHON", ROOT / ".venv-bridge/bin/python"))
START_SECONDS = 300
EOS = 0
POLICIES = ("tiny-random-llama", "tiny-random-gpt-neox")
HEADS_OF_32 = {"hidden_size": 128}  # with four heads; vLLM's attention on the CPU has no smaller ones
RNG = np.random.default_rng(0)
SHARED = RNG.integers(
    2, 258, 150
).tolist()  # tokens that several prompts begin with: more than a block of the prefix cache
PROMPTS = [[*SHARED, 5, 6], [*SHARED, 7], [3, 4, 5], [*SHARED[:40], 9]]

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not PYTHON.exists(), reason="`make bridge` has not been run")]


class Refused(Exception):
    """An answer with another status than 200, and its body."""


@dataclass
class Server:
    """A running server.

    Attributes:
      url: where it listens.
      token: what it wants to be shown.
      process: the gateway.
      mark: in the environment of everything that the gateway started.
    """

    url: str
    token: str
    process: subprocess.Popen[bytes]
    mark: str

    def ask(self, path: str, message: Any = None) -> bytes:
        """Sends a message and returns the body of the answer; raises Refused when its status is not 200."""
        request = urllib.request.Request(
            self.url + path,
            data=None if message is None else protocol.to_json(message),
            headers={"Authorization": f"Bearer {self.token}"},
        )
        try:
            with urllib.request.urlopen(request, timeout=120) as answer:
                return answer.read()
        except urllib.error.HTTPError as error:
            raise Refused(f"{error.code} {error.read().decode()}") from None

    def generate(self, **changes: Any) -> GenerateAnswer:
        """Asks for greedy responses to PROMPTS, or what the changes make of that."""
        prompts = changes.pop("prompts", PROMPTS)
        asked = GenerateRequest(
            **{
                "prompts": prompts,
                "num_samples": 2,
                "max_new_tokens": 12,
                "temperature": 0.0,
                "top_k": 0,
                "top_p": 1.0,
                "seeds": list(range(len(prompts))),
                "eos_ids": [EOS],
                **changes,
            }
        )
        answer = protocol.parse(GenerateAnswer, self.ask(protocol.GENERATE, asked))
        answer.check(asked)
        return answer

    def push(self, arrays: dict[str, np.ndarray], version: str, base: str | None = None) -> None:
        """Has weights served."""
        path = Path("/dev/shm") / f"test-{secrets.token_hex(8)}"
        try:
            save_file(arrays, path)
            asked = protocol.WeightsRequest(version, path=str(path), base=base)
            assert protocol.parse(WeightsAnswer, self.ask(protocol.WEIGHTS, asked)).version == version
        finally:
            path.unlink(missing_ok=True)


@contextlib.contextmanager
def running(kind: str, model: Path, *flags: str, ends: int = 0) -> Iterator[Server]:
    """Runs a server until it is ready; looks for the exit status, and that nothing of it is left behind."""
    mark = secrets.token_hex(8)
    directory = model.with_name(f"{kind}-{mark}")
    directory.mkdir()
    token = secrets.token_hex(16)
    with (directory / "output").open("wb") as output:
        process = subprocess.Popen(
            [
                *(str(PYTHON), "-m", f"gpu_bridge.serve_{kind}", f"--model={model}", "--dtype=float32"),
                *(f"--url_file={directory / 'url'}", f"--log_dir={directory}", "--max_num_seqs=32", *flags),
            ],
            cwd=ROOT,
            env={**os.environ, protocol.TOKEN_VARIABLE: token, "BRIDGE_TEST_MARK": mark},
            stdout=output,
            stderr=output,
        )
    started: set[int] = set()
    try:
        wait_until((directory / "url").exists, process)
        server = Server((directory / "url").read_text().strip(), token, process, mark)
        wait_until(lambda: is_ready(server), process)
        started = groups(mark)
        assert len(started) == 3, "expected those of the gateway, of the keeper and of the engine"
        yield server
    finally:
        started |= groups(mark) - {os.getpgrp()}
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == ends, (directory / "output").read_text()
        wait_until(lambda: not alive(started - {os.getpgrp()}))


def groups(mark: str) -> set[int]:
    """The process groups of the processes that have a mark in their environment."""
    found = set()
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if mark.encode() in (process / "environ").read_bytes():
                found.add(os.getpgid(int(process.name)))
    return found


def alive(wanted: set[int]) -> list[int]:
    """The processes of some groups; those that were ended and not yet asked for their status do not count."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            state, _, group = (process / "stat").read_text().rpartition(")")[2].split()[:3]
            if int(group) in wanted and state != "Z":
                found.append(int(process.name))
    return found


def wait_until(condition: Any, process: subprocess.Popen[bytes] | None = None) -> None:
    """Waits for a condition as long as a process lives."""
    until = time.monotonic() + START_SECONDS
    while not condition():
        assert process is None or process.poll() is None, "the server has ended"
        assert time.monotonic() < until, f"not in {START_SECONDS} s"
        time.sleep(0.2)


def is_ready(server: Server) -> bool:
    """Whether a server answers; its health says the same as its status code."""
    try:
        return protocol.parse(Health, server.ask(protocol.HEALTH)).status == protocol.READY
    except Refused as refused:
        if '"status":"starting"' not in str(refused):
            raise
        return False


@pytest.fixture(scope="session")
def directories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Model directories by name."""
    root = tmp_path_factory.mktemp("models")
    for name in (*POLICIES, "tiny-random-llama-reward"):
        tiny_random.write(root / name, name, changes=HEADS_OF_32)
    return {name: root / name for name in (*POLICIES, "tiny-random-llama-reward")}


@pytest.fixture(scope="session", params=POLICIES)
def policy(request: pytest.FixtureRequest, directories: dict[str, Path]) -> Iterator[tuple[Server, Path]]:
    """A policy server and its model's directory."""
    with running("policy", directories[request.param]) as server:
        yield server, directories[request.param]


@pytest.fixture(scope="session", params=["vllm", "mosec"])
def oracle(request: pytest.FixtureRequest, directories: dict[str, Path]) -> Iterator[tuple[Server, Path]]:
    """An oracle server and its model's directory."""
    model = directories["tiny-random-llama-reward"]
    with running("oracle", model, f"--backend={request.param}") as server:
        yield server, model


def padded(rows: list[list[int]]) -> Prompts:
    """Sequences padded on the left."""
    length = max(map(len, rows))
    tokens = np.array([[7] * (length - len(row)) + row for row in rows], np.int32)
    valid = np.arange(length)[None] >= length - np.array([[len(row)] for row in rows])
    return Prompts(jnp.asarray(tokens), jnp.asarray(valid))


def greedy(directory: Path) -> Candidates:
    """What the sampler in JAX writes."""
    loaded = hf.load(directory)
    sampling = SamplingConfig(num_samples=1, max_new_tokens=12, eos_ids=(EOS,), pad_id=EOS, temperature=0.0)
    return jax.device_get(
        generation.generate(
            jax.device_put(loaded.params), padded(PROMPTS), jax.random.key(0), config=loaded.config, sampling=sampling
        )
    )


def assert_same(answer: GenerateAnswer, expected: Candidates) -> None:
    """Looks that the engine wrote what the sampler did."""
    for row, responses in enumerate(answer.responses):
        length = int(expected.lengths[row, 0])
        for response in responses:
            assert response.tokens == expected.tokens[row, 0, :length].tolist()
            np.testing.assert_allclose(response.logprobs, expected.logprobs[row, 0, :length], atol=1e-3)


def perturbed(weights: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Weights after something like a large policy step."""
    rng = np.random.default_rng(1)
    return {name: (x + 0.05 * rng.normal(size=x.shape)).astype(x.dtype) for name, x in weights.items()}


def test_the_engine_writes_what_the_sampler_does_before_and_after_a_push(policy, tmp_path):
    server, directory = policy
    initial, expected = server.generate(), greedy(directory)
    assert_same(initial, expected)
    weights = load_file(directory / "model.safetensors")
    other = perturbed(weights)
    shutil.copytree(directory, tmp_path / "other")
    save_file(other, tmp_path / "other/model.safetensors")
    server.push(other, "a.1")
    changed = server.generate()
    assert changed.version == "a.1"
    assert changed.responses != initial.responses
    assert_same(changed, greedy(tmp_path / "other"))
    server.push(weights, "a.2")
    restored = server.generate()
    assert (restored.version, restored.responses) == ("a.2", initial.responses)


def test_a_push_of_the_last_layer_is_that_of_everything(policy):
    server, directory = policy
    weights = load_file(directory / "model.safetensors")
    layer = {name: x for name, x in perturbed(weights).items() if ".layers.1." in name}
    server.push(weights, "b.1")
    server.push(layer, "b.2", base="b.1")
    some = server.generate().responses
    server.push(weights, "b.3")
    initial = server.generate().responses
    server.push({**weights, **layer}, "b.4")
    assert server.generate().responses == some != initial
    with pytest.raises(Refused, match="409 "):
        server.push(layer, "b.5", base="b.3")
    server.push(weights, "b.6")


def test_samples_depend_on_their_prompts_seed_alone(policy):
    server, _ = policy
    together = server.generate(temperature=1.0, num_samples=4).responses
    assert server.generate(temperature=1.0, num_samples=4).responses == together
    assert len({tuple(response.tokens) for response in together[0]}) == 4
    for row, prompt in enumerate(PROMPTS):
        alone = server.generate(prompts=[prompt], seeds=[row], temperature=1.0, num_samples=4).responses[0]
        assert [response.tokens for response in alone] == [response.tokens for response in together[row]]
        for one, other in zip(alone, together[row], strict=True):
            np.testing.assert_allclose(one.logprobs, other.logprobs, atol=1e-5)


def test_more_seeded_prompts_than_the_engine_reads_at_a_time(policy):
    server, _ = policy
    prompts = RNG.integers(2, 258, (48, 200)).tolist()
    asked = {"prompts": prompts, "temperature": 1.0, "max_new_tokens": 4}
    assert len(set(map(repr, server.generate(**asked).responses))) == len(prompts)


def test_temperature_and_top_k_and_top_p_draw_and_logprobs_stay_raw(policy):
    server, _ = policy
    first = {
        tuple(response.tokens): response.logprobs[0] for response in server.generate(max_new_tokens=1).responses[0]
    }
    narrow = {"num_samples": 8, "max_new_tokens": 1, "temperature": 2.0, "prompts": PROMPTS[:1]}
    for restriction in ({"top_k": 1}, {"top_p": 1e-6}):
        for response in server.generate(**narrow, **restriction).responses[0]:
            assert abs(response.logprobs[0] - first[tuple(response.tokens)]) < 1e-4
    assert len({tuple(response.tokens) for response in server.generate(**narrow).responses[0]}) > 1


def test_what_the_engine_refuses_is_told(policy):
    server, _ = policy
    with pytest.raises(Refused, match=r"^400 .*length 300"):
        server.generate(prompts=[SHARED * 2])
    assert is_ready(server)


def test_scores_are_those_of_the_reward_model_in_jax(oracle):
    server, directory = oracle
    inputs = [*PROMPTS, [EOS], [5, EOS], [5, EOS, EOS]]
    answer = protocol.parse(ScoreAnswer, server.ask(protocol.SCORE, ScoreRequest(inputs)))
    loaded = hf.load(directory)
    batch = padded(inputs)
    expected = reward.apply(
        jax.device_put(loaded.params), reward.check(loaded.config), batch.tokens, batch.valid, dtype="float32"
    )
    assert answer.version == protocol.INITIAL
    np.testing.assert_allclose(answer.scores, expected, atol=1e-3)


def test_an_engine_that_is_killed_comes_back_without_its_weights(policy):
    """Stands last: it costs a start."""
    server, directory = policy
    if "gpt-neox" in directory.name:
        pytest.skip("one model is enough")
    before = protocol.parse(Health, server.ask(protocol.HEALTH))
    initial = server.generate()
    server.push(perturbed(load_file(directory / "model.safetensors")), "c.1")
    engine = [pid for pid in alive(groups(server.mark)) if b"EngineCore" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    os.kill(engine[0], signal.SIGKILL)
    wait_until(lambda: not is_ready(server), server.process)
    wait_until(lambda: is_ready(server), server.process)
    after = protocol.parse(Health, server.ask(protocol.HEALTH))
    assert (after.version, after.started != before.started) == (protocol.INITIAL, True)
    again = server.generate()
    assert (again.version, again.responses) == (protocol.INITIAL, initial.responses)


def test_nothing_lives_on_when_the_gateway_is_killed(directories):
    model = directories["tiny-random-llama-reward"]
    with running("oracle", model, "--backend=mosec", ends=-signal.SIGKILL) as server:
        server.process.kill()
