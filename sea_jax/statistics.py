"""Means with their intervals: over prompts, and over seeds."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Real
from scipy import special

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Interval:
    """A mean with its two-sided 95% confidence bounds.

    Args:
      mean: the estimate.
      low: NaN when the values do not determine one, as `high`.
      high: upper bound.
      count: how many values the estimate comes from.
    """

    mean: float
    low: float
    high: float
    count: int


def win_rate(wins: Sequence[float] | Real[np.ndarray, " N"]) -> Interval:
    """Share of N prompts won, a tie counting half, with the Wilson score interval over prompts.

    Wilson (1927), https://doi.org/10.1080/01621459.1927.10502953; a tie enters as half a success, which makes the
    interval a little too wide.

    Args:
      wins: 1 where the response won, 0 where it lost, 0.5 for a tie.

    Raises:
      ValueError: wins is empty, not one-dimensional, or holds another value.
    """
    values = np.asarray(wins, np.float64)
    if values.ndim != 1 or values.size == 0:
        raise ValueError(f"wins must be a non-empty sequence of 0, 0.5 and 1, found shape {values.shape}")
    if strange := sorted(set(values.tolist()) - {0.0, 0.5, 1.0}):
        raise ValueError(f"wins must hold only 0, 0.5 and 1, found {strange[:3]}")
    count = values.size
    mean = float(values.mean())
    z = float(special.ndtri((1 + CONFIDENCE) / 2))
    shrink = 1 + z**2 / count
    center = (mean + z**2 / (2 * count)) / shrink
    half_width = z * math.sqrt(mean * (1 - mean) / count + z**2 / (4 * count**2)) / shrink
    # Rounding may put a bound 1e-17 outside [0, 1], or on the wrong side of a mean of 0 or 1.
    return Interval(mean, max(0.0, min(mean, center - half_width)), min(1.0, max(mean, center + half_width)), count)


def over_seeds(values: Sequence[float] | Real[np.ndarray, " N"]) -> Interval:
    """Mean of one finite number per seed with the Student-t interval over the N seeds.

    Student (1908), https://doi.org/10.1093/biomet/6.1.1. The bounds are NaN for a single seed, which tells nothing of the
    spread.

    Raises:
      ValueError: values is empty, not one-dimensional, or holds a number that is not finite.
    """
    numbers = np.asarray(values, np.float64)
    if numbers.ndim != 1 or numbers.size == 0 or not np.isfinite(numbers).all():
        raise ValueError(f"values must be one finite number per seed, found {numbers.tolist()}")
    count = numbers.size
    mean = float(numbers.mean())
    if count == 1:
        return Interval(mean, math.nan, math.nan, 1)
    quantile = float(special.stdtrit(count - 1, (1 + CONFIDENCE) / 2))
    half_width = quantile * float(numbers.std(ddof=1)) / math.sqrt(count)
    return Interval(mean, mean - half_width, mean + half_width, count)


Rates = Real[np.ndarray, "S Q"]  # win rates of S seeds at Q numbers of queries
RESAMPLES = 1000


def paired(
    values: Sequence[float] | Real[np.ndarray, " N"], baseline: Sequence[float] | Real[np.ndarray, " N"]
) -> Interval:
    """Mean difference of two methods that share their N seeds, as `over_seeds`: what the seeds have in common falls out.

    Raises:
      ValueError: they are not of one length, or as in `over_seeds`.
    """
    ours, theirs = np.asarray(values, np.float64), np.asarray(baseline, np.float64)
    if ours.shape != theirs.shape:
        raise ValueError(f"paired values must be one per seed, the same seeds; found {ours.shape} and {theirs.shape}")
    return over_seeds(ours - theirs)


@dataclass(frozen=True)
class LabelCurve:
    """A win rate against the starting policy as a function of the labels n: w(n) = 1 - (n / scale)^-exponent / 2.

    The form in which "Efficient Exploration at Scale" (https://arxiv.org/abs/2603.17378) compares methods.

    Args:
      scale: labels at which w is one half, as the curve is continued.
      exponent: how fast what is still lost goes; below 0 for a policy that becomes worse.
    """

    scale: float
    exponent: float

    def win_rate(self, labels: float) -> float:
        """Returns w(n)."""
        return float(1 - 0.5 * (labels / self.scale) ** -self.exponent)

    def labels(self, win_rate: float) -> float:
        """Returns the n at which w(n) is a win rate; infinity where the curve does not rise."""
        return float(self.scale * (2 * (1 - win_rate)) ** (-1 / self.exponent)) if self.exponent > 0 else math.inf


def fit_label_curve(labels: Sequence[float] | Real[np.ndarray, " Q"], rates: Real[np.ndarray, " Q"]) -> LabelCurve:
    """Fits a `LabelCurve` by least squares of ln(2 (1 - w)) on ln n.

    Args:
      labels: above 0, two or more different ones.
      rates: below 1.

    Raises:
      ValueError: they are not.
    """
    counts, known = np.asarray(labels, np.float64), np.asarray(rates, np.float64)
    if counts.shape != known.shape or len(np.unique(counts)) < 2 or (counts <= 0).any() or not (known < 1).all():
        raise ValueError(
            f"a curve is fitted to win rates below 1 at two or more numbers of labels above 0; found {known.tolist()} at "
            f"{counts.tolist()}"
        )
    slope, height = np.polyfit(np.log(counts), np.log(2 * (1 - known)), 1)
    return LabelCurve(scale=float(np.exp(-height / slope)), exponent=float(-slope))


def label_gain(labels: Sequence[float] | Real[np.ndarray, " Q"], method: Rates, baseline: Rates, at: float) -> Interval:
    """How many times as many labels the baseline needs for the win rate that a method has at a number of labels.

    Both by their fitted curves of the mean over seeds; the bounds are percentiles over resamples of the seeds, which the
    two share (bootstrap, Efron 1979, https://doi.org/10.1214/aos/1176344552).

    Args:
      labels: at which the win rates are known.
      method: its win rates.
      baseline: the same of the baseline, seed by seed.
      at: labels of the method; fitted curves are compared, so it should lie among `labels`.
    """

    def gain(rows: np.ndarray) -> float:
        ours, theirs = (fit_label_curve(labels, rates[rows].mean(0)) for rates in (method, baseline))
        return theirs.labels(ours.win_rate(at)) / at

    draw = np.random.default_rng(0)
    count = len(method)
    resampled = [gain(draw.integers(0, count, count)) for _ in range(RESAMPLES)]
    low, high = np.quantile(resampled, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return Interval(gain(np.arange(count)), float(low), float(high), count)


def labels_to_reach(
    labels: Sequence[float] | Real[np.ndarray, " Q"], rates: Real[np.ndarray, " Q"], level: float
) -> float:
    """Returns where a curve first reaches a win rate, linear between its points; infinity where it never does."""
    counts, known = np.asarray(labels, np.float64), np.asarray(rates, np.float64)
    reached = np.flatnonzero(known >= level)
    if not len(reached):
        return math.inf
    index = int(reached[0])
    if index == 0:
        return float(counts[0])
    share = (level - known[index - 1]) / (known[index] - known[index - 1])
    return float(counts[index - 1] + share * (counts[index] - counts[index - 1]))
