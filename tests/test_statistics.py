"""Intervals, differences by seed, curves over labels, and win rates at equal length, on numbers worked out by hand."""

import math

import numpy as np
import pytest

from sea_jax import statistics
from sea_jax.statistics import (
    at_equal_length,
    length_controlled_win_rates,
    similar_length_win_rate,
)


def repeated(*cases: tuple[float, float, int]) -> tuple[np.ndarray, np.ndarray]:
    """Wins [1, N] and length differences [1, N] of cases (win, difference, how often)."""
    wins = np.concatenate([np.full(count, win, float) for win, _, count in cases])
    differences = np.concatenate([np.full(count, difference) for _, difference, count in cases])
    return wins[None], differences[None]


def test_what_length_won_is_taken_off() -> None:
    # The longer ones win 9 of 10, the shorter ones 4 of 10, and all differ by as much. The logits are log 9 and log 2/3, so
    # theta is their mean, log(6) / 2, and sigmoid(theta) = sqrt(6) / (1 + sqrt(6)); the plain rate is 0.65 whatever differs.
    (rate,) = length_controlled_win_rates(*repeated((1, 30, 90), (0, 30, 10), (1, -30, 40), (0, -30, 60)))
    assert rate.mean == pytest.approx(math.sqrt(6) / (1 + math.sqrt(6)), abs=1e-4)
    assert (rate.count, rate.low < rate.mean < rate.high) == (200, True)
    # A policy that is only longer, three times as often: 0.775 is what it wins, 0.5 is what it is worth.
    longer = repeated((1, 30, 135), (0, 30, 15), (1, -30, 5), (0, -30, 45))
    assert longer[0].mean() == 0.7
    (rate,) = length_controlled_win_rates(*longer)
    assert rate.mean == pytest.approx(0.5, abs=0.15)
    assert rate.mean < 0.65


def test_a_symmetric_advantage_of_length_is_worth_nothing() -> None:
    (rate,) = length_controlled_win_rates(*repeated((1, 5, 80), (0, 5, 20), (1, -5, 20), (0, -5, 80)))
    assert rate.mean == pytest.approx(0.5, abs=1e-6)


def test_without_differences_in_length_it_is_the_plain_rate() -> None:
    (rate,) = length_controlled_win_rates(*repeated((1, 0, 60), (0.5, 0, 20), (0, 0, 20)))
    assert rate.mean == pytest.approx(0.7, abs=1e-4)
    # sqrt(p (1 - p) / N) by the delta method.
    assert rate.high - rate.low == pytest.approx(2 * 1.959964 * math.sqrt(0.7 * 0.3 / 100), rel=1e-3)


def test_who_wins_everywhere_has_a_finite_rate_and_missing_wins_are_left_out() -> None:
    wins, differences = repeated((1, 4, 30), (1, -4, 30), (0, 4, 5))
    wins[0, 60:] = np.nan
    (rate,) = length_controlled_win_rates(wins, differences)
    assert 0.98 < rate.mean <= 1
    assert rate.count == 60


def test_the_difficulty_of_an_instruction_is_learnt_from_the_other_models() -> None:
    # Every model wins the first half of the prompts and loses the others, but for one prompt in five; the third one's
    # responses are longer where they win by difficulty alone. Length is credited with that until the others are seen.
    draw = np.random.default_rng(0)
    easy = np.arange(100) < 50
    wins = np.stack([np.where(draw.random(100) < 0.2, ~easy, easy) for _ in range(8)]).astype(float)
    differences = draw.normal(size=(8, 100)) * 10
    differences[0] = np.where(easy, 12, -3) + draw.normal(size=100)
    alone = length_controlled_win_rates(wins[:1], differences[:1])[0]
    together = length_controlled_win_rates(wins, differences)[0]
    plain = wins[0].mean()
    assert abs(together.mean - plain) < abs(alone.mean - plain)
    assert together.high - together.low < 1


@pytest.mark.parametrize(
    ("wins", "differences", "message"),
    [
        (np.zeros((1, 3)), np.zeros((1, 2)), r"found shapes \(1, 3\) and \(1, 2\)"),
        (np.full((2, 2), np.nan), np.zeros((2, 2)), "no known win"),
    ],
)
def test_what_cannot_be_fitted_is_refused(wins: np.ndarray, differences: np.ndarray, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        length_controlled_win_rates(wins, differences)


def test_pairs_within_a_tenth_of_the_longer_one() -> None:
    lengths = np.array([[100, 90], [90, 100], [100, 89], [50, 50], [10, 100]])
    found = similar_length_win_rate([1, 0.5, 0, 1, 0], lengths)
    assert found is not None
    assert (found.mean, found.count) == (2.5 / 3, 3)
    assert similar_length_win_rate([1], np.array([[10, 20]])) is None


def test_lengths_are_those_of_the_texts_in_characters() -> None:
    opponents = ["abcdefghij"] * 4
    few = (np.array([0.9, 0.1]), ["abcdefghij", "abcdefghi"])
    many = (np.array([0.9, 0.1, 0.5, np.nan]), ["a", "abcdefghi", "abcdefghij", "abcdefghij"])
    first, second = at_equal_length([few, many], opponents)
    assert first.similar is not None
    assert second.similar is not None
    assert (first.similar.mean, first.similar.count, first.controlled.count) == (0.5, 2, 2)
    assert (second.similar.mean, second.similar.count, second.controlled.count) == (0.25, 2, 3)


def test_paired_differences_lose_what_the_seeds_have_in_common():
    interval = statistics.paired([0.5, 0.7, 0.9], [0.4, 0.5, 0.8])
    assert interval.mean == pytest.approx(0.4 / 3)
    assert interval.high - interval.mean == pytest.approx(4.302653 * 0.0577350 / 3**0.5, rel=1e-5)
    with pytest.raises(ValueError, match="the same seeds"):
        statistics.paired([0.5], [0.4, 0.5])


def test_a_label_curve_is_found_again_and_read_both_ways():
    labels = np.array([64.0, 128, 256, 512])
    curve = statistics.fit_label_curve(labels, 1 - 0.5 * (labels / 32) ** -0.5)
    assert (curve.height, curve.exponent) == (pytest.approx(0.5 * math.log(32)), pytest.approx(0.5))
    assert curve.win_rate(128) == pytest.approx(0.75)
    assert curve.labels(0.75) == pytest.approx(128)
    with pytest.raises(ValueError, match="below 1"):
        statistics.fit_label_curve(labels, np.ones(4))


def test_the_gain_is_how_many_more_labels_the_baseline_needs():
    labels = np.array([64.0, 128, 256, 512])
    baseline = np.tile(1 - 0.5 * (labels / 32) ** -0.5, (4, 1))
    method = np.tile(1 - 0.5 * (labels / 8) ** -0.5, (4, 1))  # what the baseline has at 4 n
    gain = statistics.label_gain(labels, method, baseline, 256)
    assert (gain.mean, gain.low, gain.high) == (pytest.approx(4), pytest.approx(4), pytest.approx(4))


def test_a_curve_that_is_as_good_as_flat_has_a_gain_too():
    labels = np.array([64.0, 128, 256, 512])
    baseline = np.tile(1 - 0.5 * (labels / 32) ** -0.5, (2, 1))
    # Almost nothing is won with more labels, or almost nothing lost: (n / a)^-b with an a beyond every number.
    nearly_flat = np.stack([0.55 + sign * 1e-6 * np.log(labels) for sign in (1, -1)])
    gain = statistics.label_gain(labels, nearly_flat, baseline, 256)
    assert gain.high == pytest.approx(32 / (2 * 0.45) ** 2 / 256, rel=1e-3)
    gain = statistics.label_gain(labels, baseline, nearly_flat, 256)
    assert (gain.low > 1e9, gain.high) == (True, math.inf)


def test_labels_to_reach_a_win_rate_lie_between_two_points_or_nowhere():
    labels, rates = np.array([0.0, 100, 200]), np.array([0.5, 0.6, 0.8])
    assert statistics.labels_to_reach(labels, rates, 0.7) == pytest.approx(150)
    assert statistics.labels_to_reach(labels, rates, 0.9) == math.inf
