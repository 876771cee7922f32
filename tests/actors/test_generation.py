import dataclasses
import inspect
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import special, stats

from sea_jax import features, learner
from sea_jax.actors import generation
from sea_jax.actors import in_process as in_process_module
from sea_jax.actors.generation import GenerationConfig
from sea_jax.actors.in_process import in_process
from sea_jax.models import decoder
from sea_jax.models.config import ModelConfig
from sea_jax.types import Array, Candidates, Params, Prompts
from tests.support import tiny

PAD = 36
SAMPLED = tiny.generation_config(
    num_samples=4, max_new_tokens=6, eos_ids=(0, 1, 2, 3, 4), pad_id=PAD, temperature=1.5, feature_stack=1
)
GREEDY = tiny.generation_config(num_samples=1, max_new_tokens=9, eos_ids=(5,), pad_id=PAD, temperature=0.0)


@pytest.fixture(scope="module")
def params() -> Params:
    """Parameters in two stacks, between which features are read."""
    return tiny.params(cuts=(2,))


@pytest.fixture(scope="module")
def whole() -> Params:
    return tiny.params()


@pytest.fixture(scope="module")
def prompts() -> Prompts:
    batch = tiny.prompts(3, 8, 3)
    return Prompts(
        jnp.asarray(batch.tokens).at[2].set(batch.tokens[0]), batch.valid
    )  # rows 0 and 2 are the same prompt


def generate(params: Params, prompts: Prompts, sampling: GenerationConfig, seed: int = 0) -> Candidates:
    return generation.generate(params, prompts, jax.random.key(seed), config=tiny.CONFIG, sampling=sampling)


@pytest.fixture(scope="module")
def candidates(params, prompts) -> Candidates:
    return generate(params, prompts, SAMPLED)


def test_responses_end_with_their_end_of_sequence(candidates):
    tokens, lengths = np.asarray(candidates.tokens), np.asarray(candidates.lengths)
    logprobs = np.asarray(candidates.logprobs)
    assert tokens.shape == logprobs.shape == (3, 4, 6)
    assert tokens.dtype == lengths.dtype == np.int32
    for row in np.ndindex(3, 4):
        length = int(lengths[row])
        assert not np.isin(tokens[row][: length - 1], SAMPLED.eos_ids).any()
        assert length == 6 or tokens[row][length - 1] in SAMPLED.eos_ids
        assert (tokens[row][length:] == PAD).all()
        assert (logprobs[row][length:] == 0).all()
        assert (logprobs[row][:length] < 0).all()
    assert 0 < (lengths < 6).sum() < 12  # both kinds were there to look at


def found_by_the_learner(params: Params, prompts: Prompts, candidates: Candidates, dtype: str) -> np.ndarray:
    frozen, trained = decoder.divide(params, 1)
    (found,) = jax.jit(learner.response_logprobs, static_argnames=("config", "remat", "dtype"))(
        frozen,
        (trained,),
        prompts,
        candidates.tokens,
        candidates.lengths,
        config=tiny.CONFIG,
        remat=False,
        dtype=dtype,
    )
    return np.asarray(found)


def test_log_probs_are_those_the_learner_finds(params, prompts, candidates):
    found = found_by_the_learner(params, prompts, candidates, "float32")
    np.testing.assert_allclose(candidates.logprobs, found, rtol=1e-4, atol=1e-4)


def test_what_training_changes_in_the_norms_is_felt_in_bfloat16(params, prompts):
    def scaled(path, x):
        # By less than half of what bfloat16 can tell apart near 1.
        return x * 1.0015 if any("norm" in str(getattr(key, "key", "")) for key in path) else x

    moved = jax.tree_util.tree_map_with_path(scaled, params)
    sampling = dataclasses.replace(SAMPLED, dtype="bfloat16")
    written = generate(moved, prompts, sampling)
    found = found_by_the_learner(moved, prompts, written, "bfloat16")
    np.testing.assert_allclose(written.logprobs, found, atol=1e-3)


def test_features_are_the_mean_hidden_state_of_the_response(params, prompts, candidates):
    for row, sample in [(0, 0), (1, 3), (2, 1)]:
        prompt, length = tiny.prompt_ids(prompts, row), int(candidates.lengths[row, sample])
        response = np.asarray(candidates.tokens)[row, sample, :length].tolist()
        hidden = tiny.hidden_states(params, prompt + response, num_stacks=1)
        np.testing.assert_allclose(
            candidates.features[row, sample], hidden[len(prompt) :].mean(0), rtol=1e-4, atol=1e-5
        )


def read_again(params: Params, prompts: Prompts, written: Candidates, feature_stack: int | None) -> Array:
    return features.response_features(
        params,
        prompts,
        written.tokens,
        written.lengths,
        config=tiny.CONFIG,
        feature_stack=feature_stack,
        dtype="float32",
    )


def test_features_on_the_way_are_features_read_again(params, whole, prompts, candidates):
    behind_a_stack = read_again(params, prompts, candidates, 1)
    assert behind_a_stack.dtype == jnp.float32
    np.testing.assert_allclose(candidates.features, behind_a_stack, rtol=1e-4, atol=1e-5)
    written = generate(whole, prompts, GREEDY)
    np.testing.assert_allclose(written.features, read_again(whole, prompts, written, None), rtol=1e-4, atol=1e-5)


def test_the_key_alone_decides(params, prompts, candidates):
    again = generate(params, prompts, SAMPLED)
    jax.tree.map(np.testing.assert_array_equal, again, candidates)
    other = generate(params, prompts, SAMPLED, seed=1)
    assert (np.asarray(other.tokens) != np.asarray(candidates.tokens)).any(-1).mean() > 0.8


def test_samples_differ_within_a_prompt_and_between_equal_prompts(candidates):
    tokens = np.asarray(candidates.tokens)
    same_prompt = np.concatenate([tokens[0], tokens[2]])
    assert len({tuple(row) for row in same_prompt}) >= 6  # of 8
    assert len({tuple(row) for row in tokens[1]}) >= 3  # of 4


def greedy_by_hand(params: Params, prompt: list[int]) -> list[int]:
    """Takes the most probable token again and again, each time by a forward pass of the whole sequence."""
    response: list[int] = []
    while len(response) < GREEDY.max_new_tokens and not set(response) & set(GREEDY.eos_ids):
        response.append(int(tiny.logits(params, prompt + response)[-1].argmax()))
    return response


@pytest.fixture(scope="module")
def padded(prompts) -> Prompts:
    """The same prompts with more padding."""
    padding = jnp.full((3, 4), 7, jnp.int32)
    return Prompts(
        jnp.concatenate([padding, prompts.tokens], axis=1), jnp.concatenate([padding < 0, prompts.valid], axis=1)
    )


def test_temperature_0_is_the_argmax_loop_however_the_prompt_is_padded(whole, prompts, padded):
    expected = [greedy_by_hand(whole, tiny.prompt_ids(prompts, row)) for row in range(3)]
    assert expected[0] == expected[2] != expected[1]
    for batch in (prompts, padded):
        found = generate(whole, batch, GREEDY)
        for row in range(3):
            assert found.lengths[row, 0] == len(expected[row])
            assert np.asarray(found.tokens)[row, 0, : len(expected[row])].tolist() == expected[row]


def test_one_program_per_shape(whole, prompts, padded, monkeypatch):
    traced = []
    original = decoder.embed

    def counted(params: Params, config: ModelConfig, tokens: Array, *args: Any, **kwargs: Any) -> decoder.Streams:
        traced.append(tokens.shape)
        return original(params, config, tokens, *args, **kwargs)

    def trace(params: Params, prompts: Prompts, seed: int) -> None:
        # Equal configurations, not the same ones: they are static arguments, told apart by their hash.
        config, sampling = dataclasses.replace(tiny.CONFIG), dataclasses.replace(GREEDY, max_new_tokens=2)
        generation.generate.lower(params, prompts, jax.random.key(seed), config=config, sampling=sampling)

    monkeypatch.setattr(decoder, "embed", counted)
    for seed in range(3):
        trace(whole, prompts, seed)
    trace(whole, padded, 0)
    trace(tiny.params(1), prompts, 0)
    assert traced == [(3, 8), (3, 12)]


def certain(token: int) -> Params:
    """Parameters under which every hidden state is the same and scores one token above all others."""
    params = jax.tree.map(jnp.zeros_like, tiny.params())
    embed = params["embed"].at[:].set(1.0).at[token].set(10.0)
    return params | {"embed": embed, "final_norm": {"scale": jnp.ones(tiny.CONFIG.d_model)}}


def test_the_loop_stops_when_every_response_has_ended(prompts, monkeypatch):
    steps = []
    original = decoder.decode

    def counted(*args, **kwargs):
        jax.debug.callback(lambda step: steps.append(int(step)), args[-1])
        return original(*args, **kwargs)

    monkeypatch.setattr(decoder, "decode", counted)
    sampling = tiny.generation_config(num_samples=2, max_new_tokens=7, eos_ids=(11,), pad_id=PAD)
    found = generate(certain(11), prompts, sampling)
    jax.effects_barrier()
    assert steps == [0]
    np.testing.assert_array_equal(found.lengths, 1)
    np.testing.assert_array_equal(found.tokens[..., 0], 11)
    np.testing.assert_array_equal(found.tokens[..., 1:], PAD)
    steps.clear()
    found = generate(certain(12), prompts, sampling)
    jax.effects_barrier()
    assert sorted(steps) == list(range(7))
    np.testing.assert_array_equal(found.tokens, 12)
    np.testing.assert_array_equal(found.lengths, 7)


def test_rows_that_have_ended_are_left_out_and_nothing_else_changes(params, prompts, monkeypatch):
    sampling = dataclasses.replace(SAMPLED, num_samples=12, max_new_tokens=9, frozen_stacks=1)
    assert generation.sizes(36) == [36, 18]
    fewer = generate(params, prompts, sampling, seed=2)
    monkeypatch.setattr(generation, "sizes", lambda num_rows: [num_rows])
    traced_anew = jax.jit(inspect.unwrap(generation.generate), static_argnames=("config", "sampling"))
    every = traced_anew(params, prompts, jax.random.key(2), config=tiny.CONFIG, sampling=sampling)
    ends = np.sort(np.asarray(every.lengths), axis=None)
    assert ends[18] < ends[-1]  # it came to that
    np.testing.assert_array_equal(fewer.tokens, every.tokens)
    np.testing.assert_array_equal(fewer.lengths, every.lengths)
    np.testing.assert_allclose(fewer.logprobs, every.logprobs, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(fewer.features, every.features, rtol=1e-5, atol=1e-5)
    valid = np.arange(9) < np.asarray(every.lengths)[..., None]
    assert fewer.frozen is not None
    assert every.frozen is not None
    np.testing.assert_allclose(fewer.frozen.responses[valid], every.frozen.responses[valid], rtol=1e-4, atol=1e-5)


def test_padding_of_prompts_need_not_be_computed(params, prompts, candidates):
    valid = np.asarray(prompts.valid)
    found = generation.generate(
        params,
        prompts,
        jax.random.key(0),
        config=tiny.CONFIG,
        sampling=dataclasses.replace(SAMPLED, frozen_stacks=1),
        prompt_rows=int(valid.sum()) + 1,
    )
    np.testing.assert_array_equal(found.tokens, candidates.tokens)
    np.testing.assert_allclose(found.logprobs, candidates.logprobs, rtol=1e-5, atol=1e-5)
    # What is kept for the learner is what it would find.
    assert found.frozen is not None
    responses_valid = jnp.arange(6) < found.lengths[..., None]
    streams = decoder.embed(
        params, tiny.CONFIG, prompts.tokens, prompts.valid, found.tokens, responses_valid, dtype="float32"
    )
    streams, _ = decoder.run_stack(params["stacks"][0], tiny.CONFIG, streams)
    assert streams.responses is not None
    np.testing.assert_allclose(found.frozen.prompt[valid], streams.prompt[valid], rtol=1e-4, atol=1e-5)
    there = np.asarray(responses_valid)
    np.testing.assert_allclose(found.frozen.responses[there], streams.responses[there], rtol=1e-4, atol=1e-5)


def restrict_by_hand(logits: np.ndarray, top_k: int, top_p: float) -> np.ndarray:
    """The tokens kept [V]: of the k most probable, the fewest that reach the mass p among them."""
    order = np.argsort(-logits)[: top_k or None]
    mass = np.cumsum(special.softmax(logits[order].astype(np.float64)))
    assume(top_p == 1 or np.abs(mass - top_p).min() > 1e-4)
    count = len(order) if top_p == 1 else int(np.argmax(mass >= top_p)) + 1
    return np.isin(np.arange(len(logits)), order[:count])


@given(
    logits=hnp.arrays(np.float32, (3, 11), elements=st.integers(-20, 20).map(lambda x: x / 4), unique=True),
    top_k=st.sampled_from([0, 1, 3, 10, 11, 50]),
    top_p=st.one_of(st.just(1.0), st.floats(0.01, 1.0)),
)
def test_restrict_keeps_the_top_k_and_the_nucleus(logits, top_k, top_p):
    kept = np.stack([restrict_by_hand(row, top_k, top_p) for row in logits])
    found = np.asarray(generation.restrict(jnp.asarray(logits), top_k, top_p))
    np.testing.assert_array_equal(found, np.where(kept, logits, -np.inf))


@pytest.mark.parametrize("vocab_size", [7, 300])
def test_tokens_are_drawn_as_often_as_they_are_probable(vocab_size):
    rng = np.random.default_rng(vocab_size)
    logits = rng.normal(size=vocab_size).astype(np.float32)
    never = rng.random(vocab_size) < 0.3
    never[[0, -1]] = True  # where rounding would end up
    logits[never] = -np.inf
    num_draws = 20_000
    drawn = generation.draw(
        jnp.broadcast_to(jnp.asarray(logits), (num_draws, vocab_size)),
        jax.random.uniform(jax.random.key(0), (num_draws,)),
    )
    counts = np.bincount(drawn, minlength=vocab_size)
    assert drawn.dtype == jnp.int32
    assert counts[never].sum() == 0
    expected = num_draws * special.softmax(logits.astype(np.float64))
    assert stats.chisquare(counts[~never], expected[~never]).pvalue > 0.01


def test_the_ends_of_the_unit_interval_draw_tokens_that_exist():
    just_below_1 = np.nextafter(np.float32(1), np.float32(0))
    logits = np.random.default_rng(0).normal(size=(200, 300)).astype(np.float32) * 5
    logits[:, :9] = logits[:, -9:] = -np.inf
    logits[0] = -np.inf
    logits[0, 123] = -50.0  # one token alone
    for uniform in (0.0, just_below_1):
        drawn = np.asarray(generation.draw(jnp.asarray(logits), jnp.full(200, uniform)))
        assert np.isfinite(logits[np.arange(200), drawn]).all()
        assert drawn[0] == 123


def test_rounding_at_the_edges_of_the_blocks_draws_no_impossible_token():
    logits = np.random.default_rng(0).normal(size=300).astype(np.float32)
    logits[::2] = -np.inf  # every block of two begins with a token that must not be drawn
    edges = np.cumsum(special.softmax(logits))[1::2]
    uniforms = np.concatenate([edges + ulps * np.spacing(edges) for ulps in range(-3, 4)])
    inside = jnp.asarray(uniforms[uniforms < 1], jnp.float32)
    drawn = generation.draw(jnp.broadcast_to(jnp.asarray(logits), (len(inside), 300)), inside)
    assert np.isfinite(logits[np.asarray(drawn)]).all()


def test_temperature_shapes_the_draw_but_not_the_log_prob():
    logits = np.array([2.0, 1.0, 0.0, -1.0], np.float32)
    sampling = dataclasses.replace(GREEDY, temperature=0.5)
    rows = jnp.broadcast_to(jnp.asarray(logits), (5000, 4))
    uniform = jax.random.uniform(jax.random.key(0), (5000,))
    token, logprob = generation.choose(rows, uniform, sampling)
    counts = np.bincount(token, minlength=4)
    assert stats.chisquare(counts, 5000 * special.softmax(logits.astype(np.float64) / 0.5)).pvalue > 0.01
    np.testing.assert_allclose(logprob, special.log_softmax(logits)[np.asarray(token)], rtol=1e-5)
    # Nor does the restriction: of the two tokens left, the log-probs are still those among all four.
    token, logprob = generation.choose(rows, uniform, dataclasses.replace(sampling, top_k=2))
    assert set(np.asarray(token)) == {0, 1}
    np.testing.assert_allclose(logprob, special.log_softmax(logits)[np.asarray(token)], rtol=1e-5)


def test_rows_that_are_no_token_are_never_drawn_and_count_in_the_log_probs():
    logits = np.array([5.0, 1.0, 4.0, 0.0, 6.0], np.float32)
    rows = jnp.broadcast_to(jnp.asarray(logits), (500, 5))
    for temperature in (0.0, 1.0):
        sampling = dataclasses.replace(GREEDY, temperature=temperature, absent_ids=(0, 4))
        token, logprob = generation.choose(rows, jax.random.uniform(jax.random.key(0), (500,)), sampling)
        assert set(np.asarray(token)) == ({1, 2, 3} if temperature else {2})
        np.testing.assert_allclose(logprob, special.log_softmax(logits)[np.asarray(token)], rtol=1e-5)


def test_temperature_0_takes_the_most_probable_token():
    logits = jnp.array([[0.0, 3.0, 1.0], [2.0, 0.0, 1.9]])
    token, logprob = generation.choose(logits, jnp.zeros(2), GREEDY)
    np.testing.assert_array_equal(token, [1, 0])
    np.testing.assert_allclose(logprob, special.log_softmax(logits, axis=-1)[[0, 1], [1, 0]], rtol=1e-5)


def test_prompts_that_come_again_are_read_once_and_answered_alike(params, prompts, monkeypatch):
    frozen, trained = decoder.divide(params, 1)
    sampling = dataclasses.replace(SAMPLED, frozen_stacks=1)
    reads: list[int] = []
    original = generation.read_prompts

    def counted(*args: Any, **kwargs: Any) -> generation.ReadPrompts:
        reads.append(1)
        return original(*args, **kwargs)

    monkeypatch.setattr(generation, "read_prompts", counted)
    at_once, again = (in_process(frozen, tiny.CONFIG, sampling, again=again) for again in (False, True))
    expected = at_once(trained, prompts, jax.random.key(0), 0)
    assert not reads
    for _ in range(2):
        found = again(trained, prompts, jax.random.key(0), 0)
        np.testing.assert_array_equal(found.tokens, expected.tokens)
        np.testing.assert_allclose(found.logprobs, expected.logprobs, rtol=1e-5, atol=1e-5)
    assert len(reads) == 1
    moved = jax.tree.map(lambda x: x * 1.5, trained)  # the layers behind are not remembered
    other = again(moved, prompts, jax.random.key(0), 0)
    np.testing.assert_allclose(other.logprobs, at_once(moved, prompts, jax.random.key(0), 0).logprobs, atol=1e-4)
    assert len(reads) == 1
    monkeypatch.setattr(in_process_module, "REMEMBERED_BYTES", 100)
    in_process(frozen, tiny.CONFIG, sampling, again=True)(trained, prompts, jax.random.key(0), 0)
    assert len(reads) == 1  # no room
