"""The epistemic reward model (ERM): K small heads on frozen features, a posterior by deep ensemble (SEA paper, Sec. 4.2.1)."""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jaxtyping import Float, Float32, Int32, PRNGKeyArray

from sea_jax.models import partition
from sea_jax.replay import Replay, sample_pairs
from sea_jax.settings import AT_LEAST_1, NOT_NEGATIVE, POSITIVE, one_of, setting
from sea_jax.types import Array, Params


@dataclass(frozen=True)
class EnsembleSettings:
    """How the heads are built and learn."""

    num_heads: int = setting(20, "K, heads", AT_LEAST_1, source="paper, App. F")
    hidden_size: int = setting(128, "width of the two hidden layers", AT_LEAST_1, source="paper, App. F")
    learning_rate: float = setting(1e-3, "Adam's", POSITIVE, source="paper, App. F")
    weight_decay: float = setting(5e-5, "L2 added to the gradient before Adam", NOT_NEGATIVE, source="authors' code")
    anchor_strength: float = setting(
        0.5,
        "lambda of Eq. 8, the pull of each head towards its own initial weights",
        NOT_NEGATIVE,
        source="paper, App. F",
    )
    anchor: str = setting(
        "prior",
        'what lambda weighs: "prior", (1 / N) ||phi_k - phi_k^0||^2 of every head, N the labels collected (Eq. 8); or '
        '"mean", (batch_size / N) times the mean of (phi - phi^0)^2 over all parameters of all heads (authors\' code)',
        one_of("prior", "mean"),
    )
    anchor_fade: float = setting(
        1.0,
        "share of lambda that is left after every 64 labels; ActiveUltraFeedback has 0.62",
        (lambda v: 0 < v <= 1, "a number above 0 and up to 1"),
    )
    prior_scale: float = setting(
        0.0, "to every head's reward is added that of a frozen random head, times this", NOT_NEGATIVE
    )
    centring: float = setting(
        0.0, "weight of the squared sum of a pair's two rewards, which keeps rewards around 0", NOT_NEGATIVE
    )
    nll: str = setting(
        "sum",
        'how the heads\' negative log-likelihoods are put together, "sum" (Eq. 8) or "mean" (authors\' code): Adam takes no '
        "notice of the scale itself, but weight decay and anchor weigh K times as much against a mean",
        one_of("sum", "mean"),
    )
    steps: int = setting(5, "m, gradient steps per round", AT_LEAST_1, source="paper, App. A")
    batch_size: int = setting(
        128, "pairs per gradient step, drawn from the replay", AT_LEAST_1, unit="pairs", source="authors' code"
    )


Scalar = Float32[Array, ""]


@struct.dataclass
class Ensemble:
    """The ERM's state.

    Attributes:
      heads: K heads as one stacked pytree: w1 [K, d, h], b1 [K, h], w2 [K, h, h], b2 [K, h], w3 [K, h], b3 [K].
      anchor: the heads as they were initialised, the prior's samples.
      opt_state: Adam's moments.
      shift: subtracted from the features.
      scale: multiplied into the features.
      prior_scale: of the frozen random rewards that are added to the heads'.
    """

    heads: Params
    anchor: Params
    opt_state: Any
    shift: Float32[Array, " d"]
    scale: Float32[Array, " d"]
    prior_scale: float = struct.field(pytree_node=False, default=0.0)


def optimizer(config: EnsembleSettings) -> optax.GradientTransformation:
    """Returns Adam with L2 in the gradient."""
    return optax.chain(optax.add_decayed_weights(config.weight_decay), optax.adam(config.learning_rate))


def init(config: EnsembleSettings, num_features: int, key: PRNGKeyArray) -> Ensemble:
    """Returns K heads initialised independently: truncated normal (2 sigma), sigma = 1 / (2 sqrt(fan_in)), zero biases.

    Features, d = `num_features` of them, pass unchanged until `calibrate` is called.
    """
    k, h = config.num_heads, config.hidden_size
    key1, key2, key3 = jax.random.split(key, 3)

    def weights(key: PRNGKeyArray, fan_in: int, *shape: int) -> Float32[Array, "K ..."]:
        return jax.random.truncated_normal(key, -2.0, 2.0, (k, *shape)) / (2 * fan_in**0.5)

    heads = {
        "w1": weights(key1, num_features, num_features, h),
        "b1": jnp.zeros((k, h)),
        "w2": weights(key2, h, h, h),
        "b2": jnp.zeros((k, h)),
        "w3": weights(key3, h, h),
        "b3": jnp.zeros(k),
    }
    return Ensemble(
        heads=heads,
        anchor=jax.tree.map(jnp.copy, heads),  # a copy: the heads' buffers may be donated
        opt_state=optimizer(config).init(heads),
        shift=jnp.zeros(num_features),
        scale=jnp.ones(num_features),
        prior_scale=config.prior_scale,
    )


def calibrate(ensemble: Ensemble, features: Float32[Array, "B M d"]) -> Ensemble:
    """Standardises features by their spread among the responses to one prompt, which is all that a comparison sees.

    Args:
      ensemble: Ensemble.
      features: of the candidates of a first batch; one that does not vary keeps its scale.
    """
    spread = jnp.sqrt(((features - features.mean(1, keepdims=True)) ** 2).mean((0, 1)))
    noise = 1e-6 * (1 + jnp.sqrt((features**2).mean((0, 1))))  # what rounding alone may leave of a constant
    return replace(ensemble, shift=features.mean((0, 1)), scale=1 / jnp.where(spread > noise, spread, 1.0))


def _head_reward(head: Params, features: Float32[Array, "*N d"]) -> Float32[Array, "*N"]:
    """One head's (no K axis) rewards."""
    hidden = jax.nn.relu(features @ head["w1"] + head["b1"])
    hidden = jax.nn.relu(hidden @ head["w2"] + head["b2"])
    return hidden @ head["w3"] + head["b3"]


def rewards(ensemble: Ensemble, features: Float32[Array, "B M d"]) -> Float32[Array, "K B M"]:
    """Returns every head's reward of every candidate."""
    standardised = (features - ensemble.shift) * ensemble.scale
    return jax.vmap(_head_reward, in_axes=(0, None))(ensemble.heads, standardised) + _prior(ensemble, standardised)


def _prior(ensemble: Ensemble, standardised: Float32[Array, "*N d"]) -> Float32[Array, "K *#N"]:
    """Randomised prior functions (https://arxiv.org/abs/1806.03335): each head's is how the next one was initialised."""
    if not ensemble.prior_scale:
        return jnp.zeros((len(ensemble.heads["b3"]), *(1 for _ in standardised.shape[1:])))
    neighbours = jax.tree.map(lambda w: jnp.roll(w, -1, axis=0), ensemble.anchor)
    return ensemble.prior_scale * jax.vmap(_head_reward, in_axes=(0, None))(neighbours, standardised)


LABELS_PER_FADE = 64


def _anchor_weight(config: EnsembleSettings, num_parameters: int, num_labels: Int32[Array, ""]) -> Float[Array, ""]:
    """What every squared distance between a parameter and its anchor weighs; num_parameters: of all heads together."""
    weight = config.anchor_strength / jnp.maximum(num_labels, 1)
    if config.anchor_fade != 1:
        weight *= config.anchor_fade ** (num_labels / LABELS_PER_FADE)
    return weight * (config.batch_size / num_parameters) if config.anchor == "mean" else weight


def _head_loss(
    head: Params,
    anchor: Params,
    prior: Float32[Array, "#b #2"],
    features: Float32[Array, "b 2 d"],
    labels: Float32[Array, " b"],
    weights: Float32[Array, " b"],
    anchor_weight: Float[Array, ""],
    *,
    centring: float,
) -> tuple[Scalar, Scalar]:
    """Eq. 8 for one head on a weighted batch."""
    reward = _head_reward(head, features) + prior
    logit = reward[:, 0] - reward[:, 1]
    nll = -(labels * jax.nn.log_sigmoid(logit) + (1 - labels) * jax.nn.log_sigmoid(-logit))
    if centring:
        nll += centring * reward.sum(-1) ** 2
    total = jnp.maximum(weights.sum(), 1.0)
    squares = jax.tree.map(lambda w, w0: jnp.sum((w - w0) ** 2), head, anchor)
    agrees = ((logit > 0) == (labels > 0.5)).astype(jnp.float32)
    return (nll * weights).sum() / total + anchor_weight * sum(jax.tree.leaves(squares)), (
        agrees * weights
    ).sum() / total


def update(
    ensemble: Ensemble, replay: Replay, key: PRNGKeyArray, config: EnsembleSettings
) -> tuple[Ensemble, dict[str, Scalar]]:
    """Takes m Adam steps on the regularised negative log-likelihood (SEA paper, Eq. 8), in one scan.

    By default the regulariser is read as the Gaussian prior that posterior sampling needs, + (lambda / N) ||phi_k - phi_k^0||^2
    with N the labels collected: the paper prints it with a minus sign inside a loss that is minimised.

    Args:
      ensemble: Ensemble.
      replay: while it is empty nothing changes.
      key: of the m batches.
      config: EnsembleSettings.

    Returns:
      Ensemble and {"loss", "accuracy"} of the last step, mean over heads, the likelihood at weight 1.
    """
    transformation = optimizer(config)
    num_parameters = sum(leaf.size for leaf in jax.tree.leaves(ensemble.heads))
    anchor_weight = _anchor_weight(config, num_parameters, replay.added)
    nll_weight = 1 / config.num_heads if config.nll == "mean" else 1.0  # of each head in the sum that is minimised

    def step(carry: tuple[Params, Any], key: PRNGKeyArray) -> tuple[tuple[Params, Any], tuple[Scalar, Scalar]]:
        heads, opt_state = carry
        features, labels, weights = partition.batches(sample_pairs(replay, config.batch_size, key))
        standardised = (features - ensemble.shift) * ensemble.scale
        prior = _prior(ensemble, standardised)

        def total_loss(heads: Params) -> tuple[Scalar, tuple[Scalar, Scalar]]:
            of_a_head = partial(_head_loss, centring=config.centring)
            loss, accuracy = jax.vmap(of_a_head, in_axes=(0, 0, 0, None, None, None, None))(
                heads, ensemble.anchor, prior, standardised, labels, weights, anchor_weight / nll_weight
            )
            return nll_weight * loss.sum(), (loss.mean(), accuracy.mean())

        gradients, report = jax.grad(total_loss, has_aux=True)(heads)
        updates, opt_state = transformation.update(gradients, opt_state, heads)
        return (optax.apply_updates(heads, updates), opt_state), report

    (heads, opt_state), (losses, accuracies) = jax.lax.scan(
        step, (ensemble.heads, ensemble.opt_state), jax.random.split(key, config.steps)
    )
    learnt = replace(ensemble, heads=heads, opt_state=opt_state)
    untouched = replay.added == 0
    learnt = jax.tree.map(lambda new, old: jnp.where(untouched, old, new), learnt, ensemble)
    return learnt, {"loss": losses[-1], "accuracy": accuracies[-1]}
