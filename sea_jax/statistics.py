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
