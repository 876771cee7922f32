"""Real vLLM and mosec servers behind their gateways against the JAX policy and reward model; skipped without `make bridge`."""

import shutil
import signal
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from gpu_bridge import protocol
from gpu_bridge.protocol import GenerateAnswer, Health, ScoreAnswer, ScoreRequest
from sea_jax.actors import generation
from sea_jax.models import reward, tokenizer
from sea_jax.models.checkpoints import hf, tiny_random
from sea_jax.types import Candidates, Prompts
from tests.support import tiny
from tests.support.engines import EOS, PROMPTS, PYTHON, RNG, SHARED, Refused, is_ready, kill_engine, running, wait_until

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not PYTHON.exists(), reason="`make bridge` has not been run")]


def padded(rows: Sequence[list[int]]) -> Prompts:
    """Sequences padded on the left."""
    length = max(map(len, rows))
    tokens = np.array([[7] * (length - len(row)) + row for row in rows], np.int32)
    valid = np.arange(length)[None] >= length - np.array([[len(row)] for row in rows])
    return Prompts(jnp.asarray(tokens), jnp.asarray(valid))


def greedy(
    directory: Path, prompts: Sequence[list[int]] = PROMPTS, eos_id: int = EOS, absent_ids: tuple[int, ...] = ()
) -> Candidates:
    """What the sampler in JAX writes."""
    loaded = hf.load(directory)
    how = {"num_samples": 1, "max_new_tokens": 12, "eos_ids": (eos_id,), "pad_id": eos_id}
    sampling = tiny.generation_config(**how, temperature=0.0, absent_ids=absent_ids)
    return jax.device_get(
        generation.generate(
            jax.device_put(loaded.params), padded(prompts), jax.random.key(0), config=loaded.config, sampling=sampling
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
    favourites = tuple(sorted({token for row in initial.responses for token in row[0].tokens} - {EOS}))
    assert_same(server.generate(absent_ids=list(favourites)), greedy(directory, absent_ids=favourites))
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


def test_a_model_without_the_score_is_not_served_with_one_at_random(directories):
    gated = directories["tiny-random-llama"].with_name("gated")
    tiny_random.write(gated, "tiny-random-llama-gated")
    with (
        pytest.raises(AssertionError, match=r"has no score.weight: its scores would be random"),
        running("oracle", gated, "--backend=mosec"),
    ):
        pass


def test_smollm2_writes_what_it_does_in_jax(tmp_path):
    loaded = hf.load("builtin:smollm2-135m-instruct")
    hf.save(tmp_path / "smollm2", loaded.config, loaded.params, loaded.directory)
    words = tokenizer.load(tmp_path / "smollm2")
    asked = [words.encode(text) for text in ("The capital of France is", "Boats float because", "def add(a, b):\n")]
    with running("policy", tmp_path / "smollm2", "--max_model_len=256") as server:
        answer = server.generate(prompts=asked, eos_ids=[words.eos_id])
    assert_same(answer, greedy(tmp_path / "smollm2", asked, words.eos_id))


def test_an_engine_that_is_killed_comes_back_without_its_weights(policy):
    """Stands last: it costs a start."""
    server, directory = policy
    if "gpt-neox" in directory.name:
        pytest.skip("one model is enough")
    before = protocol.parse(Health, server.ask(protocol.HEALTH))
    initial = server.generate()
    server.push(perturbed(load_file(directory / "model.safetensors")), "c.1")
    kill_engine(server)
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
