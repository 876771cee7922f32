import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sea_jax import losses
from sea_jax.losses import LossSettings
from sea_jax.types import Array, PairLogps

# First pair:  log-ratios 1 and -1, h = 2; log-probs per token -4/4 = -1 and -6/3 = -2.
# Second pair: log-ratios -1 and 2, h = -3; log-probs per token -3/2 = -1.5 and -8/5 = -1.6.
PAIRS = PairLogps(
    chosen=jnp.array([-4.0, -3.0]),
    rejected=jnp.array([-6.0, -8.0]),
    reference_chosen=jnp.array([-5.0, -2.0]),
    reference_rejected=jnp.array([-5.0, -10.0]),
    chosen_length=jnp.array([4, 2]),
    rejected_length=jnp.array([3, 5]),
)


def softplus(x: float) -> float:
    """-log sigmoid(-x)."""
    return math.log1p(math.exp(x))


def test_log_ratio_margin():
    np.testing.assert_allclose(losses.log_ratio_margin(PAIRS), [2.0, -3.0], rtol=1e-6)


# DPO: -log sigmoid(0.1 * 2) = log(1 + exp(-0.2)) = 0.598139; log(1 + exp(0.3)) = 0.854355.
# IPO: (2 - 1/0.4)^2 = 0.25; (-3 - 2.5)^2 = 30.25.
# IPO by length: (1/4 + 1/3 - 2.5)^2 = 3.673611; (-1/2 - 2/5 - 2.5)^2 = 11.56.
# SLiC: 1 - 0.2 * 2 = 0.6; 1 + 0.2 * 3 = 1.6.
# SimPO: margin 1, log(1 + exp(-10 (1 - 0.3))) = 0.000911466; margin 0.1, log(1 + exp(-10 (0.1 - 0.3))) = 2.126928.
# Linear: -(2)/2 + 0.03 * 10 + 0.1 (1 + 1)/2 = -0.6; -(5)/2 + 0.03 * 11 + 0.1 (1 + 4)/2 = -1.92.
# SELM: DPO - 0.5 * 0.1 * (1 - 1)/2; DPO - 0.5 * 0.1 * (-1 + 2)/2. XPO: DPO - 0.5 * 6; DPO - 0.5 * 8.
@pytest.mark.parametrize(
    ("loss", "hyper_parameters", "values"),
    [
        (losses.dpo, {}, [0.598139, 0.854355]),
        (losses.dpo, {"beta": 0.5}, [softplus(-1.0), softplus(1.5)]),
        (losses.ipo, {}, [0.25, 30.25]),
        (losses.ipo, {"length_averaged": True}, [3.673611, 11.56]),
        (losses.ipo, {"beta": 0.5}, [1.0, 16.0]),
        (losses.slic, {}, [0.6, 1.6]),
        (losses.slic, {"beta": 1.0}, [0.0, 4.0]),
        (losses.linear, {}, [-0.6, -1.92]),
        (losses.linear, {"beta": 0.5, "nudge": 0.0}, [-0.5, -1.25]),
        (losses.selm, {"alpha": 0.5}, [0.598139, 0.829355]),
        (losses.xpo, {"alpha": 0.5, "labels": jnp.ones(2)}, [-2.401861, -3.145645]),
        (losses.simpo, {}, [0.000911466, 2.126928]),
        (losses.simpo, {"beta": 2.0, "gamma_over_beta": 0.0}, [softplus(-2.0), softplus(-0.2)]),
    ],
)
def test_values_by_hand(loss, hyper_parameters, values):
    np.testing.assert_allclose(loss(PAIRS, **hyper_parameters), values, rtol=2e-6)


OF_A_PREFERENCE = [name for name in losses.LOSSES if name != "xpo"]  # whose second response is the reference's


@pytest.mark.parametrize("name", OF_A_PREFERENCE)
@pytest.mark.parametrize("p", [0.0, 0.3, 1.0])
def test_expected_weighs_both_outcomes(name, p):
    loss = losses.LOSSES[name]
    first_wins, second_wins = np.asarray(loss(PAIRS)), np.asarray(loss(losses.swap(PAIRS)))
    assert not np.allclose(first_wins, second_wins)
    np.testing.assert_allclose(
        losses.expected(loss, PAIRS, jnp.full(2, p)), p * first_wins + (1 - p) * second_wins, rtol=1e-6
    )


def test_expected_dpo_is_the_cross_entropy_of_the_soft_label():
    # 0.3 log(1 + exp(-0.2)) + 0.7 log(1 + exp(0.2)) = 0.3 * 0.598139 + 0.7 * 0.798139; and 1 * log(1 + exp(0.3)).
    np.testing.assert_allclose(
        losses.expected(losses.dpo, PAIRS, jnp.array([0.3, 1.0])), [0.738139, 0.854355], rtol=2e-6
    )


def exponential(pairs: PairLogps) -> Array:
    """exp(-h), which is infinite, with its gradient, long before h is."""
    return jnp.exp(-losses.log_ratio_margin(pairs))


def test_what_a_hard_label_does_not_ask_for_may_be_infinite_and_so_may_its_gradient():
    apart = PairLogps(*map(jnp.array, ([-1.0, -1.0], [-200.0, -2.0], [-1.0, -1.0], [-1.0, -1.0], [3, 3], [4, 4])))
    labels = jnp.array([1.0, 0.75])

    def total(chosen: Array) -> Array:
        return losses.expected(exponential, dataclasses.replace(apart, chosen=chosen), labels).sum()

    np.testing.assert_allclose(losses.expected(exponential, apart, labels), [0, 0.75 / np.e + 0.25 * np.e], rtol=1e-6)
    gradient = jax.grad(total)(apart.chosen)
    np.testing.assert_allclose(gradient, [0, -0.75 / np.e + 0.25 * np.e], rtol=1e-6, atol=1e-30)


def test_the_linear_loss_of_a_soft_label_is_the_one_printed():
    # p = 0.7: -0.2 * 2 + 0.3 + 0.1 = 0; -0.2 * 5 + 0.33 + 0.25 = -0.42.
    np.testing.assert_allclose(
        losses.expected(losses.linear, PAIRS, jnp.full(2, 0.7)), [0.0, -0.42], rtol=1e-5, atol=1e-6
    )


def test_label_smoothing_is_the_loss_under_flipped_labels():
    # 0.9 * 0.598139 + 0.1 * 0.798139; 0.9 * 0.854355 + 0.1 * 0.554355; XPO adds half of -6 and of -8.
    smooth = losses.build(LossSettings(label_smoothing=0.1))
    np.testing.assert_allclose(losses.expected(smooth, PAIRS, jnp.ones(2)), [0.618139, 0.824355], rtol=2e-6)
    np.testing.assert_allclose(
        losses.expected(smooth, losses.swap(PAIRS), jnp.zeros(2)), [0.618139, 0.824355], rtol=2e-6
    )
    optimistic = losses.build(LossSettings(name="xpo", alpha=0.5, label_smoothing=0.1))
    np.testing.assert_allclose(losses.expected(optimistic, PAIRS, jnp.ones(2)), [-2.381861, -3.175645], rtol=2e-6)


def logps() -> st.SearchStrategy[Array]:
    """Log-probs of three responses."""
    return st.lists(st.floats(-40, 0, width=32), min_size=3, max_size=3).map(jnp.array)


def pairs() -> st.SearchStrategy[PairLogps]:
    """Three pairs of any log-probs."""
    lengths = st.lists(st.integers(1, 60), min_size=3, max_size=3).map(jnp.array)
    return st.builds(PairLogps, logps(), logps(), logps(), logps(), lengths, lengths)


@pytest.mark.parametrize("name", OF_A_PREFERENCE)
@given(pairs=pairs(), label=st.floats(0, 1, width=32))
def test_which_response_is_named_first_does_not_matter(name, pairs, label):
    loss, labels = losses.LOSSES[name], jnp.full(3, label)
    there = losses.expected(loss, pairs, labels)
    back = losses.expected(loss, losses.swap(pairs), 1 - labels)
    assert there.shape == (3,)
    np.testing.assert_allclose(there, back, rtol=1e-4, atol=1e-5)


def test_swap_exchanges_every_field():
    swapped = losses.swap(PAIRS)
    for name in ("chosen", "reference_chosen", "chosen_length"):
        other = name.replace("chosen", "rejected")
        np.testing.assert_array_equal(getattr(swapped, name), getattr(PAIRS, other))
        np.testing.assert_array_equal(getattr(swapped, other), getattr(PAIRS, name))


def test_bind_fixes_what_is_given_and_keeps_the_loss_own_defaults():
    bound = losses.bind(losses.ipo, {"beta": 0.5, "length_averaged": None, "gamma_over_beta": None})
    np.testing.assert_allclose(bound(PAIRS), losses.ipo(PAIRS, beta=0.5))
    np.testing.assert_allclose(losses.bind(losses.slic, {"beta": None})(PAIRS), losses.slic(PAIRS))


def test_bind_takes_a_loss_of_the_user():
    def own(pairs: PairLogps, *, scale: float = 1.0) -> Array:
        return scale * pairs.chosen

    np.testing.assert_allclose(losses.bind(own, {"scale": 3.0, "beta": None})(PAIRS), [-12.0, -9.0])


def test_bind_refuses_a_hyper_parameter_by_name():
    with pytest.raises(ValueError, match=r"config\.loss\.gamma_over_beta=0\.5.*'dpo'.*it takes beta$"):
        losses.bind(losses.dpo, {"beta": 0.1, "gamma_over_beta": 0.5})
    with pytest.raises(ValueError, match=r"it takes beta, length_averaged$"):
        losses.bind(losses.ipo, {"gamma_over_beta": 0.0})
