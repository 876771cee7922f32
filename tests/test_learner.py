import dataclasses
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sea_jax import learner, losses
from sea_jax.learner import Learner, LearnerConfig
from sea_jax.models import decoder
from sea_jax.types import Array, FrozenStates, Params, PreferenceBatch, Prompts
from tests.support import tiny

BETA = 0.3
LOSS = partial(losses.dpo, beta=BETA)  # one object: a static argument of `update`
# A first step at a fifth of the peak; no clipping. The default configuration of these tests.
PLAIN = tiny.learner_config(
    learning_rate=5e-3, total_steps=100, warmup_fraction=0.05, clip_norm=1e9, microbatch_size=4, dtype="float32"
)
FIRST_RATE = 1e-3
NOTHING_FROZEN: Params = {"stacks": ()}


@cache
def reference() -> Params:
    return tiny.params(0)


@cache
def policy() -> Params:
    """A policy that has moved away from its reference."""
    return jax.tree.map(
        lambda w, other: jnp.asarray(np.asarray(w) + 0.1 * np.asarray(other)), tiny.params(0), tiny.params(1)
    )


def batch(weights: tuple[float, ...] = (1.0, 0.5, 0.0, 2.0)) -> PreferenceBatch:
    rng = np.random.default_rng(3)
    return PreferenceBatch(
        prompts=tiny.prompts(8, 3, 5, 6),
        tokens=jnp.asarray(rng.integers(0, tiny.CONFIG.vocab_size, (4, 2, 6)), jnp.int32),
        lengths=jnp.array([[6, 2], [1, 5], [4, 4], [3, 6]], jnp.int32),
        labels=jnp.array([1.0, 0.0, 1.0, 0.3]),
        weights=jnp.array(weights),
    )


def update(
    pairs: PreferenceBatch,
    config: LearnerConfig = PLAIN,
    state: Learner | None = None,
    frozen: Params = NOTHING_FROZEN,
    reference_policy: Params | None = None,
) -> tuple[Learner, dict[str, Array]]:
    """One step, of the whole model if nothing else is said."""
    state = learner.init(policy(), config) if state is None else state
    reference_policy = reference() if reference_policy is None else reference_policy
    return learner.update(state, frozen, reference_policy, pairs, loss=LOSS, config=tiny.CONFIG, learner_config=config)


def gradient(state: Learner, config: LearnerConfig = PLAIN) -> Params:
    """The clipped gradient of a first step: what Adam's first moment holds a share of."""
    return jax.tree.map(lambda m: m / (1 - config.b1), optax.tree_utils.tree_get(state.opt_state, "mu"))


def assert_trees_close(found: Any, expected: Any, **tolerance: Any) -> None:
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, **tolerance), found, expected)


def assert_trees_equal(found: Any, expected: Any) -> None:
    jax.tree.map(np.testing.assert_array_equal, found, expected)


# ---- The whole step against DPO written out


def sequences(pairs: PreferenceBatch) -> tuple[np.ndarray, np.ndarray]:
    """Every prompt with every response, [2 B, LENGTH], and which positions predict a response token, [2 B, LENGTH]."""
    rows: list[list[int]] = []
    responses, lengths = np.asarray(pairs.tokens), np.asarray(pairs.lengths)
    predicts = np.zeros((8, tiny.LENGTH), bool)
    for row, side in np.ndindex(4, 2):
        prompt = tiny.prompt_ids(pairs.prompts, row)
        response = responses[row, side, : lengths[row, side]].tolist()
        predicts[len(rows), len(prompt) - 1 : len(prompt) + len(response) - 1] = True
        rows.append(prompt + response)
    return tiny.fill(*rows), predicts


def dpo_written_out(params: Params, initial: Params, pairs: PreferenceBatch) -> Array:
    """Soft-label DPO on all the logits of whole sequences, nothing shared; the mean by weight."""
    tokens, predicts = sequences(pairs)

    def logprob(whole: Params) -> Array:
        logprobs = jax.nn.log_softmax(tiny.run(whole, tokens) @ whole["embed"].T)
        of_next = jnp.take_along_axis(logprobs[:, :-1], tokens[:, 1:, None], axis=2)[..., 0]
        return (of_next * predicts[:, :-1]).sum(1).reshape(4, 2)

    log_ratio = logprob(params) - logprob(initial)
    h = BETA * (log_ratio[:, 0] - log_ratio[:, 1])
    values = -pairs.labels * jax.nn.log_sigmoid(h) - (1 - pairs.labels) * jax.nn.log_sigmoid(-h)
    return (values * pairs.weights).sum() / pairs.weights.sum()


def test_the_gradient_is_that_of_dpo_written_out():
    params, initial, pairs = policy(), reference(), batch()
    value, expected = jax.jit(jax.value_and_grad(lambda params: dpo_written_out(params, initial, pairs)))(params)
    state, report = update(batch())
    assert float(report["loss"]) == pytest.approx(float(value), rel=1e-5)
    assert float(report["gradient_norm"]) == pytest.approx(float(optax.global_norm(expected)), rel=1e-4)
    scale = float(optax.global_norm(expected))
    assert_trees_close(gradient(state), expected, rtol=1e-3, atol=1e-6 * scale)
    assert int(state.step) == 1


def test_the_step_is_adams():
    state, report = update(batch())
    assert float(report["learning_rate"]) == pytest.approx(FIRST_RATE)
    expected = jax.tree.map(lambda w, g: w - FIRST_RATE * g / (jnp.abs(g) + 1e-8), policy(), gradient(state))
    assert_trees_close(state.trained, expected, rtol=1e-5, atol=1e-6)


def test_what_is_reported():
    _, report = update(batch())
    tokens, predicts = sequences(batch())
    sums = []
    for whole in (policy(), reference()):
        logprobs = np.asarray(jax.nn.log_softmax(tiny.run(whole, tokens) @ whole["embed"].T))
        picked = np.take_along_axis(logprobs[:, :-1], tokens[:, 1:, None], axis=2)[..., 0]
        sums.append((picked * predicts[:, :-1]).sum(1).reshape(4, 2))
    log_ratio, weights = sums[0] - sums[1], np.array([1.0, 0.5, 0.0, 2.0])
    towards_preferred = (log_ratio[:, 0] - log_ratio[:, 1]) * np.array([1, -1, 1, -1])
    for name, values in {
        "margin": towards_preferred,
        "accuracy": towards_preferred > 0,
        "log_ratio": log_ratio.mean(1),
    }.items():
        assert float(report[name]) == pytest.approx((values * weights).sum() / weights.sum(), rel=1e-3)


def test_steps_lower_the_loss():
    state, report = update(batch((1.0,) * 4))
    first = float(report["loss"])
    for _ in range(9):
        state, report = update(batch((1.0,) * 4), state=state)
    assert float(report["loss"]) < 0.7 * first
    assert int(state.step) == 10


# ---- Accumulation, weights


def test_microbatches_and_recomputed_layers_change_nothing():
    whole, report = update(batch())
    in_parts, report_in_parts = update(batch(), dataclasses.replace(PLAIN, microbatch_size=2, remat=True))
    scale = float(report["gradient_norm"])
    assert_trees_close(gradient(in_parts), gradient(whole), rtol=1e-4, atol=1e-6 * scale)
    assert_trees_close(in_parts.trained, whole.trained, rtol=1e-4, atol=1e-5)
    assert report.keys() == report_in_parts.keys()
    for name in report:
        assert float(report_in_parts[name]) == pytest.approx(float(report[name]), rel=1e-4)


def garbage_everywhere(pairs: PreferenceBatch, row: int) -> PreferenceBatch:
    prompts = Prompts(
        jnp.asarray(pairs.prompts.tokens).at[row].set(10**6), jnp.asarray(pairs.prompts.valid).at[row].set(False)
    )
    return dataclasses.replace(
        pairs,
        prompts=prompts,
        tokens=pairs.tokens.at[row].set(-(10**6)),
        lengths=pairs.lengths.at[row].set(0),
        labels=pairs.labels.at[row].set(7.0),
    )


def no_label(pairs: PreferenceBatch, row: int) -> PreferenceBatch:
    return dataclasses.replace(pairs, labels=pairs.labels.at[row].set(jnp.nan))


@pytest.mark.parametrize("spoil", [garbage_everywhere, no_label])
def test_a_row_of_weight_0_is_left_out_whatever_is_in_it(spoil):
    clean, report = update(batch())
    row = 2
    assert batch().weights[row] == 0
    found, report_of_spoilt = update(spoil(batch(), row))
    assert_trees_equal(found, clean)
    assert_trees_equal(report_of_spoilt, report)


def test_without_any_weight_nothing_changes():
    state, _ = update(batch())
    before = jax.tree.map(np.asarray, jax.tree.map(jnp.copy, state))
    after, report = update(batch((0.0,) * 4), state=state)
    assert_trees_equal(after, before)
    assert float(report["loss"]) == 0


# ---- Frozen layers, clipping, decay


@cache
def divided() -> tuple[Params, Params, Params]:
    """The policy's first layer as the frozen part; its last two, and the reference's, as trained parts."""
    frozen, trained = decoder.divide(decoder.recut(policy(), (1,)), 1)
    return frozen, trained, decoder.divide(decoder.recut(reference(), (1,)), 1)[1]


LAST = dataclasses.replace(PLAIN, clip_norm=0.5, weight_decay=0.1)


def test_the_last_layers_alone_are_the_whole_model_with_the_other_gradients_zeroed():
    frozen, trained, reference_part = divided()
    whole, _ = update(batch(), reference_policy=decoder.recut(decoder.join(frozen, reference_part), ()))
    of_whole = gradient(whole)
    last = {
        "stacks": (jax.tree.map(lambda leaf: leaf[1:], of_whole["stacks"][0]),),
        "final_norm": of_whole["final_norm"],
    }
    norm = float(optax.global_norm(last))
    assert norm > 2 * LAST.clip_norm
    assert norm < 0.9 * float(optax.global_norm(of_whole))
    clipped = jax.tree.map(lambda g: g * LAST.clip_norm / norm, last)
    stepped = jax.tree.map(lambda w, g: w - FIRST_RATE * (g / (jnp.abs(g) + 1e-8) + 0.1 * w), trained, clipped)

    state, report = update(batch(), LAST, learner.init(trained, LAST), frozen, reference_part)
    assert float(report["gradient_norm"]) == pytest.approx(norm, rel=1e-4)
    assert_trees_close(gradient(state, LAST), clipped, rtol=1e-3, atol=1e-6 * LAST.clip_norm)
    assert_trees_close(state.trained, stepped, rtol=1e-5, atol=1e-6)


def test_rows_are_those_of_the_fullest_microbatch():
    pairs = batch()
    prompts, of_responses = np.array([8, 3, 5, 6]), np.array([8, 6, 8, 9])
    count = partial(learner.count_rows, pairs.prompts, pairs.tokens, pairs.lengths)
    # All four prompts: 53 of 80 tokens, 31 of 48 of responses; every second one: 29 of 40, 16 of 24. In eighths, upwards.
    assert (prompts + of_responses).sum() == 53
    assert count(4) == (60, 36)
    assert count(2) == (30, 18)
    # One token each: 30 of 80, which is three eighths, and so many of the responses' too.
    assert learner.count_rows(pairs.prompts, pairs.tokens, jnp.ones((4, 2), jnp.int32), 4) == (30, 18)


def test_padding_left_out_and_frozen_states_handed_on_change_nothing():
    frozen, trained, reference_part = divided()
    config = dataclasses.replace(LAST, microbatch_size=2)
    expected, report = update(batch(), config, learner.init(trained, config), frozen, reference_part)
    pairs = batch()
    valid = jnp.arange(6) < pairs.lengths[..., None]
    streams = decoder.embed(
        frozen, tiny.CONFIG, pairs.prompts.tokens, pairs.prompts.valid, pairs.tokens, valid, dtype="float32"
    )
    streams, _ = decoder.run_stack(frozen["stacks"][0], tiny.CONFIG, streams)
    assert streams.responses is not None
    pairs = dataclasses.replace(pairs, frozen=FrozenStates(streams.prompt, streams.responses))
    blind = {
        "stacks": jax.tree.map(jnp.zeros_like, frozen["stacks"]),
        "embed": frozen["embed"],
    }  # they are not run again
    found, own_report = learner.update(
        learner.init(trained, config),
        blind,
        reference_part,
        pairs,
        loss=LOSS,
        config=tiny.CONFIG,
        learner_config=config,
        rows=learner.count_rows(pairs.prompts, pairs.tokens, pairs.lengths, 2),
    )
    assert_trees_close(own_report, report, rtol=1e-4, atol=1e-6)
    assert_trees_close(gradient(found, config), gradient(expected, config), rtol=1e-3, atol=1e-6)


def test_divide_and_join():
    params = tiny.params(0, (1, 2))
    for num_stacks in (None, 1, 2, 3):
        frozen, trained = decoder.divide(params, num_stacks)
        assert len(trained["stacks"]) == (num_stacks or 3)
        assert_trees_equal(decoder.join(frozen, trained), params)
    frozen, trained = decoder.divide(params, 1)
    assert set(trained) == {"stacks", "final_norm"}
    assert set(frozen) == {"stacks", "embed"}


def test_the_step_consumes_the_learner_and_nothing_else():
    own = jax.tree.map(jnp.copy, reference())
    before = jax.tree.map(np.array, own)
    state = learner.init(own, PLAIN)
    after, _ = update(batch(), state=state, reference_policy=own)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state.trained))
    assert_trees_equal(own, before)
    assert not np.array_equal(after.trained["embed"], before["embed"])


HALF = dataclasses.replace(PLAIN, dtype="bfloat16")


def test_masters_stay_in_full_precision():
    state = learner.init(policy(), HALF)
    step = partial(learner.update, loss=LOSS, config=tiny.CONFIG, learner_config=HALF)
    after, report = jax.eval_shape(step, state, NOTHING_FROZEN, reference(), batch())
    assert jax.tree.map(jnp.shape, after) == jax.tree.map(jnp.shape, state)
    assert jax.tree.map(lambda leaf: leaf.dtype, after) == jax.tree.map(lambda leaf: leaf.dtype, state)
    assert {leaf.dtype for leaf in jax.tree.leaves((after.trained, report))} == {jnp.dtype("float32")}


@pytest.mark.slow
def test_half_precision_goes_the_same_way():
    full, report = update(batch())
    half, report_of_half = update(batch(), HALF)
    assert float(report_of_half["loss"]) != pytest.approx(float(report["loss"]), rel=1e-5)
    assert float(report_of_half["loss"]) == pytest.approx(float(report["loss"]), rel=0.1)
    cosine = optax.tree_utils.tree_vdot(gradient(half), gradient(full)) / (
        optax.global_norm(gradient(half)) * optax.global_norm(gradient(full))
    )
    assert float(cosine) > 0.98
    # The masters move by less than half precision can tell.
    moved = np.abs(np.asarray(half.trained["embed"]) - np.asarray(policy()["embed"]))
    assert 0 < moved.max() <= 1.01 * FIRST_RATE


def test_the_schedule_warms_up_and_ends_at_the_final_fraction():
    rate = learner.schedule(tiny.learner_config(learning_rate=2.0, total_steps=110, warmup_fraction=10 / 110))
    # From a tenth of the peak on: 10 steps up to 2, then a cosine down to 0.2 at step 110, halfway at step 60.
    found = [float(rate(step)) for step in (0, 5, 10, 35, 60, 110, 500)]
    quarter = 0.2 + 1.8 * (1 + np.cos(np.pi / 4)) / 2
    np.testing.assert_allclose(found, [0.2, 1.1, 2.0, quarter, 1.1, 0.2, 0.2], rtol=1e-5)


@pytest.mark.parametrize(("warmup_fraction", "total_steps"), [(0.0, 10), (0.03, 1), (1.0, 10)])
def test_the_schedule_never_starts_at_nothing(warmup_fraction, total_steps):
    rate = learner.schedule(
        tiny.learner_config(
            learning_rate=1.0, total_steps=total_steps, warmup_fraction=warmup_fraction, final_fraction=1.0
        )
    )
    warmup_steps = max(1, round(warmup_fraction * total_steps))
    assert float(rate(0)) == pytest.approx(1 / warmup_steps)
    assert float(rate(warmup_steps)) == pytest.approx(1.0)
