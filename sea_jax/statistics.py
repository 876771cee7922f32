"""Means with their intervals: over prompts, over seeds, and at equal length."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float64, Real
from scipy import optimize, special

CONFIDENCE = 0.95
SIMILAR_LENGTH = 0.1  # lengths that differ by no more than this share of the longer one are similar
RIDGE = 1e-3  # on the coefficients of a regression, so that they stay finite where one side wins everywhere
DIFFICULTY_RIDGE = 1.0  # on the instructions' difficulties, of which each is seen by few pairs: a standard normal prior


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

    def shown(self) -> str:
        """Returns it as it stands in tables."""
        return f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}]"


@dataclass(frozen=True)
class AtEqualLength:
    """A win rate freed of length in two ways.

    Attributes:
      controlled: what the regression predicts for responses as long as their opponents.
      similar: among the pairs of similar length; None: there are none.
    """

    controlled: Interval
    similar: Interval | None


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


def similar_length_win_rate(
    wins: Sequence[float] | Real[np.ndarray, " N"], lengths: Real[np.ndarray, "N 2"]
) -> Interval | None:
    """Share of prompts won among those whose two responses differ by at most 10% of the longer one; None: there are none.

    Args:
      wins: 1 where the response won, 0 where it lost, 0.5 for a tie.
      lengths: of the response and of its opponent.
    """
    response, opponent = np.asarray(lengths, np.float64).reshape(-1, 2).T
    similar = np.abs(response - opponent) <= SIMILAR_LENGTH * np.maximum(response, opponent)
    return win_rate(np.asarray(wins, np.float64)[similar]) if similar.any() else None


def length_controlled_win_rates(
    wins: Real[np.ndarray, "M N"], length_differences: Real[np.ndarray, "M N"]
) -> list[Interval]:
    """What M models would win over the same opponent on N prompts if their responses were as long as the opponent's.

    Length-controlled AlpacaEval, https://arxiv.org/abs/2404.04475: for each model, a logistic regression of its wins,
    logit P(win) = theta + phi tanh(d / std(d)) + psi gamma, d being how much longer its response is and gamma the
    instruction's difficulty, with the rate predicted at d = 0. The difficulties come from a regression of the other models'
    wins together, with psi = 1; a single model has none. The interval is that of the delta method over prompts.

    Args:
      wins: in [0, 1]; NaN where it is not known who won.
      length_differences: response minus opponent.

    Raises:
      ValueError: the shapes differ, or of some model no win is known.
    """
    won, longer = np.asarray(wins, np.float64), np.asarray(length_differences, np.float64)
    if won.ndim != 2 or won.shape != longer.shape:
        raise ValueError(f"expected two arrays of models and prompts, found shapes {won.shape} and {longer.shape}")
    known = ~np.isnan(won)
    if not known.any(axis=1).all():
        raise ValueError("a model has no known win")
    lengths = np.stack([_standardised_tanh(row, there) for row, there in zip(longer, known, strict=True)])
    rates = []
    for model in range(len(won)):
        others = np.arange(len(won)) != model
        difficulty = _difficulty(won[others], lengths[others], known[others])
        there = known[model]
        design = np.stack([np.ones(there.sum()), lengths[model][there], difficulty[there]], axis=1)
        rates.append(_rate_at_equal_length(design, won[model][there]))
    return rates


def _standardised_tanh(
    difference: Float64[np.ndarray, " N"], known: Bool[np.ndarray, " N"]
) -> Float64[np.ndarray, " N"]:
    spread = float(difference[known].std())
    return np.tanh(difference / spread) if spread else np.zeros_like(difference)


def _difficulty(
    won: Float64[np.ndarray, "M N"], lengths: Float64[np.ndarray, "M N"], known: Bool[np.ndarray, "M N"]
) -> Float64[np.ndarray, " N"]:
    """Gamma of each prompt: logit P(win) = theta_m + phi_m tanh(...) + gamma_n, over M models together."""
    models, prompts = won.shape
    if not models:
        return np.zeros(prompts)
    target = np.where(known, won, 0.0)
    ridge = np.concatenate([np.full(2 * models, RIDGE), np.full(prompts, DIFFICULTY_RIDGE)])

    def loss(x: Float64[np.ndarray, " P"]) -> tuple[float, Float64[np.ndarray, " P"]]:
        theta, phi, gamma = x[:models, None], x[models : 2 * models, None], x[2 * models :]
        logit = theta + phi * lengths + gamma
        value = np.where(known, np.logaddexp(0, logit) - target * logit, 0.0).sum() + 0.5 * (ridge * x**2).sum()
        error = np.where(known, special.expit(logit) - target, 0.0)
        return float(value), np.concatenate([error.sum(1), (error * lengths).sum(1), error.sum(0)]) + ridge * x

    found = optimize.minimize(loss, np.zeros(2 * models + prompts), jac=True, method="L-BFGS-B")
    return np.asarray(found.x[2 * models :])


def _rate_at_equal_length(design: Float64[np.ndarray, "N P"], won: Float64[np.ndarray, " N"]) -> Interval:
    """Fits a logistic regression whose second column is the length's, and predicts with that column at 0."""

    def loss(x: Float64[np.ndarray, " P"]) -> tuple[float, Float64[np.ndarray, " P"]]:
        logit = design @ x
        value = (np.logaddexp(0, logit) - won * logit).sum() + 0.5 * RIDGE * (x**2).sum()
        return float(value), design.T @ (special.expit(logit) - won) + RIDGE * x

    def hessian(x: Float64[np.ndarray, " P"]) -> Float64[np.ndarray, "P P"]:
        chance = special.expit(design @ x)
        return (design.T * (chance * (1 - chance))) @ design + RIDGE * np.eye(len(x))

    found = optimize.minimize(loss, np.zeros(design.shape[1]), jac=True, hess=hessian, method="trust-exact").x
    equal = design.copy()
    equal[:, 1] = 0.0
    chance = special.expit(equal @ found)
    slope = equal.T @ (chance * (1 - chance)) / len(won)
    variance = slope @ np.linalg.solve(hessian(found), slope) + chance.var() / len(won)
    mean = float(chance.mean())
    half_width = float(special.ndtri((1 + CONFIDENCE) / 2)) * math.sqrt(variance)
    return Interval(mean, max(0.0, mean - half_width), min(1.0, mean + half_width), len(won))


def wins_of(probability: Real[np.ndarray, " N"]) -> Float64[np.ndarray, " N"]:
    """Returns who won: 1 above one half, 0 below it, 0.5 for a tie, NaN where it is not known."""
    return (np.sign(np.asarray(probability, np.float64) - 0.5) + 1) / 2


def cohens_kappa(one: Sequence[Any] | Real[np.ndarray, " N"], other: Sequence[Any] | Real[np.ndarray, " N"]) -> float:
    """Returns how far two raters agree beyond chance: (p_o - p_e) / (1 - p_e), of N > 0 choices each.

    Cohen (1960), https://doi.org/10.1177/001316446002000104; NaN where both always say the same one thing.
    """
    first, second = np.asarray(one), np.asarray(other)
    observed = float((first == second).mean())
    expected = sum(float((first == name).mean() * (second == name).mean()) for name in np.unique(first))
    return (observed - expected) / (1 - expected) if expected < 1 else math.nan


def at_equal_length(
    models: Sequence[tuple[Real[np.ndarray, " n"], Sequence[str]]], opponents: Sequence[str]
) -> list[AtEqualLength]:
    """Returns the win rates of several models over the same opponent as they would be without differences in length.

    Args:
      models: for each, P(response wins), NaN where it is not known, and its responses to the first n <= N prompts.
      opponents: N texts. Lengths are in characters, as in AlpacaEval.
    """
    prompts = max(len(texts) for _, texts in models)
    wins = np.full((len(models), prompts), np.nan)
    lengths = np.zeros((len(models), prompts, 2))
    lengths[:, :, 1] = [len(text) for text in opponents[:prompts]]
    for model, (probability, texts) in enumerate(models):
        wins[model, : len(texts)] = wins_of(probability)
        lengths[model, : len(texts), 0] = [len(text) for text in texts]
    controlled = length_controlled_win_rates(wins, lengths[:, :, 0] - lengths[:, :, 1])
    known = ~np.isnan(wins)
    return [
        AtEqualLength(rate, similar_length_win_rate(own[there], both[there]))
        for rate, own, both, there in zip(controlled, wins, lengths, known, strict=True)
    ]


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
    """A win rate against the starting policy as a function of the labels n: w(n) = 1 - exp(height) n^-exponent / 2.

    The form in which "Efficient Exploration at Scale" (https://arxiv.org/abs/2603.17378) compares methods, 1 - (n / a)^-b / 2,
    but that a flat curve has a height, too, and no a.

    Args:
      height: b ln a, the logarithm of what is still lost at one label, as a share of one half.
      exponent: b, how fast that goes; below 0 for a policy that becomes worse.
    """

    height: float
    exponent: float

    def win_rate(self, labels: float) -> float:
        """Returns w(n)."""
        return float(1 - 0.5 * np.exp(self.height - self.exponent * np.log(labels)))

    def labels(self, win_rate: float) -> float:
        """Returns the n at which w(n) is a win rate; infinity where the curve does not rise, or is too flat for a number."""
        if self.exponent <= 0:
            return math.inf
        with np.errstate(over="ignore"):
            return float(np.exp((self.height - np.log(2 * (1 - win_rate))) / self.exponent))


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
    return LabelCurve(height=float(height), exponent=float(-slope))


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
    bounds = [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2]
    low, high = np.quantile(resampled, bounds, method="nearest")  # nothing lies between two infinities
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
