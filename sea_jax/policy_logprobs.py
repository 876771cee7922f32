"""The learner's own log-probs of responses, whoever wrote them: for rules that ask, for evaluations, against an engine."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float32, Int32

from sea_jax import learner
from sea_jax.data import batching
from sea_jax.data.prompts import DataSettings, Rendered, evaluation_batches
from sea_jax.data.references import reference_ids
from sea_jax.models import partition
from sea_jax.models.config import ModelConfig
from sea_jax.policy import Policy
from sea_jax.types import Array, Candidates, Params, Prompts

TokenLogprobs = Float32[Array, "B m T"]
SummedLogprobs = Float32[Array, "B M"]


@partial(jax.jit, static_argnames=("config", "dtype"))
def token_logprobs(
    frozen: Params,
    trained: tuple[Params, ...],
    prompts: Prompts,
    tokens: Int32[Array, "B m T"],
    lengths: Int32[Array, "B m"],
    *,
    config: ModelConfig,
    dtype: str,
) -> tuple[TokenLogprobs, ...]:
    """Returns the log-prob of each token, 0 on padding, under policies that share their frozen part."""
    found = learner.response_logprobs(
        frozen, trained, prompts, tokens, lengths, config=config, remat=False, dtype=dtype
    )
    return tuple(partition.whole(each) for each in found)


def under_policy(
    policy: Policy, dtype: str
) -> Callable[[Params, Prompts, Int32[Array, "B m T"], Int32[Array, "B m"]], TokenLogprobs]:
    """Returns the function from trained parameters, prompts, tokens and lengths to the log-prob of each token."""

    def read(
        trained: Params, prompts: Prompts, tokens: Int32[Array, "B m T"], lengths: Int32[Array, "B m"]
    ) -> TokenLogprobs:
        (own,) = token_logprobs(policy.frozen, (trained,), prompts, tokens, lengths, config=policy.config, dtype=dtype)
        return own

    return read


def under_policy_and_reference(
    policy: Policy, dtype: str, batch_size: int
) -> Callable[[Params, Prompts, Candidates], tuple[SummedLogprobs, SummedLogprobs]]:
    """Returns what an agent's rules are shown of log-probs: log pi(y | x) under the policy, and under the reference.

    Args:
      policy: Policy.
      dtype: compute dtype.
      batch_size: prompts whose responses are read at a time, which bounds the memory of their activations; 0: all.
    """

    def read(trained: Params, prompts: Prompts, candidates: Candidates) -> tuple[SummedLogprobs, SummedLogprobs]:
        parts = [
            token_logprobs(
                policy.frozen,
                (trained, policy.reference),
                Prompts(prompts.tokens[rows], prompts.valid[rows]),
                candidates.tokens[rows],
                candidates.lengths[rows],
                config=policy.config,
                dtype=dtype,
            )
            for rows in batching.portions(len(candidates.tokens), batch_size)
        ]
        own, reference = (jnp.concatenate([each.sum(-1) for each in column]) for column in zip(*parts, strict=True))
        return own, reference

    return read


@dataclass(frozen=True)
class Likelihood:
    """What policies think of texts, in nats per token.

    Attributes:
      fluency: mean log-prob of the tokens of responses under the initial policy.
      reference_loss: minus the mean log-prob of the tokens of the data set's references under the policy; None: there are
        none.
    """

    fluency: float
    reference_loss: float | None


ReadLikelihood = Callable[[Params, Int32[np.ndarray, "N T"], Int32[np.ndarray, " N"]], Likelihood]
"""Trained parameters, and the tokens and lengths of responses to N held-out prompts -> Likelihood at the first of them."""


def likelihood_at(
    policy: Policy,
    prompts: Sequence[Rendered],
    dtype: str,
    *,
    batch_size: int,
    bucket: int,
    max_new_tokens: int,
    settings: DataSettings,
) -> ReadLikelihood:
    """Returns the function that reads responses under the initial policy, and references under any, in one pass.

    Args:
      policy: Policy.
      prompts: at least one.
      dtype: compute dtype.
      batch_size: prompts read at a time.
      bucket: prompts are padded to a multiple of it.
      max_new_tokens: T; longer references are cut.
      settings: as the prompts were rendered with.
    """
    pad_id = policy.tokenizer.pad_id
    batches = list(evaluation_batches(prompts, pad_id=pad_id, bucket=bucket, batch_size=batch_size))
    texts = [
        reference_ids(prompt, policy.tokenizer, settings)[:max_new_tokens] if prompt.record["reference"].strip() else []
        for prompt in prompts
    ]
    references, _ = batching.pad(texts, (len(texts), max_new_tokens), pad_id)
    reference_lengths = np.array([len(ids) for ids in texts], np.int32)
    known = bool(reference_lengths.any())

    def read(trained: Params, tokens: Int32[np.ndarray, "N T"], lengths: Int32[np.ndarray, " N"]) -> Likelihood:
        columns = [(tokens, lengths), (references, reference_lengths)][: 1 + known]
        count = min(len(tokens), len(prompts))
        fluency = loss = 0.0
        for number, (batch, _) in enumerate(batches):
            rows = np.minimum(np.arange(number * batch_size, (number + 1) * batch_size), count - 1)
            counts = np.arange(number * batch_size, (number + 1) * batch_size) < count
            if not counts.any():
                break
            initial, own = token_logprobs(
                policy.frozen,
                (policy.reference, trained),
                Prompts(batch["tokens"], batch["valid"]),
                np.stack([column[rows] for column, _ in columns], axis=1),
                np.stack([column[rows] for _, column in columns], axis=1),
                config=policy.config,
                dtype=dtype,
            )
            fluency += float(np.asarray(initial)[counts, 0].sum(dtype=np.float64))
            loss -= float(np.asarray(own)[counts, -1].sum(dtype=np.float64))
        reference_tokens = int(reference_lengths[:count].sum())
        return Likelihood(
            fluency=fluency / int(lengths[:count].sum()),
            reference_loss=loss / reference_tokens if reference_tokens else None,
        )

    return read
