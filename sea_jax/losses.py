"""Direct optimizers: pairs of log-probs in, one loss per pair out.

Every loss is written for a hard preference (chosen over rejected). `expected` turns it into a loss of a soft label, the
probability that the first response wins, so that a new loss needs no case of its own for soft labels.
"""

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Float32

from sea_jax.settings import one_of_or_user, setting, user_function
from sea_jax.types import Array, Loss, PairLogps

Losses = Float32[Array, " B"]


def log_ratio_margin(pairs: PairLogps) -> Losses:
    """Returns h = log[pi(y+)/pi_ref(y+)] - log[pi(y-)/pi_ref(y-)]."""
    return (pairs.chosen - pairs.reference_chosen) - (pairs.rejected - pairs.reference_rejected)


def dpo(pairs: PairLogps, *, beta: float = 0.1) -> Losses:
    """Direct preference optimization, -log sigmoid(beta h) (https://arxiv.org/abs/2305.18290, Eq. 7).

    Args:
      pairs: PairLogps.
      beta: strength of the pull towards the reference policy.
    """
    return -jax.nn.log_sigmoid(beta * log_ratio_margin(pairs))


def ipo(pairs: PairLogps, *, beta: float = 0.2, length_averaged: bool = False) -> Losses:
    """Identity preference optimization, (h - 1/(2 beta))^2 (https://arxiv.org/abs/2310.12036, Eq. 17).

    Args:
      pairs: PairLogps.
      beta: regularisation; the margin aimed at is 1/(2 beta).
      length_averaged: divide each log-ratio by its response's length, as some implementations do.
    """
    chosen = pairs.chosen - pairs.reference_chosen
    rejected = pairs.rejected - pairs.reference_rejected
    if length_averaged:
        chosen, rejected = chosen / pairs.chosen_length, rejected / pairs.rejected_length
    return (chosen - rejected - 1 / (2 * beta)) ** 2


def slic(pairs: PairLogps, *, beta: float = 0.2) -> Losses:
    """Sequence likelihood calibration, max(0, 1 - beta h) (https://arxiv.org/abs/2305.10425, Eq. 12 of the SEA paper).

    Args:
      pairs: PairLogps.
      beta: inverse of the margin at which the hinge is zero.
    """
    return jnp.maximum(0.0, 1 - beta * log_ratio_margin(pairs))


def simpo(pairs: PairLogps, *, beta: float = 10.0, gamma_over_beta: float = 0.3) -> Losses:
    """Simple preference optimization, without a reference (https://arxiv.org/abs/2405.14734, Eq. 6).

    Args:
      pairs: PairLogps; those of the reference are not used.
      beta: scale of the length-averaged log-probs.
      gamma_over_beta: target margin in units of beta.
    """
    margin = pairs.chosen / pairs.chosen_length - pairs.rejected / pairs.rejected_length
    return -jax.nn.log_sigmoid(beta * (margin - gamma_over_beta))


LABELS = "labels"  # the parameter of a loss that takes labels itself
LOSSES: Mapping[str, Loss] = {"dpo": dpo, "ipo": ipo, "slic": slic, "simpo": simpo}


@dataclass(frozen=True)
class LossSettings:
    """What the policy minimises."""

    name: str = setting("dpo", "direct optimizer by name, or my_module:my_loss", one_of_or_user(LOSSES))
    beta: float | None = setting(
        None,
        "None: the loss's own default",
        (lambda v: v is None or 0 < v < math.inf, "a finite number above 0, or None for the loss's own default"),
    )
    gamma_over_beta: float | None = setting(
        None,
        "SimPO's target margin in units of beta; None: its default",
        (lambda v: v is None or v >= 0, "0 or more, or None for the loss's own default"),
    )
    length_averaged: bool | None = setting(None, "IPO on length-averaged log-ratios (authors' code)")


def build(settings: LossSettings) -> Callable[[PairLogps], Losses]:
    """Returns the direct optimizer with its hyper-parameters bound.

    Raises:
      ValueError: there is no such loss, or a hyper-parameter is given that it does not take.
    """
    loss = LOSSES[settings.name] if settings.name in LOSSES else user_function(settings.name, "loss.name")
    return bind(loss, {name: value for name, value in vars(settings).items() if name != "name"})


def bind(loss: Loss, hyper_parameters: Mapping[str, Any]) -> Callable[[PairLogps], Losses]:
    """Fixes a loss's hyper-parameters; those that are None keep the loss's own default.

    Args:
      loss: `loss(pairs, **hyper_parameters)`, built in or the user's own.
      hyper_parameters: by name.

    Raises:
      ValueError: a hyper-parameter is given that the loss does not take.
    """
    given = {name: value for name, value in hyper_parameters.items() if value is not None}
    parameters = inspect.signature(loss).parameters
    takes = [name for name in list(parameters)[1:] if name != LABELS]
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    for name in given:
        if name not in takes and not takes_any:
            called = getattr(loss, "__name__", loss)
            raise ValueError(
                f"config.loss.{name}={given[name]}: the loss '{called}' takes no such hyper-parameter; "
                f"it takes {', '.join(takes) or 'none'}"
            )
    return partial(loss, **given)


def swap(pairs: PairLogps) -> PairLogps:
    """Returns the same pairs with chosen and rejected exchanged."""
    return PairLogps(
        chosen=pairs.rejected,
        rejected=pairs.chosen,
        reference_chosen=pairs.reference_rejected,
        reference_rejected=pairs.reference_chosen,
        chosen_length=pairs.rejected_length,
        rejected_length=pairs.chosen_length,
    )


def expected(loss: Loss, pairs: PairLogps, labels: Float32[Array, " B"]) -> Losses:
    """Returns the loss expected under soft labels: p loss(first over second) + (1 - p) loss(second over first).

    Labels in {eps, 1 - eps} are what DPO implementations call label smoothing (conservative DPO).

    Args:
      loss: with its hyper-parameters bound; one that has a parameter `labels` takes them itself, and is not exchanged.
      pairs: log-probs with the first response as chosen.
      labels: p, the probability that the first response wins.
    """
    if LABELS in inspect.signature(loss).parameters:
        return loss(pairs, labels=labels)
    if always_finite(loss):
        return labels * loss(pairs) + (1 - labels) * loss(swap(pairs))
    return _share(labels, loss, pairs) + _share(1 - labels, loss, swap(pairs))


def always_finite(loss: Loss) -> bool:
    """Returns whether a loss is finite wherever log-probs are: the built-in ones are, of others nobody knows."""
    return getattr(loss, "func", loss) in LOSSES.values()


def _share(probability: Float32[Array, " B"], loss: Loss, pairs: PairLogps) -> Losses:
    """probability x loss, 0 with gradient 0 where the probability is: there the loss may well be infinite."""
    some = probability > 0
    harmless = jax.tree.map(lambda x: jnp.where(some, x, jnp.ones_like(x)), pairs)  # finite, so that no gradient is NaN
    return jnp.where(some, probability * loss(harmless), 0.0)
