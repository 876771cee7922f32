"""How far judges agree, by hand."""

import math

import numpy as np
import pytest

from sea_jax import agreement
from sea_jax.agreement import Opinion, Pairs
from sea_jax.statistics import cohens_kappa


def test_kappa_of_the_textbook_and_of_raters_without_a_choice():
    # 20 yes-yes, 5 yes-no, 10 no-yes, 15 no-no: (0.7 - 0.5) / (1 - 0.5)
    one = [1] * 25 + [0] * 25
    other = [1] * 20 + [0] * 5 + [1] * 10 + [0] * 15
    assert cohens_kappa(one, other) == pytest.approx(0.4)
    assert cohens_kappa(one, one) == 1
    assert cohens_kappa([1, 0], [0, 1]) == -1
    assert math.isnan(cohens_kappa([1, 1], [1, 1]))
    assert cohens_kappa([1, 0.5, 0], [1, 0.5, 1]) == pytest.approx((2 / 3 - 1 / 3) / (1 - 1 / 3))


def test_what_stands_first_wins_however_a_pair_is_turned():
    pairs = Pairs(["p"] * 4, ["a"] * 4, ["b"] * 4, np.array([True, False, True, False]))
    for_first = agreement.opinion(lambda prompts, first, second: [0.9, 0.8, None, 0.7], pairs)
    np.testing.assert_allclose(for_first.probability, [0.1, 0.8, np.nan, 0.7])
    share = agreement.shown_first_wins(for_first, pairs.swapped)
    assert share is not None
    assert (share.mean, share.count) == (1.0, 3)

    def reads_one(prompts, first, second):
        return np.array([float(a < b) for a, b in zip(first, second, strict=True)])

    reads_one.pointwise = True  # type: ignore[attr-defined]
    for_a = agreement.opinion(reads_one, pairs)
    assert for_a.probability.tolist() == [1, 1, 1, 1]
    assert agreement.shown_first_wins(for_a, pairs.swapped) is None
    found = agreement.agreement(for_first, for_a)
    assert found is not None
    assert found[0].mean == pytest.approx(2 / 3)
    assert found[1] == pytest.approx(0.0)
    assert agreement.agreement(for_a, Opinion(np.full(4, np.nan), True)) is None
    told = agreement.table({"x": for_first, "y": for_a}, pairs.swapped)
    assert "| x | 3 of 4 | 0 | 1.000 [" in told
    assert "| y | 4 of 4 | 0 | reads one at a time |" in told
    assert "| x, y | 3 | 0.667 [" in told
    assert told.endswith("| 0.000 |")
