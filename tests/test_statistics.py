"""Means with their intervals, differences by seed, and curves of win rates over labels."""

import math

import numpy as np
import pytest

from sea_jax import statistics


def test_paired_differences_lose_what_the_seeds_have_in_common():
    interval = statistics.paired([0.5, 0.7, 0.9], [0.4, 0.5, 0.8])
    assert interval.mean == pytest.approx(0.4 / 3)
    assert interval.high - interval.mean == pytest.approx(4.302653 * 0.0577350 / 3**0.5, rel=1e-5)
    with pytest.raises(ValueError, match="the same seeds"):
        statistics.paired([0.5], [0.4, 0.5])


def test_a_label_curve_is_found_again_and_read_both_ways():
    labels = np.array([64.0, 128, 256, 512])
    curve = statistics.fit_label_curve(labels, 1 - 0.5 * (labels / 32) ** -0.5)
    assert (curve.scale, curve.exponent) == (pytest.approx(32), pytest.approx(0.5))
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


def test_labels_to_reach_a_win_rate_lie_between_two_points_or_nowhere():
    labels, rates = np.array([0.0, 100, 200]), np.array([0.5, 0.6, 0.8])
    assert statistics.labels_to_reach(labels, rates, 0.7) == pytest.approx(150)
    assert statistics.labels_to_reach(labels, rates, 0.9) == math.inf
