"""The policy step: log-probs of the duellists, a direct optimizer, accumulation, clipping, Adam; one jitted function.

Parameters are divided once into a frozen part (embedding and first layers) and a trained part (last n layers and the last
norm, or everything). The frozen layers are run once and serve the policy and the reference alike.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct
from jaxtyping import Float32, Int32

from sea_jax import losses
from sea_jax.models import decoder, logprobs, packing, partition
from sea_jax.models.config import ModelConfig
from sea_jax.settings import AT_LEAST_1, BELOW_1, FRACTION, NOT_NEGATIVE, POSITIVE, setting
from sea_jax.types import AnyArray, Array, FrozenStates, PairLogps, Params, PreferenceBatch, Prompts


@dataclass(frozen=True)
class LearnerSettings:
    """How the policy is optimised: Adam on a schedule."""

    learning_rate: float = setting(5e-7, "peak", POSITIVE, source="paper, App. F")
    warmup_fraction: float = setting(
        0.03,
        "share of the policy steps with a linear rise, the first already above 0",
        FRACTION,
        source="paper, App. F",
    )
    final_fraction: float = setting(0.1, "the cosine ends at this share of the peak", FRACTION, source="authors' code")
    b1: float = setting(0.9, "Adam's first decay", BELOW_1, source="paper, App. F")
    b2: float = setting(0.95, "Adam's second decay", BELOW_1, source="paper, App. F")
    weight_decay: float = setting(0.0, "decoupled", NOT_NEGATIVE, source="paper, App. F")
    clip_norm: float = setting(
        1.0, "global gradient norm above which gradients are scaled down", POSITIVE, source="paper, App. F"
    )
    anchor_decay: float = setting(
        0.0,
        "the reference of the loss is the policy's moving average, this share of which stays at a policy step; 0: it is the "
        "initial policy",
        BELOW_1,
    )
    microbatch_size: int = setting(
        8, "pairs whose activations are held at a time; divides data.batch_size", AT_LEAST_1, unit="pairs"
    )
    remat: bool = setting(True, "recompute activations of each layer in the backward pass")


@dataclass(frozen=True, kw_only=True)
class LearnerConfig(LearnerSettings):
    """The settings with what a run adds to them; static under jit.

    Attributes:
      total_steps: policy steps over which the schedule runs.
      dtype: compute dtype.
    """

    total_steps: int
    dtype: str


def configured(settings: LearnerSettings, *, total_steps: int, dtype: str) -> LearnerConfig:
    """Returns how a run optimises the policy.

    Args:
      settings: LearnerSettings.
      total_steps: policy steps over which the schedule runs.
      dtype: compute dtype.
    """
    return LearnerConfig(**vars(settings), total_steps=total_steps, dtype=dtype)


@struct.dataclass
class Learner:
    """What a policy step changes.

    Attributes:
      trained: the trained part of the parameters, float32.
      opt_state: optax state.
      step: policy steps taken.
    """

    trained: Params
    opt_state: Any
    step: Int32[Array, ""]


def schedule(config: LearnerConfig) -> optax.Schedule:
    """Returns linear warm-up, then a cosine to `final_fraction` of the peak, constant beyond the last step."""
    warmup_steps = max(1, round(config.warmup_fraction * config.total_steps))
    return optax.warmup_cosine_decay_schedule(
        init_value=config.learning_rate / warmup_steps,
        peak_value=config.learning_rate,
        warmup_steps=warmup_steps,
        decay_steps=max(config.total_steps, warmup_steps + 1),
        end_value=config.learning_rate * config.final_fraction,
    )


def optimizer(config: LearnerConfig) -> optax.GradientTransformation:
    """Returns clipping by global norm and AdamW on the schedule; with `anchor_decay`, the average of what they make."""
    steps = (
        optax.clip_by_global_norm(config.clip_norm),
        optax.adamw(schedule(config), b1=config.b1, b2=config.b2, weight_decay=config.weight_decay),
    )
    return optax.chain(*steps, averaged(config.anchor_decay)) if config.anchor_decay else optax.chain(*steps)


@struct.dataclass
class Anchor:
    """A slow average of the policy, which a loss may take for its reference; part of the optimiser's state, as it is saved."""

    average: Params


def averaged(decay: float) -> optax.GradientTransformation:
    """Returns what leaves updates as they are and keeps the average decay a + (1 - decay) w of the weights w they make."""

    def init(params: Params) -> Anchor:
        return Anchor(jax.tree.map(jnp.copy, params))  # a copy: both are donated

    def update(updates: Params, state: Anchor, params: Params | None = None) -> tuple[Params, Anchor]:
        new = optax.apply_updates(params, updates)
        return updates, Anchor(jax.tree.map(lambda a, w: decay * a + (1 - decay) * w, state.average, new))

    return optax.GradientTransformation(init, update)


def init(trained: Params, config: LearnerConfig) -> Learner:
    """Returns the learner's state before the first step.

    Args:
      trained: the trained part of the parameters, as arrays of the host or, copied since `update` donates them, of devices.
      config: LearnerConfig.
    """
    trained = jax.tree.map(lambda w: jnp.array(w, jnp.float32, copy=True), trained)
    return Learner(trained=trained, opt_state=optimizer(config).init(trained), step=jnp.zeros((), jnp.int32))


class Rows(NamedTuple):
    """How many tokens of a microbatch are computed, padding left out; None: all. Static under jit.

    Attributes:
      layers: of prompts and responses together.
      vocabulary: of responses.
    """

    layers: int | None
    vocabulary: int | None


ALL_ROWS = Rows(None, None)


def count_rows(
    prompts: Prompts, tokens: Int32[AnyArray, "B M T"], lengths: Int32[AnyArray, "B M"], microbatch_size: int
) -> Rows:
    """Returns the rows of the fullest microbatch.

    Args:
      prompts: Prompts.
      tokens: padded.
      lengths: response tokens.
      microbatch_size: prompts; divides B.
    """
    if partition.divides():
        return ALL_ROWS
    of_responses = np.asarray(lengths).sum(1)
    both = np.stack([of_responses + np.asarray(prompts.valid).sum(1), of_responses])
    counts = both.reshape(2, microbatch_size, -1).sum(1).max(1).tolist()  # as `optax.microbatch` takes them
    per_prompt = tokens.shape[1] * tokens.shape[2]
    sizes = [microbatch_size * (prompts.valid.shape[1] + per_prompt), microbatch_size * per_prompt]
    # The same share of both: a program for each share, not for each pair of them.
    grains = max(-(-count * packing.GRAIN // size) for count, size in zip(counts, sizes, strict=True))
    return Rows(*(packing.rounded(grains * size // packing.GRAIN, size) for size in sizes))


def response_logprobs(
    frozen: Params,
    trained: tuple[Params, ...],
    prompts: Prompts,
    tokens: Int32[Array, "B M T"],
    lengths: Int32[Array, "B M"],
    *,
    config: ModelConfig,
    remat: bool,
    dtype: str,
    rows: Rows = ALL_ROWS,
    frozen_states: FrozenStates | None = None,
) -> tuple[Float32[Array, "B M T"], ...]:
    """Returns the response tokens' log-probs under one or more policies that share their frozen part, which is run once.

    Args:
      frozen: the shared part of the parameters; with no layer in it, each policy runs on its own.
      trained: the trained part of each policy.
      prompts: Prompts.
      tokens: padded on the right.
      lengths: response tokens.
      config: ModelConfig.
      remat: recompute activations of each layer in the backward pass.
      dtype: compute dtype.
      rows: at least as many as are valid.
      frozen_states: behind the frozen part; None: it is run.

    Returns:
      One array for each policy; 0 on padding.
    """
    valid = jnp.arange(tokens.shape[-1]) < lengths[..., None]
    counted = None if rows.layers is None else packing.choose(decoder.valid_tokens(prompts.valid, valid), rows.layers)
    predicted = None if rows.vocabulary is None else packing.choose(valid.reshape(-1), rows.vocabulary)
    embed = partial(
        decoder.embed,
        config=config,
        prompt_tokens=prompts.tokens,
        prompt_valid=prompts.valid,
        response_tokens=tokens,
        responses_valid=valid,
        dtype=dtype,
    )
    shared = None
    if frozen_states is not None:
        shared = decoder.Streams(frozen_states.prompt, frozen_states.responses, jnp.asarray(prompts.valid), valid)
    elif frozen["stacks"]:
        shared = embed(frozen)
        for stack in frozen["stacks"]:
            shared, _ = decoder.run_stack(stack, config, shared, counted=counted)
        shared = jax.lax.stop_gradient(shared)

    def behind(part: Params) -> Float32[Array, "B M T"]:
        params = decoder.join(frozen, part)
        streams = embed(params) if shared is None else shared
        for stack in part["stacks"]:
            streams, _ = decoder.run_stack(stack, config, streams, remat=remat, counted=counted)
        return logprobs.response_logprobs(params, config, streams, tokens, predicted=predicted)

    return tuple(behind(part) for part in trained)


def _loss(
    trained: Params,
    frozen: Params,
    reference: Params,
    batch: PreferenceBatch,
    loss: Callable[[PairLogps], Float32[Array, " B"]],
    config: ModelConfig,
    learner_config: LearnerConfig,
    rows: Rows,
) -> tuple[Float32[Array, ""], dict[str, Float32[Array, ""]]]:
    """Sum of weighted losses over a microbatch, and sums of what is reported; both are divided by the total weight later."""
    policy, ref = response_logprobs(
        frozen,
        (trained, jax.lax.stop_gradient(reference)),
        batch.prompts,
        batch.tokens,
        batch.lengths,
        config=config,
        remat=learner_config.remat,
        dtype=learner_config.dtype,
        rows=rows,
        frozen_states=batch.frozen,
    )
    # Whatever stands in a row that is left out, NaN included, must reach neither the sums nor their gradient.
    kept = batch.weights > 0
    labels = jnp.where(kept, batch.labels, 0.5)
    policy_sum = jnp.where(kept[:, None], policy.sum(-1), 0.0)
    reference_sum = jax.lax.stop_gradient(jnp.where(kept[:, None], ref.sum(-1), 0.0))
    pairs = PairLogps(
        chosen=policy_sum[:, 0],
        rejected=policy_sum[:, 1],
        reference_chosen=reference_sum[:, 0],
        reference_rejected=reference_sum[:, 1],
        chosen_length=jnp.maximum(batch.lengths[:, 0], 1),
        rejected_length=jnp.maximum(batch.lengths[:, 1], 1),
    )
    values = losses.expected(loss, pairs, labels)
    if not losses.always_finite(loss):
        values = jnp.where(kept, values, 0.0)
    margin = losses.log_ratio_margin(pairs) * jnp.sign(labels - 0.5)
    drift = (policy_sum - reference_sum).mean(-1)
    report = {"loss": values, "margin": margin, "accuracy": margin > 0, "log_ratio": drift}
    sums = {name: (value * batch.weights).sum() for name, value in report.items()}
    return sums["loss"], sums


def accumulated(
    gradient: Callable[[Any], tuple[Params, Any]], batch: Any, microbatch_size: int, specs: Params
) -> tuple[Params, Any]:
    """Returns the sums over the microbatches of a batch, of which one at a time is differentiated.

    Args:
      gradient: `gradient(microbatch)` -> (gradient, a tree of numbers beside it), both to be summed.
      batch: a tree of arrays [B, ...].
      microbatch_size: rows; divides B.
      specs: ParamSpec of each array of the gradient.

    Returns:
      (gradient, tree), as `gradient` returns them for the whole batch up to rounding.
    """

    def stored(microbatch: Any) -> tuple[Params, Any]:
        of_trained, beside = gradient(microbatch)
        return partition.as_stored(of_trained, specs), beside

    # Every count-th row goes to a microbatch: each then has rows of every device that the batch is divided over.
    return optax.microbatch(stored, argnums=0, microbatch_size=microbatch_size)(batch)


@partial(jax.jit, static_argnames=("loss", "config", "learner_config", "rows"), donate_argnames=("learner",))
def update(
    learner: Learner,
    frozen: Params,
    reference: Params,
    batch: PreferenceBatch,
    *,
    loss: Callable[[PairLogps], Float32[Array, " B"]],
    config: ModelConfig,
    learner_config: LearnerConfig,
    rows: Rows = ALL_ROWS,
) -> tuple[Learner, dict[str, Float32[Array, ""]]]:
    """Takes one policy step on a batch of preference pairs (SEA paper, Algorithm 2, line 10).

    Args:
      learner: its buffers are donated.
      frozen: the frozen part of the parameters.
      reference: the reference policy's trained part; with `anchor_decay` the policy's average stands in its place.
      batch: if every weight is 0 the parameters stay as they are.
      loss: with its hyper-parameters bound.
      config: ModelConfig.
      learner_config: LearnerConfig.
      rows: of a microbatch, see `count_rows`.

    Returns:
      Learner and numbers: loss, margin (h towards the preferred response), accuracy, log_ratio (mean log pi/pi_ref),
      gradient_norm (before clipping), learning_rate.
    """
    batch = partition.batches(batch)
    reference = current_reference(learner, reference, learner_config)

    def gradient(microbatch: PreferenceBatch) -> tuple[Params, dict[str, Float32[Array, ""]]]:
        return jax.grad(_loss, has_aux=True)(
            learner.trained, frozen, reference, microbatch, loss, config, learner_config, rows
        )

    sums = accumulated(gradient, batch, learner_config.microbatch_size, decoder.specs(config, learner.trained))
    return take_step(learner, sums, batch.weights.sum(), learner_config)


def current_reference(learner: Learner, reference: Params, config: LearnerConfig) -> Params:
    """Returns the reference policy's trained part, or with `anchor_decay` the policy's average."""
    return learner.opt_state[-1].average if config.anchor_decay else reference


def take_step(
    learner: Learner,
    sums: tuple[Params, dict[str, Float32[Array, ""]]],
    total: Float32[Array, ""],
    config: LearnerConfig,
) -> tuple[Learner, dict[str, Float32[Array, ""]]]:
    """Moves the policy by what was summed over a batch.

    Args:
      learner: Learner.
      sums: the gradient, and numbers to report.
      total: the weight that both are divided by; at 0 the learner stays as it is.
      config: LearnerConfig.

    Returns:
      Learner and the numbers with gradient_norm (before clipping) and learning_rate.
    """
    gradients, report = jax.tree.map(lambda x: x / jnp.maximum(total, 1e-9), sums)
    updates, opt_state = optimizer(config).update(gradients, learner.opt_state, learner.trained)
    new = Learner(trained=optax.apply_updates(learner.trained, updates), opt_state=opt_state, step=learner.step + 1)
    new = jax.tree.map(lambda after, before: jnp.where(total > 0, after, before), new, learner)
    report["gradient_norm"] = optax.global_norm(gradients)
    report = partition.whole(report)
    report["learning_rate"] = schedule(config)(learner.step)
    return new, report
