"""The policy step on all M responses to each prompt by their rewards: REINFORCE against the group, or PPO's clipped ratio."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Bool, Float32, Int32

from sea_jax.learner import (
    ALL_ROWS,
    Learner,
    LearnerConfig,
    Rows,
    accumulated,
    current_reference,
    response_logprobs,
    take_step,
)
from sea_jax.models import decoder, partition
from sea_jax.models.config import ModelConfig
from sea_jax.settings import AT_LEAST_1, NOT_NEGATIVE, POSITIVE, setting
from sea_jax.types import Array, FrozenStates, Params, Prompts


@dataclass(frozen=True)
class GroupSettings:
    """How the rewards of all responses to a prompt move the policy (method=reinforce, ppo)."""

    kl: float = setting(
        0.05, "taken off a response's reward, times its log-ratio of policy and reference", NOT_NEGATIVE
    )
    pessimism: float = setting(
        0.0,
        "p of -(1 / p) log mean_k exp(-p r_k), a response's reward from those of the K heads; 0: their mean",
        NOT_NEGATIVE,
        source="https://arxiv.org/abs/2606.09073",
    )
    clip: float = setting(
        0.2,
        "ppo: how far from 1 the ratio of a token's probabilities counts",
        POSITIVE,
        source="https://arxiv.org/abs/1707.06347",
    )
    epochs: int = setting(2, "ppo: policy steps on each batch", AT_LEAST_1, unit="steps")


@struct.dataclass
class GroupBatch:
    """All responses to some prompts, and how good they are.

    Attributes:
      tokens: padded on the right.
      lengths: response tokens.
      logprobs: of the tokens under the policy that wrote them; 0 on padding.
      rewards: of the responses.
      weights: 0 leaves a prompt out.
      frozen: of prompts and responses; None: the learner runs the frozen layers.
    """

    prompts: Prompts
    tokens: Int32[Array, "B M T"]
    lengths: Int32[Array, "B M"]
    logprobs: Float32[Array, "B M T"]
    rewards: Float32[Array, "B M"]
    weights: Float32[Array, " B"]
    frozen: FrozenStates | None = None


GroupLoss = Callable[..., Array]
"""`loss(logprobs [B, M, T], written [B, M, T], advantages [B, M], valid [B, M, T])` -> [B]; `written` under who wrote them."""


def reinforce(
    logprobs: Float32[Array, "B M T"],
    written: Float32[Array, "B M T"],
    advantages: Float32[Array, "B M"],
    valid: Bool[Array, "B M T"],
) -> Float32[Array, " B"]:
    """-mean_i A_i log pi(y_i | x) (https://arxiv.org/abs/2402.14740, Eq. 6)."""
    return -(advantages * logprobs.sum(-1)).mean(-1)


def ppo(
    logprobs: Float32[Array, "B M T"],
    written: Float32[Array, "B M T"],
    advantages: Float32[Array, "B M"],
    valid: Bool[Array, "B M T"],
    *,
    clip: float,
) -> Float32[Array, " B"]:
    """-mean_i sum_t min(rho A_i, clip(rho, 1 - c, 1 + c) A_i), rho the ratio of a token's probabilities.

    https://arxiv.org/abs/1707.06347, Eq. 7. The group is the baseline: a value head would be one more thing to learn from few
    labels.
    """
    ratio = jnp.exp(logprobs - written)
    each = advantages[..., None]
    gain = jnp.minimum(ratio * each, jnp.clip(ratio, 1 - clip, 1 + clip) * each)
    return -jnp.where(valid, gain, 0.0).sum(-1).mean(-1)


def pessimistic(rewards: Float32[Array, "K B M"], pessimism: float) -> Float32[Array, "B M"]:
    """Returns -(1 / p) log mean_k exp(-p r_k), which is the mean at p = 0 and nears the least with growing p."""
    if pessimism == 0:
        return rewards.mean(0)
    return -(jax.nn.logsumexp(-pessimism * rewards, axis=0) - jnp.log(len(rewards))) / pessimism


def advantages_in_group(rewards: Float32[Array, "B M"]) -> Float32[Array, "B M"]:
    """Returns each reward less the mean of the others to the same prompt (https://arxiv.org/abs/2402.14740, Eq. 7)."""
    others = (rewards.sum(-1, keepdims=True) - rewards) / (rewards.shape[-1] - 1)
    return rewards - others


@partial(jax.jit, static_argnames=("loss", "kl", "config", "learner_config", "rows"), donate_argnames=("learner",))
def update(
    learner: Learner,
    frozen: Params,
    reference: Params,
    batch: GroupBatch,
    *,
    loss: GroupLoss,
    kl: float,
    config: ModelConfig,
    learner_config: LearnerConfig,
    rows: Rows = ALL_ROWS,
) -> tuple[Learner, dict[str, Float32[Array, ""]]]:
    """Takes one policy step towards E[r] - kl KL(policy || reference) (SEA paper, Fig. 2a).

    Args:
      learner: its buffers are donated.
      frozen: the frozen part of the parameters.
      reference: the reference policy's trained part; with `anchor_decay` the policy's average stands in its place.
      batch: if every weight is 0 the parameters stay as they are.
      loss: GroupLoss.
      kl: see `GroupSettings`.
      config: ModelConfig.
      learner_config: LearnerConfig.
      rows: of a microbatch, see `learner.count_rows`.

    Returns:
      Learner and numbers: loss, reward (mean, without the KL), log_ratio (mean log pi/pi_ref), gradient_norm (before
      clipping), learning_rate.
    """
    batch = partition.batches(batch)
    reference = current_reference(learner, reference, learner_config)

    def sums(trained: Params, microbatch: GroupBatch) -> tuple[Array, dict[str, Array]]:
        policy, ref = response_logprobs(
            frozen,
            (trained, jax.lax.stop_gradient(reference)),
            microbatch.prompts,
            microbatch.tokens,
            microbatch.lengths,
            config=config,
            remat=learner_config.remat,
            dtype=learner_config.dtype,
            rows=rows,
            frozen_states=microbatch.frozen,
        )
        written = microbatch.logprobs
        distance = written.sum(-1) - jax.lax.stop_gradient(ref.sum(-1))
        advantages = advantages_in_group(microbatch.rewards - kl * distance)
        valid = jnp.arange(written.shape[-1]) < microbatch.lengths[..., None]
        values = loss(policy, written, advantages, valid)
        kept = microbatch.weights > 0
        report = {"loss": values, "reward": microbatch.rewards.mean(-1), "log_ratio": distance.mean(-1)}
        weighted = {name: (jnp.where(kept, each, 0.0) * microbatch.weights).sum() for name, each in report.items()}
        return weighted["loss"], weighted

    def gradient(microbatch: GroupBatch) -> tuple[Params, dict[str, Float32[Array, ""]]]:
        return jax.grad(sums, has_aux=True)(learner.trained, microbatch)

    found = accumulated(gradient, batch, learner_config.microbatch_size, decoder.specs(config, learner.trained))
    return take_step(learner, found, batch.weights.sum(), learner_config)
