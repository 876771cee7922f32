import itertools
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import special, stats

from sea_jax import sampling
from sea_jax.types import Duel

JITTED = {name: jax.jit(rule) for name, rule in sampling.RULES.items()}
K, B, M = 4, 3, 5


def all_distinct(num_prompts: int, num_candidates: int) -> np.ndarray:
    """No two candidates share their text."""
    return np.broadcast_to(~np.eye(num_candidates, dtype=bool), (num_prompts, num_candidates, num_candidates))


def by_group(groups: np.ndarray) -> np.ndarray:
    """Candidates [B, M] of the same number share their text."""
    return groups[:, :, None] != groups[:, None, :]


def for_prompts(heads: Any, num_prompts: int) -> np.ndarray:
    """The same rewards [K, M] for every prompt, [K, B, M]."""
    heads = np.array(heads, np.float32)[:, None]
    return np.broadcast_to(heads, (len(heads), num_prompts, heads.shape[-1]))


def random_rewards(seed: int, num_prompts: int = 40) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 3, (K, num_prompts, M)).astype(np.float32)


@pytest.mark.parametrize("name", sampling.RULES)
@given(
    rewards=hnp.arrays(np.float32, (K, B, M), elements=st.integers(-2, 2).map(float)),
    groups=hnp.arrays(np.int32, (B, M), elements=st.integers(0, 2)),
    seed=st.integers(0, 2**31 - 1),
)
def test_the_texts_of_a_duel_differ_wherever_there_are_two(name, rewards, groups, seed):
    duel = JITTED[name](rewards, by_group(groups), jax.random.key(seed))
    first, second = np.asarray(duel.first), np.asarray(duel.second)
    assert first.dtype == second.dtype == np.int32
    assert first.shape == second.shape == (B,)
    assert ((first >= 0) & (first < M) & (second >= 0) & (second < M)).all()
    for row, (i, j) in enumerate(zip(first, second, strict=True)):
        if len(set(groups[row])) > 1:
            assert groups[row, i] != groups[row, j]


def test_passive_takes_the_first_samples_that_differ():
    groups = np.array([[0, 1, 2, 3], [0, 0, 2, 3], [0, 0, 0, 3]])
    duel = JITTED["passive"](np.zeros((2, 3, 4), np.float32), by_group(groups), jax.random.key(0))
    np.testing.assert_array_equal(duel.first, [0, 0, 0])
    np.testing.assert_array_equal(duel.second, [1, 2, 3])


@pytest.mark.parametrize("name", ["ee_ts", "bai_ts", "bai_ts_logits", "max_margin"])
def test_every_prompt_draws_a_head_of_its_own_uniformly(name):
    num_prompts = 400
    duel = JITTED[name](for_prompts(np.eye(4), num_prompts), all_distinct(num_prompts, 4), jax.random.key(0))
    counts = np.bincount(duel.first, minlength=4)  # head k likes candidate k alone
    assert stats.chisquare(counts).pvalue > 0.01


def over_keys(name: str, rewards: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """First and second responses [count, B] of so many calls, no two candidates alike."""
    rule = jax.vmap(sampling.RULES[name], in_axes=(None, None, 0))
    duels = jax.jit(rule)(rewards, all_distinct(*rewards.shape[1:]), jax.random.split(jax.random.key(0), count))
    return np.asarray(duels.first), np.asarray(duels.second)


@pytest.mark.parametrize("name", ["ee_ts_oat", "bai_ts_oat"])
def test_the_authors_rules_draw_one_head_per_call_uniformly(name):
    first, _ = over_keys(name, for_prompts(np.eye(4), 3), 400)  # head k likes candidate k alone
    assert (first == first[:, :1]).all()
    assert stats.chisquare(np.bincount(first[:, 0], minlength=4)).pvalue > 0.01


def test_ee_ts_oat_takes_the_heads_in_one_order_for_all_prompts():
    # Prompt 0: head k likes candidate k alone. Prompt 1: heads 0 to 2 like candidate 0, head 3 candidate 1.
    # Prompt 2: all like candidate 0 best and the one that prompt 0 names after them (0 after head 3) next.
    agreed = np.array([[9, 5, 0, 0], [9, 0, 5, 0], [9, 0, 0, 5], [9, 5, 0, 0]])
    rewards = np.stack([np.eye(4), np.eye(4)[[0, 0, 0, 1]], agreed], axis=1).astype(np.float32)
    first, second = over_keys("ee_ts_oat", rewards, 600)
    pairs = np.bincount(first[:, 0] * 4 + second[:, 0], minlength=16).reshape(4, 4)
    assert (np.diag(pairs) == 0).all()
    assert stats.chisquare(pairs[~np.eye(4, dtype=bool)]).pvalue > 0.01
    np.testing.assert_array_equal(first[:, 1], first[:, 0] == 3)
    np.testing.assert_array_equal(second[:, 1], first[:, 0] != 3)
    np.testing.assert_array_equal(first[:, 2], 0)
    np.testing.assert_array_equal(second[:, 2], np.array([1, 2, 3, 1])[first[:, 0]])


def test_ee_ts_draws_the_second_head_uniformly_among_those_that_differ():
    num_prompts = 1200
    duel = JITTED["ee_ts"](for_prompts(np.eye(4), num_prompts), all_distinct(num_prompts, 4), jax.random.key(1))
    pairs = np.asarray(duel.first) * 4 + np.asarray(duel.second)
    counts = np.bincount(pairs, minlength=16).reshape(4, 4)
    assert (np.diag(counts) == 0).all()
    assert stats.chisquare(counts[~np.eye(4, dtype=bool)]).pvalue > 0.01


def test_ee_ts_draws_again_until_the_response_differs():
    num_prompts = 300
    rewards = for_prompts(np.eye(4)[[0, 0, 0, 1]], num_prompts)  # three of four heads like candidate 0
    duel = JITTED["ee_ts"](rewards, all_distinct(num_prompts, 4), jax.random.key(0))
    np.testing.assert_array_equal(duel.second, 1 - np.asarray(duel.first))
    assert 0.18 < np.mean(np.asarray(duel.first) == 1) < 0.32  # one quarter


def test_ee_ts_falls_back_to_the_drawn_head_when_all_agree():
    num_prompts = 200
    # Both heads like candidate 0 best and its twin 3 next; they differ in what comes third: 1 or 2.
    rewards = for_prompts([[3, 1, 0, 2], [3, 0, 1, 2]], num_prompts)
    distinct = by_group(np.broadcast_to([0, 1, 2, 0], (num_prompts, 4)))
    duel = JITTED["ee_ts"](rewards, distinct, jax.random.key(0))
    np.testing.assert_array_equal(duel.first, 0)
    counts = np.bincount(duel.second, minlength=4)
    assert counts[0] == counts[3] == 0
    assert stats.chisquare(counts[1:3]).pvalue > 0.01


VIEWS = {"preference": special.expit, "logit": lambda margin: margin}


@pytest.mark.parametrize(
    ("name", "own", "other"),
    [
        ("bai_ts", "preference", "logit"),
        ("bai_ts_logits", "logit", "preference"),
        ("bai_ts_oat", "logit", "preference"),
    ],
)
def test_bai_ts_takes_the_largest_variance_of_the_preference_or_of_the_logit(name, own, other):
    rewards, distinct = random_rewards(0), all_distinct(40, M)
    duel = JITTED[name](rewards, distinct, jax.random.key(3))
    numbers, other_choice = np.asarray(rewards, np.float64), []
    for row, (first, second) in enumerate(zip(np.asarray(duel.first), np.asarray(duel.second), strict=True)):
        assert first in numbers[:, row].argmax(-1)
        margin = numbers[:, row, first, None] - numbers[:, row]  # [K, M]
        assert second == VIEWS[own](margin).var(0).argmax()
        other_choice.append(VIEWS[other](margin).var(0).argmax())
    # The two differ: the variance of the logits does not mind that preferences saturate.
    assert (np.array(other_choice) != np.asarray(duel.second)).any()


def test_uncertainty_takes_the_pair_with_the_largest_variance_of_the_margin():
    rewards = random_rewards(1)
    groups = np.random.default_rng(0).integers(0, 3, (40, M))
    groups[:, 0] = 9  # at least two texts
    duel = JITTED["uncertainty"](rewards, by_group(groups), jax.random.key(0))
    numbers = np.asarray(rewards, np.float64)

    def dispute(row: int, pair: tuple[int, int]) -> float:
        return (numbers[:, row, pair[0]] - numbers[:, row, pair[1]]).var()

    for row in range(40):
        pairs = [(i, j) for i, j in itertools.combinations(range(M), 2) if groups[row, i] != groups[row, j]]
        assert {int(duel.first[row]), int(duel.second[row])} == set(max(pairs, key=partial(dispute, row)))


# Three responses under two heads: means 2, 1, 0; standard deviations 0, 1, 0.5.
THREE = np.array([[[2.0, 2.0, 0.5]], [[2.0, 0.0, -0.5]]], np.float32)


@pytest.mark.parametrize(
    ("name", "width", "pair"),
    [
        ("delta_ucb", 0.5, (0, 2)),  # 2 + .25; 1 over 2: 1.5 + .25; 0 over 1: 2 - .5
        ("delta_ucb", 2.0, (1, 2)),  # 3 + 1; 0 over 2: 2 + 1; 0 over 1: 2 + 1
        # sigmoid(U - L') - sigmoid(L - U'): 0, 1: .881 - .5; 0, 2: .924 - .818; 1, 2: .924 - .378.
        ("infomax_intervals", 1.0, (1, 2)),
        # m - m' - (s + s'): 0 over 1: 0, over 2: 1.5; 1 over 0: -2, over 2: -.5; 2 over 0: -2.5, over 1: -2.5.
        ("max_min_lcb", 1.0, (0, 1)),
        # Wider: 0 over 1: -2, over 2: .5; 1 over 0: -4; 2 over 1: -5.5.
        ("max_min_lcb", 3.0, (0, 1)),
        # Labels .5 and .881 for 0, 1; .818 and .924 for 0, 2; .818 and .622 for 1, 2.
        ("infomax", None, (0, 1)),
        # Of labels .5 and .881; those of the other pairs differ less.
        ("entropy_epistemic", None, (0, 1)),
        ("max_uncertainty", None, (0, 1)),  # logits 0 and 2, against 1.5 and 2.5
    ],
)
def test_pairs_by_hand(name, width, pair):
    duel = sampling.build(name, width)(THREE, all_distinct(1, 3), jax.random.key(0))
    assert tuple(sorted((int(duel.first[0]), int(duel.second[0])))) == tuple(sorted(pair))
    if name in ("delta_ucb", "max_min_lcb"):
        assert int(duel.first[0]) == pair[0]


def test_infomax_minds_that_preferences_saturate():
    # Logits 8 +- 3 of 0 over 2 vary most, but both say 1; those of 1 over 2, 0 +- 1, leave it open.
    rewards = np.array([[[11.0, 1.0, 0.0]], [[5.0, -1.0, 0.0]]], np.float32)
    duel = JITTED["infomax"](rewards, all_distinct(1, 3), jax.random.key(0))
    assert {int(duel.first[0]), int(duel.second[0])} == {1, 2}
    duel = JITTED["uncertainty"](rewards, all_distinct(1, 3), jax.random.key(0))
    assert {int(duel.first[0]), int(duel.second[0])} == {0, 2}


def test_entropy_epistemic_is_mutual_information_and_no_variance():
    # Labels .5 +- .2 (0 over 1) tell .0823 nats of the head, .8 +- .1999 (2 over 1) .1634, at the same variance.
    def logit(p: float) -> float:
        return float(np.log(p / (1 - p)))

    rewards = np.array([[[logit(0.7), 0.0, logit(0.9999)]], [[logit(0.3), 0.0, logit(0.6001)]]], np.float32)
    distinct = all_distinct(1, 3).copy()
    distinct[:, 0, 2] = distinct[:, 2, 0] = False  # the two pairs with response 1 are compared
    duel = JITTED["entropy_epistemic"](rewards, distinct, jax.random.key(0))
    assert {int(duel.first[0]), int(duel.second[0])} == {1, 2}
    duel = JITTED["infomax"](rewards, distinct, jax.random.key(0))
    assert {int(duel.first[0]), int(duel.second[0])} == {0, 1}


def test_the_draws_of_dts_and_drts_are_uniform_over_the_intervals():
    # Means 1 and 0 of heads +-1 around them, so that s = 1: 1 + u < v for u, v uniform in (-1, 1) is the triangle of 1/8.
    num_prompts = 2000
    rewards = for_prompts([[2.0, 1.0], [0.0, -1.0]], num_prompts)
    first = {
        name: np.asarray(JITTED[name](rewards, all_distinct(num_prompts, 2), jax.random.key(0)).first)
        for name in ("dts", "drts")
    }
    for drawn in first.values():
        assert stats.binomtest(int((drawn == 1).sum()), num_prompts, 1 / 8).pvalue > 0.01


def test_dts_has_two_good_responses_meet_and_drts_the_best_and_the_worst():
    rewards = for_prompts([[9.1, 8.1, 0.0], [8.9, 7.9, -0.1]], 50)  # no intervals overlap
    for name, pair in (("dts", (0, 1)), ("drts", (0, 2))):
        duel = JITTED[name](rewards, all_distinct(50, 3), jax.random.key(0))
        np.testing.assert_array_equal(duel.first, pair[0])
        np.testing.assert_array_equal(duel.second, pair[1])


def test_ucb_takes_a_random_opponent():
    # Upper ends at width 1: 2, 2.5, 1, 0; at width .4: 2, 1.6, ...
    rewards = for_prompts([[2.0, 2.5, 1.0, 0.0], [2.0, -0.5, 1.0, 0.0]], 300)
    duel = JITTED["ucb"](rewards, all_distinct(300, 4), jax.random.key(0))
    np.testing.assert_array_equal(duel.first, 1)
    assert stats.chisquare(np.bincount(duel.second, minlength=4)[[0, 2, 3]]).pvalue > 0.01
    narrow = sampling.build("ucb", 0.4)(rewards, all_distinct(300, 4), jax.random.key(0))
    np.testing.assert_array_equal(narrow.first, 0)


def test_a_rule_without_intervals_takes_no_width():
    with pytest.raises(
        ValueError, match=r"^config\.exploration\.width=2\.0: the rule 'bai_ts' has no intervals; .*dts, drts"
    ):
        sampling.build("bai_ts", 2.0)


def test_max_margin_is_the_best_against_the_worst_of_one_head():
    rewards = random_rewards(2)
    duel = JITTED["max_margin"](rewards, all_distinct(40, M), jax.random.key(0))
    best, worst = rewards.argmax(-1), rewards.argmin(-1)  # [K, B]
    same_head = (best == np.asarray(duel.first)) & (worst == np.asarray(duel.second))
    assert same_head.any(0).all()


def test_max_margin_passes_over_twins():
    # The best (0) and the worst (1) share their text: what is left is 0 against 2 (margin 4) or 2 against 1 (margin 6).
    rewards = np.array([[[10.0, 0.0, 6.0]]], np.float32)
    duel = JITTED["max_margin"](rewards, by_group(np.array([[5, 5, 7]])), jax.random.key(0))
    assert (int(duel.first[0]), int(duel.second[0])) == (2, 1)


def test_best_against_worst_follows_the_mean():
    # Means 1, 2, 0.5; head 0 alone would say 0 against 2, head 1 alone 1 against 0.
    rewards = np.array([[[2.0, 1.0, 0.0]], [[0.0, 3.0, 1.0]]], np.float32)
    duel = JITTED["best_against_worst"](rewards, all_distinct(1, 3), jax.random.key(0))
    assert (int(duel.first[0]), int(duel.second[0])) == (1, 2)


def test_best_of_n_follows_the_mean():
    # Head 0 likes candidate 0 by far, but the mean is 2.5, 3, 1; the second prompt is the other way round.
    rewards = jnp.array([[[5.0, 3.0, 1.0], [1.0, 0.0, 0.0]], [[0.0, 3.0, 1.0], [1.0, 0.0, 0.0]]])
    best = sampling.best_of_n(rewards)
    assert best.dtype == jnp.int32
    np.testing.assert_array_equal(best, [1, 0])


def test_duel_rewards():
    rewards = random_rewards(3, B)
    duel = Duel(first=jnp.array([0, 4, 2], jnp.int32), second=jnp.array([1, 0, 2], jnp.int32))
    first, second = (np.asarray(side) for side in sampling.duel_rewards(jnp.asarray(rewards), duel))
    for k, b in itertools.product(range(K), range(B)):
        assert first[k, b] == rewards[k, b, [0, 4, 2][b]]
        assert second[k, b] == rewards[k, b, [1, 0, 2][b]]


def test_head_label_is_one_head_per_prompt():
    num_prompts = 300
    # One of four heads prefers the second response; all tie in the last prompt.
    rewards = for_prompts([[1.0, 0.0], [2.0, 0.0], [1.0, 0.5], [0.0, 3.0]], num_prompts).copy()
    rewards[:, -1] = 0.0
    duel = Duel(first=jnp.zeros(num_prompts, jnp.int32), second=jnp.ones(num_prompts, jnp.int32))
    labels = np.asarray(jax.jit(sampling.head_label)(rewards, duel, jax.random.key(0)))
    assert labels[-1] == 0.5
    assert set(labels[:-1]) == {0.0, 1.0}
    assert stats.binomtest(int(labels[:-1].sum()), num_prompts - 1, 0.75).pvalue > 0.01


def test_mean_label_is_the_mean_probability():
    # Margins 0 and log 3: (0.5 + 0.75) / 2 = 0.625, where the probability of the mean margin would be 0.634.
    rewards = jnp.array([[[1.0, 1.0]], [[np.log(3.0), 0.0]]])
    duel = Duel(first=jnp.array([0], jnp.int32), second=jnp.array([1], jnp.int32))
    np.testing.assert_allclose(sampling.mean_label(rewards, duel), [0.625], rtol=1e-6)
    np.testing.assert_allclose(sampling.mean_label(rewards, Duel(duel.second, duel.first)), [0.375], rtol=1e-6)
