import dataclasses
from functools import cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sea_jax import ensemble
from sea_jax.ensemble import Ensemble, EnsembleSettings
from sea_jax.replay import Replay, add_pairs, empty_replay
from sea_jax.runtime import checkpoint
from sea_jax.types import Array, Params

SMALL = EnsembleSettings(
    num_heads=3, hidden_size=6, learning_rate=0.01, weight_decay=0.02, anchor_strength=0.7, steps=4, batch_size=8
)
D = 5

UPDATE = jax.jit(ensemble.update, static_argnames="config")
REWARDS = jax.jit(ensemble.rewards)
ADD = jax.jit(add_pairs)


@cache
def initial(config: EnsembleSettings = SMALL, num_features: int = D) -> Ensemble:
    return jax.jit(ensemble.init, static_argnums=(0, 1))(config, num_features, jax.random.key(0))


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def replay(labels: list[float], capacity: int = 8, seed: int = 0) -> Replay:
    """A replay of random features with these labels."""
    count = len(labels)
    empty = empty_replay(capacity, D)
    return ADD(empty, normal(seed, count, 2, D), np.array(labels, np.float32), np.ones(count, bool))


def moved(state: Ensemble) -> Ensemble:
    """The ensemble with its heads away from their anchors."""
    return dataclasses.replace(
        state, heads=jax.tree.map(lambda w: np.asarray(w) + 0.2 * normal(7, *w.shape), state.heads)
    )


def reward_by_hand(head: dict[str, np.ndarray], features: np.ndarray) -> np.ndarray:
    hidden = np.maximum(features @ head["w1"] + head["b1"], 0)
    hidden = np.maximum(hidden @ head["w2"] + head["b2"], 0)
    return hidden @ head["w3"] + head["b3"]


def head_of(heads: Params, k: int) -> dict[str, np.ndarray]:
    return {name: np.asarray(leaf[k], np.float64) for name, leaf in heads.items()}


def assert_trees_close(found: Params, expected: Params, **tolerance: Any) -> None:
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, **tolerance), found, expected)


WIDE = EnsembleSettings(num_heads=4, hidden_size=64)


def test_init_follows_the_paper():
    state = initial(WIDE, 100)
    for name, fan_in, shape in (("w1", 100, (4, 100, 64)), ("w2", 64, (4, 64, 64)), ("w3", 64, (4, 64))):
        weights, sigma = np.asarray(state.heads[name]), 1 / (2 * fan_in**0.5)
        assert weights.shape == shape
        assert weights.dtype == np.float32
        assert np.abs(weights).max() <= 2 * sigma * (1 + 1e-6)
        # A normal cut at 2 sigma keeps 0.880 of its standard deviation.
        if name != "w3":
            assert weights.std() == pytest.approx(0.880 * sigma, rel=0.02)
            assert np.abs(weights).max() > 1.9 * sigma
    assert not any(state.heads[name].any() for name in ("b1", "b2", "b3"))
    assert_trees_close(state.anchor, state.heads, rtol=0)


def test_heads_are_independent():
    weights = np.asarray(initial(WIDE, 100).heads["w1"])
    correlation = np.corrcoef(weights.reshape(4, -1)) - np.eye(4)
    assert np.abs(correlation).max() < 0.06  # 5 / sqrt(6400)


def test_rewards_by_hand():
    state = moved(initial())
    shift, scale = np.arange(D, dtype=np.float32), np.linspace(0.5, 2.0, D, dtype=np.float32)
    state = dataclasses.replace(state, shift=jnp.asarray(shift), scale=jnp.asarray(scale))
    features = normal(1, 2, 4, D)
    found = REWARDS(state, features)
    assert found.shape == (3, 2, 4)
    standardised = (np.asarray(features, np.float64) - np.arange(D)) * np.linspace(0.5, 2.0, D)
    for k in range(3):
        np.testing.assert_allclose(
            found[k], reward_by_hand(head_of(state.heads, k), standardised), rtol=1e-4, atol=1e-5
        )


def test_calibrate_measures_the_spread_within_a_prompt():
    rng = np.random.default_rng(0)
    within = rng.normal(0, [0.1, 1.0, 10.0, 0.0, 3.0], (50, 20, D))
    between = rng.normal(0, 100.0, (50, 1, D))  # tells no two responses to a prompt apart
    features = within + between
    state = ensemble.calibrate(initial(), jnp.asarray(features, jnp.float32))
    np.testing.assert_allclose(state.shift, features.mean((0, 1)), rtol=1e-4)
    deviations = np.sqrt(np.square(features - features.mean(1, keepdims=True)).mean((0, 1)))
    live = [0, 1, 2, 4]
    np.testing.assert_allclose(np.asarray(state.scale)[live], 1 / deviations[live], rtol=1e-3)
    assert state.scale[3] == 1  # what does not vary is left as it is, whatever rounding makes of it


def update_by_hand(state: Ensemble, held: Replay, config: EnsembleSettings) -> Params:
    """The m steps of Eq. 8 on the whole replay: every head on its own, Adam written out."""
    count = int(held.added)
    features, labels = (np.asarray(x[:count]) for x in (held.features, held.labels))
    features = (features - np.asarray(state.shift)) * np.asarray(state.scale)

    def loss(head: Params, anchor: Params) -> Array:
        total = jnp.zeros(())
        for pair, label in zip(features, labels, strict=True):
            hidden = jax.nn.relu(jax.nn.relu(pair @ head["w1"] + head["b1"]) @ head["w2"] + head["b2"])
            first, second = hidden @ head["w3"] + head["b3"]
            probability = 1 / (1 + jnp.exp(second - first))
            total -= (label * jnp.log(probability) + (1 - label) * jnp.log(1 - probability)) / count
        distance = sum(jnp.sum((head[name] - anchor[name]) ** 2) for name in head)
        return total + config.anchor_strength / count * distance

    gradient = jax.jit(jax.grad(loss))
    heads = []
    for k in range(config.num_heads):
        head, anchor = head_of(state.heads, k), head_of(state.anchor, k)
        first_moment = second_moment = jax.tree.map(np.zeros_like, head)
        for t in range(1, config.steps + 1):
            g = jax.tree.map(lambda g, w: np.asarray(g) + config.weight_decay * w, gradient(head, anchor), head)
            first_moment = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, first_moment, g)
            second_moment = jax.tree.map(lambda v, g: 0.999 * v + 0.001 * g**2, second_moment, g)
            head = jax.tree.map(
                lambda w, m, v, t=t: (
                    w - config.learning_rate * (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.999**t)) + 1e-8)
                ),
                head,
                first_moment,
                second_moment,
            )
        heads.append(head)
    return jax.tree.map(lambda *leaves: np.stack(leaves), *heads)


def test_m_scanned_steps_are_m_steps_by_hand():
    state = moved(initial())
    shift, scale = np.full(D, 0.3, np.float32), np.linspace(0.5, 2.0, D, dtype=np.float32)
    state = dataclasses.replace(state, shift=jnp.asarray(shift), scale=jnp.asarray(scale))
    held = replay([1.0, 0.0, 0.3, 1.0, 0.5, 0.0])  # 6 pairs in a batch of 8: two rows weigh nothing
    learnt, report = UPDATE(state, held, jax.random.key(2), SMALL)
    assert_trees_close(learnt.heads, update_by_hand(state, held, SMALL), rtol=1e-3, atol=2e-5)
    assert all(np.isfinite(float(report[name])) for name in ("loss", "accuracy"))
    assert_trees_close(learnt.anchor, state.anchor, rtol=0)
    np.testing.assert_array_equal(learnt.shift, state.shift)


def test_the_prior_weighs_lambda_over_n():
    config = dataclasses.replace(SMALL, steps=1, weight_decay=0.0)
    state = moved(initial())
    pair = np.broadcast_to(normal(1, D), (4, 2, D))
    held = empty_replay(4, D)
    # Both responses are the same: the likelihood is log 2, whatever the heads say, and leaves the prior alone.

    def distance(heads: Params) -> float:
        return sum(float(np.square(np.asarray(w) - np.asarray(state.anchor[name])).sum()) for name, w in heads.items())

    for count in (4, 8):  # N counts what was ever collected, also what the replay no longer holds
        held = ADD(held, pair, np.array([1.0, 0.0, 0.2, 1.0], np.float32), np.ones(4, bool))
        learnt, report = UPDATE(state, held, jax.random.key(2), config)
        assert float(report["loss"]) == pytest.approx(np.log(2) + 0.7 / count * distance(state.heads) / 3, rel=1e-5)
        # The gradient, a tenth of which is Adam's first moment, is twice the way from the anchor.
        first_moment = optax.tree_utils.tree_get(learnt.opt_state, "mu")
        expected = jax.tree.map(
            lambda w, w0, count=count: 0.1 * 2 * 0.7 / count * (np.asarray(w) - np.asarray(w0)),
            state.heads,
            state.anchor,
        )
        assert_trees_close(first_moment, expected, rtol=1e-4, atol=1e-6)
        assert distance(learnt.heads) < distance(state.heads)


def test_priors_are_added_rewards_are_centred_and_the_anchor_fades():
    own: dict[str, Any] = {"prior_scale": 2.0, "centring": 0.1, "anchor_fade": 0.5}
    config = dataclasses.replace(SMALL, steps=1, weight_decay=0.0, **own)
    state = dataclasses.replace(moved(initial()), prior_scale=2.0)
    pair = np.broadcast_to(normal(1, D), (4, 2, D))
    each = np.array(
        [
            reward_by_hand(head_of(state.heads, k), pair[0, 0])
            + 2 * reward_by_hand(head_of(state.anchor, (k + 1) % 3), pair[0, 0])
            for k in range(3)
        ]
    )
    np.testing.assert_allclose(REWARDS(state, pair)[:, 0, 0], each, rtol=1e-5)
    held = ADD(empty_replay(4, D), pair, np.ones(4, np.float32), np.ones(4, bool))
    learnt, report = UPDATE(state, held, jax.random.key(2), config)
    distance = sum(
        float(np.square(np.asarray(w) - np.asarray(state.anchor[name])).sum()) for name, w in state.heads.items()
    )
    # Both responses are the same: log 2, what centring adds, and lambda / N halved once for every 64 labels.
    expected = np.log(2) + 0.1 * ((2 * each) ** 2).mean() + 0.7 * 0.5 ** (4 / 64) / 4 * distance / 3
    assert float(report["loss"]) == pytest.approx(expected, rel=1e-5)
    assert learnt.prior_scale == 2.0
    assert ensemble.init(config, D, jax.random.key(0)).prior_scale == 2.0


def test_a_checkpoint_gives_the_priors_back_to_those_who_go_on_and_to_those_who_evaluate(tmp_path: Path):
    state = dataclasses.replace(initial(), prior_scale=2.0)
    with checkpoint.open_directory(tmp_path, keep=1) as checkpoints:
        checkpoint.save(checkpoints, 1, {"ensemble": state})
    with checkpoint.open_directory(tmp_path, keep=1) as checkpoints:
        restored = checkpoint.restore(checkpoints, {"ensemble": state})
    _, read = checkpoint.read(tmp_path, {"ensemble": checkpoint.abstract(state)})
    assert restored is not None
    for found in (restored[1]["ensemble"], read["ensemble"]):
        assert found.prior_scale == 2.0
        assert_trees_close(found.anchor, state.anchor, rtol=0)


TWO = EnsembleSettings(num_heads=2, hidden_size=1, anchor_strength=0.0, weight_decay=0.0, steps=1, batch_size=16)


def gradient_and_loss(state: Ensemble, pairs: np.ndarray, config: EnsembleSettings) -> tuple[Params, float]:
    """What Adam is given for N pairs [N, 2, 1] won by the first response, and the loss that is reported."""
    count = len(pairs)
    held = ADD(empty_replay(4, 1), pairs, np.ones(count, np.float32), np.ones(count, bool))
    learnt, report = UPDATE(state, held, jax.random.key(0), config)
    first_moment = optax.tree_utils.tree_get(learnt.opt_state, "mu")
    return jax.tree.map(lambda m: 10 * np.asarray(m), first_moment), float(report["loss"])


def test_the_authors_anchor_averages_over_all_parameters_and_grows_with_the_batch():
    config = dataclasses.replace(TWO, anchor="mean", nll="mean", anchor_strength=0.5)
    state = initial(config, 1)
    # 12 parameters in all, two of them away from their anchors: the mean of the squares is (0.36 + 0.09) / 12 = 0.0375.
    heads = state.heads | {
        "b3": state.heads["b3"].at[0].add(0.6),
        "w1": state.heads["w1"].at[1, 0, 0].add(-0.3),
    }
    state = dataclasses.replace(state, heads=heads)
    # Four pairs of twins, whose likelihood is log 2 whatever the heads say: lambda batch / N = 0.5 * 16 / 4 = 2.
    gradient, loss = gradient_and_loss(state, np.ones((4, 2, 1), np.float32), config)
    assert loss == pytest.approx(0.693147 + 2 * 0.0375, abs=1e-6)
    expected = jax.tree.map(lambda w: np.zeros(w.shape), state.heads)
    expected["b3"][0] = 2 * 2 * 0.6 / 12
    expected["w1"][1, 0, 0] = -2 * 2 * 0.3 / 12
    assert_trees_close(gradient, expected, atol=1e-6)


@pytest.mark.parametrize(
    ("nll", "anchor_strength", "weight_decay", "expected", "loss"),
    [
        # Logits 2 and -1 of a pair won by the first: losses 0.126928 and 1.313262, slopes -sigmoid(-2) and -sigmoid(1).
        ("sum", 0.0, 0.0, (-0.119203, -0.731059), 0.720095),
        ("mean", 0.0, 0.0, (-0.059601, -0.365529), 0.720095),
        # Weight decay 0.02 * (2, -1), and the pull 2 * 0.7 / 1 * (0.5, 0.25) to the anchors, are the same either way.
        ("sum", 0.7, 0.02, (-0.119203 + 0.04 + 0.7, -0.731059 - 0.02 + 0.35), 0.720095 + 0.7 * (0.25 + 0.0625) / 2),
        ("mean", 0.7, 0.02, (-0.059601 + 0.04 + 0.7, -0.365529 - 0.02 + 0.35), 0.720095 + 0.7 * (0.25 + 0.0625)),
    ],
)
def test_the_likelihood_is_summed_over_heads_or_averaged(nll, anchor_strength, weight_decay, expected, loss):
    config = dataclasses.replace(TWO, nll=nll, anchor_strength=anchor_strength, weight_decay=weight_decay)
    state = initial(config, 1)
    ones, zeros = (jax.tree.map(like, state.heads) for like in (jnp.ones_like, jnp.zeros_like))
    heads = zeros | {"w1": ones["w1"], "w2": ones["w2"], "w3": jnp.array([[2.0], [-1.0]])}
    anchor = heads | {"w3": jnp.array([[1.5], [-1.25]])}
    state = dataclasses.replace(state, heads=heads, anchor=anchor)
    gradient, reported = gradient_and_loss(state, np.array([[[1.0], [0.0]]], np.float32), config)
    np.testing.assert_allclose(gradient["w3"][:, 0], expected, atol=2e-6)
    assert reported == pytest.approx(loss, abs=2e-6)


def test_an_empty_replay_changes_nothing():
    state = moved(initial())
    learnt, _ = UPDATE(state, empty_replay(8, D), jax.random.key(1), SMALL)
    jax.tree.map(np.testing.assert_array_equal, learnt, state)


def test_heads_together_are_heads_one_by_one():
    state, held = moved(initial()), replay([1.0, 0.0, 0.3, 1.0] * 2)
    config = dataclasses.replace(SMALL, batch_size=3)
    together, report = UPDATE(state, held, jax.random.key(2), config)
    alone_config = dataclasses.replace(config, num_heads=1)
    losses = []
    for k in range(3):
        heads, anchor, learnt = (
            jax.tree.map(lambda leaf, k=k: np.asarray(leaf)[k : k + 1], tree)
            for tree in (state.heads, state.anchor, together.heads)
        )
        own = dataclasses.replace(state, heads=heads, anchor=anchor, opt_state=ensemble.optimizer(config).init(heads))
        alone, alone_report = UPDATE(own, held, jax.random.key(2), alone_config)
        losses.append(float(alone_report["loss"]))
        assert_trees_close(alone.heads, learnt, rtol=1e-4, atol=1e-5)
    assert float(report["loss"]) == pytest.approx(np.mean(losses), rel=1e-5)


def test_batches_follow_the_key():
    state, held = initial(), replay([1.0, 0.0, 0.3, 1.0] * 2)
    config = dataclasses.replace(SMALL, batch_size=3)
    one, again, other = (UPDATE(state, held, jax.random.key(seed), config)[0].heads["w1"] for seed in (1, 1, 2))
    np.testing.assert_array_equal(one, again)
    assert not np.allclose(one, other, atol=1e-4)


def test_a_simple_preference_is_learnt():
    config = dataclasses.replace(SMALL, learning_rate=5e-3, weight_decay=5e-5, anchor_strength=0.5, steps=100)
    taste = np.array([1.0, -2.0, 0.5, 0.0, 1.0])
    features = np.random.default_rng(0).normal(size=(160, 2, D)).astype(np.float32)
    labels = (features[:, 0] @ taste > features[:, 1] @ taste).astype(np.float32)
    held = ADD(empty_replay(64, D), features[:64], labels[:64], np.ones(64, bool))
    state = initial()
    for index in range(4):
        state, report = UPDATE(state, held, jax.random.key(index), config)
    assert float(report["accuracy"]) > 0.95
    first, second = np.moveaxis(np.asarray(REWARDS(state, features[64:])).mean(0), -1, 0)
    agrees = np.mean((first > second) == (labels[64:] > 0.5))
    assert agrees > 0.85
