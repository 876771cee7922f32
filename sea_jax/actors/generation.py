"""Prompts in, M sampled responses each out: the prompt is read once, its KV is shared, one jitted while_loop writes."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Bool, Float, Float32, Int, Int32, PRNGKeyArray

from sea_jax.models import decoder, packing, partition
from sea_jax.models.config import ModelConfig
from sea_jax.models.packing import Packing
from sea_jax.policy import Policy
from sea_jax.settings import AT_LEAST_1, NOT_NEGATIVE, setting
from sea_jax.types import Array, Candidates, FrozenStates, Params, Prompts

SHARES = (2, 4)  # as responses end, a half and then a quarter of the rows is computed
FEWEST_ROWS = 16  # fewer are not worth another program: the weights have to be read all the same

BLOCKS = 256  # the vocabulary is searched in this many blocks when a token is drawn


@dataclass(frozen=True)
class SamplingSettings:
    """How candidates are drawn while training."""

    num_samples: int = setting(
        20,
        "M, candidates per prompt",
        (lambda v: v >= 2, "2 or more: a duel needs two candidates"),
        source="paper, App. F",
    )
    max_new_tokens: int = setting(53, "T while training", AT_LEAST_1, unit="tokens", source="paper, App. F")
    batch_size: int = setting(
        0, "prompts answered at a time, which bounds the memory of keys and values; 0: all of a batch", NOT_NEGATIVE
    )
    temperature: float = setting(
        0.7,
        "divides the logits that a token is drawn from",
        (lambda v: v > 0, "above 0: greedy candidates are all the same"),
        source="paper, App. F",
    )
    top_k: int = setting(0, "only so many of the most probable tokens are drawn; 0: any", NOT_NEGATIVE)
    top_p: float = setting(
        1.0,
        "only the fewest most probable tokens that reach this mass are drawn; 1: any",
        (lambda v: 0 < v <= 1, "a number above 0 and up to 1"),
    )
    stop: tuple[str, ...] = setting(
        (),
        'texts that end a response, such as ("\\nQ:",); what they begin is not shown to the oracle',
        (
            lambda v: all(isinstance(text, str) and text for text in v),
            "non-empty texts in parentheses, each with a comma",
        ),
    )
    thoughts: tuple[str, ...] = setting(
        (),
        'what a model\'s thoughts begin and end with, such as ("<think>", "</think>"): the oracle is not shown them',
        (
            lambda v: len(v) in (0, 2) and all(isinstance(text, str) and text for text in v),
            "two non-empty texts, or ()",
        ),
    )


@dataclass(frozen=True)
class GenerationConfig:
    """How responses are drawn; static under jit.

    Attributes:
      num_samples: M.
      max_new_tokens: T.
      eos_ids: tokens that end a response; they stay in it.
      pad_id: fills what is behind the end.
      temperature: 0 takes the most probable token.
      top_k: keep the k most probable tokens; 0 keeps all.
      top_p: keep the fewest most probable tokens that reach this mass; 1 keeps all.
      feature_stack: read features behind this many stacks of layers; None: behind the last norm.
      frozen_stacks: hidden states behind so many stacks of layers are kept for the learner; 0: none.
      dtype: compute dtype.
      absent_ids: rows of the vocabulary that are no token and are never drawn; log-probs count them all the same.
    """

    num_samples: int
    max_new_tokens: int
    eos_ids: tuple[int, ...]
    pad_id: int
    temperature: float
    top_k: int
    top_p: float
    feature_stack: int | None
    frozen_stacks: int
    dtype: str
    absent_ids: tuple[int, ...] = ()


def configured(
    settings: SamplingSettings,
    policy: Policy,
    dtype: str,
    *,
    num_samples: int | None = None,
    max_new_tokens: int | None = None,
    temperature: float | None = None,
) -> GenerationConfig:
    """Returns how a policy writes: as the settings say, but for what is given.

    Args:
      settings: SamplingSettings.
      policy: Policy.
      dtype: compute dtype.
      num_samples: M.
      max_new_tokens: T.
      temperature: 0 is greedy.
    """
    return GenerationConfig(
        num_samples=settings.num_samples if num_samples is None else num_samples,
        max_new_tokens=settings.max_new_tokens if max_new_tokens is None else max_new_tokens,
        eos_ids=policy.tokenizer.end_ids,
        pad_id=policy.tokenizer.pad_id,
        temperature=settings.temperature if temperature is None else temperature,
        top_k=settings.top_k,
        top_p=settings.top_p,
        feature_stack=policy.feature_stack,
        frozen_stacks=len(policy.frozen["stacks"]),
        dtype=dtype,
        absent_ids=policy.tokenizer.absent_ids(policy.config.vocab_size),
    )


class _State(NamedTuple):
    """What the loop carries; step counts the response tokens drawn so far."""

    step: Int32[Array, ""]
    done: Bool[Array, "B M"]
    tokens: Int32[Array, "B M T"]
    logprobs: Float32[Array, "B M T"]
    lengths: Int32[Array, "B M"]
    feature_sum: Float32[Array, "B M d"]
    hidden: Float[Array, "B M d"]  # behind the last norm, of the newest token
    frozen: Float[Array, "B M T d"] | None  # behind the frozen layers
    caches: tuple[decoder.ResponseKV, ...]


def restrict(logits: Float32[Array, "N V"], top_k: int, top_p: float) -> Float32[Array, "N V"]:
    """Sets the logits of tokens outside the top k, or outside the nucleus of mass p, to minus infinity.

    Args:
      logits: of any temperature.
      top_k: 0 keeps all.
      top_p: mass in (0, 1]; 1 keeps all. The token that crosses the mass is kept.
    """
    if 0 < top_k < logits.shape[-1]:
        threshold = jax.lax.top_k(logits, top_k)[0][:, -1:]
        logits = jnp.where(logits < threshold, -jnp.inf, logits)
    if top_p < 1:
        descending = jnp.sort(logits, axis=-1, descending=True)
        probabilities = jax.nn.softmax(descending, axis=-1)
        kept = jnp.cumsum(probabilities, axis=-1) - probabilities < top_p
        threshold = jnp.where(kept, descending, jnp.inf).min(-1, keepdims=True)
        logits = jnp.where(logits < threshold, -jnp.inf, logits)
    return logits


def draw(logits: Float32[Array, "N V"], uniform: Float32[Array, " N"]) -> Int32[Array, " N"]:
    """Draws one token per row by inverting the distribution function, block by block.

    One pass of exp over the vocabulary and two short cumulative sums: the Gumbel trick would need a random number and a
    logarithm for every entry.

    Args:
      logits: minus infinity is never drawn.
      uniform: in [0, 1).
    """
    num_rows, vocab_size = logits.shape
    width = -(-vocab_size // BLOCKS)
    weights = jnp.exp(logits - logits.max(-1, keepdims=True))
    weights = jnp.pad(weights, ((0, 0), (0, BLOCKS * width - vocab_size))).reshape(num_rows, BLOCKS, width)

    def pick(
        mass: Float32[Array, "N W"], target: Float32[Array, " N"]
    ) -> tuple[Int[Array, " N"], Float32[Array, " N"]]:
        """The first entry whose cumulative mass exceeds the target (rounding aside, it exists), and the mass before it."""
        cumulative = jnp.cumsum(mass, axis=-1)
        above = (cumulative > target[:, None]) & (mass > 0)
        index = jnp.where(above.any(-1), above.argmax(-1), mass.argmax(-1))
        before = jnp.take_along_axis(cumulative - mass, index[:, None], axis=-1)[:, 0]
        return index, target - before

    block_mass = weights.sum(-1)
    block, rest = pick(block_mass, uniform * block_mass.sum(-1))
    entry, _ = pick(jnp.take_along_axis(weights, block[:, None, None], axis=1)[:, 0], rest)
    return (block * width + entry).astype(jnp.int32)


def choose(
    logits: Float32[Array, "N V"], uniform: Float32[Array, " N"], sampling: GenerationConfig
) -> tuple[Int32[Array, " N"], Float32[Array, " N"]]:
    """Draws one token per row, by a number in [0, 1), and returns its log-prob at temperature 1: the learner's own."""
    there = logits.at[:, jnp.array(sampling.absent_ids)].set(-jnp.inf) if sampling.absent_ids else logits
    if sampling.temperature == 0:
        token = there.argmax(-1).astype(jnp.int32)
    else:
        scaled = restrict(there / sampling.temperature, sampling.top_k, sampling.top_p)
        token = draw(scaled, uniform)
    chosen = jnp.take_along_axis(logits, token[:, None], axis=-1)[:, 0]
    return token, chosen - jax.nn.logsumexp(logits, axis=-1)


def sizes(num_rows: int) -> list[int]:
    """Returns how many rows are computed at first, and then, as soon as no more go on, in their place."""
    if partition.divides():  # each device has rows of its own, which end when they will
        return [num_rows]
    return [num_rows, *(size for share in SHARES if (size := -(-num_rows // share)) >= FEWEST_ROWS)]


@struct.dataclass
class ReadPrompts:
    """Prompts as the frozen layers have read them, which is the same however the others are trained.

    Attributes:
      hidden: behind these layers.
      kv: of each of their stacks.
    """

    hidden: Float[Array, "B P d"]
    kv: tuple[decoder.PromptKV, ...]


@partial(jax.jit, static_argnames=("config", "dtype", "prompt_rows"))
def read_prompts(
    frozen: Params, prompts: Prompts, *, config: ModelConfig, dtype: str, prompt_rows: int | None
) -> ReadPrompts:
    """Runs the frozen layers over prompts.

    Args:
      frozen: the frozen part of the parameters, with the embedding in it.
      prompts: Prompts.
      config: ModelConfig.
      dtype: compute dtype.
      prompt_rows: as of `generate`.
    """
    frozen = partition.cast(frozen, dtype)
    streams = decoder.embed(frozen, config, prompts.tokens, prompts.valid, dtype=dtype)
    streams, kv = _read(frozen["stacks"], config, streams, prompt_rows)
    return ReadPrompts(streams.prompt, tuple(kv))


def _read(
    stacks: Sequence[Params], config: ModelConfig, streams: decoder.Streams, prompt_rows: int | None
) -> tuple[decoder.Streams, list[decoder.PromptKV]]:
    """The prompts behind some stacks, and the keys and values of each of these."""
    counted = None if prompt_rows is None else packing.choose(decoder.valid_tokens(streams.prompt_valid), prompt_rows)
    all_kv = []
    for stack in stacks:
        streams, kv = decoder.run_stack(stack, config, streams, counted=counted)
        all_kv.append(kv)
    return streams, all_kv


@partial(jax.jit, static_argnames=("config", "sampling", "prompt_rows"))
def generate(
    params: Params,
    prompts: Prompts,
    key: PRNGKeyArray,
    *,
    config: ModelConfig,
    sampling: GenerationConfig,
    prompt_rows: int | None = None,
    read: ReadPrompts | None = None,
) -> Candidates:
    """Writes M responses to each prompt and reads the features of each on the way.

    Args:
      params: the decoder's.
      prompts: Prompts.
      key: random key.
      config: ModelConfig.
      sampling: GenerationConfig.
      prompt_rows: so many prompt tokens are computed, at least as many as are valid; None: padding too.
      read: these prompts behind the frozen layers; None: they are run.
    """
    num_prompts, num_samples, max_new_tokens = prompts.tokens.shape[0], sampling.num_samples, sampling.max_new_tokens
    params = partition.cast(params, sampling.dtype)  # once, not at every token
    stacks = params["stacks"]
    embedding = partition.constrain(params["embed"], "vocab")
    unembedding = partition.constrain(decoder.unembedding(params), "vocab")
    prompts = partition.batches(prompts)
    kept_stacks = 0 if partition.divides() else sampling.frozen_stacks  # every device would hold all of them

    streams, prompt_kv = decoder.embed(params, config, prompts.tokens, prompts.valid, dtype=sampling.dtype), []
    if read is not None:
        streams, prompt_kv = decoder.Streams(read.hidden, None, streams.prompt_valid, None), list(read.kv)
    num_first = max(kept_stacks - len(prompt_kv), 0)
    first, then = stacks[len(prompt_kv) :][:num_first], stacks[len(prompt_kv) + num_first :]
    streams, kv = _read(first, config, streams, prompt_rows)
    frozen_prompt = streams.prompt
    streams, kv_behind = _read(then, config, streams, prompt_rows)
    prompt_kv += [*kv, *kv_behind]
    last = decoder.final(params, config, streams.prompt[:, -1])

    def feed(
        state: _State, token: Int32[Array, "B M"], active: Packing | None
    ) -> tuple[
        Float[Array, "B M d"], Float[Array, "B M d"], Float[Array, "B M T d"] | None, tuple[decoder.ResponseKV, ...]
    ]:
        """Runs one token of each response through the layers: hidden states, features, what is kept, caches."""
        hidden = embedding[token]
        caches, features, frozen = [], None, state.frozen
        for index, (stack, kv, cache) in enumerate(zip(stacks, prompt_kv, state.caches, strict=True)):
            hidden, cache = decoder.decode(stack, config, hidden, kv, prompts.valid, cache, state.step, active=active)
            caches.append(cache)
            if sampling.feature_stack == index + 1:
                features = hidden
            if kept_stacks == index + 1:
                frozen = jax.lax.dynamic_update_index_in_dim(frozen, hidden, state.step, 2)
        hidden = decoder.final(params, config, hidden)
        return hidden, hidden if features is None else features, frozen, tuple(caches)

    def write(active: Packing | None, state: _State) -> _State:
        hidden = state.hidden.reshape(-1, last.shape[-1])
        # Drawn for every row, so that each has its own, whoever goes on.
        uniform = jax.random.uniform(jax.random.fold_in(key, state.step), hidden.shape[:1])
        if active is not None:
            hidden, uniform = packing.pack(hidden, active), packing.pack(uniform, active)
        logits = jnp.einsum("nd,vd->nv", hidden, unembedding, preferred_element_type=jnp.float32)
        token, logprob = choose(partition.constrain(logits, "batch"), uniform, sampling)
        if active is not None:
            token, logprob = packing.spread(token, active), packing.spread(logprob, active)
        token = jnp.where(state.done, sampling.pad_id, token.reshape(state.done.shape))
        logprob = jnp.where(state.done, 0.0, logprob.reshape(state.done.shape))
        hidden, features, frozen, caches = feed(state, token, active)
        return _State(
            step=state.step + 1,
            done=state.done | jnp.isin(token, jnp.array(sampling.eos_ids)),
            tokens=jax.lax.dynamic_update_index_in_dim(state.tokens, token, state.step, 2),
            logprobs=jax.lax.dynamic_update_index_in_dim(state.logprobs, logprob, state.step, 2),
            lengths=state.lengths + ~state.done,
            feature_sum=state.feature_sum + jnp.where(state.done[..., None], 0, features.astype(jnp.float32)),
            hidden=hidden,
            frozen=frozen,
            caches=caches,
        )

    def go_on(smaller: int, state: _State) -> Bool[Array, ""]:
        return (state.step < max_new_tokens) & (jnp.sum(~state.done) > smaller)

    shape = (num_prompts, num_samples)
    start = _State(
        step=jnp.zeros((), jnp.int32),
        done=jnp.zeros(shape, bool),
        tokens=jnp.full((*shape, max_new_tokens), sampling.pad_id, jnp.int32),
        logprobs=jnp.zeros((*shape, max_new_tokens), jnp.float32),
        lengths=jnp.zeros(shape, jnp.int32),
        feature_sum=jnp.zeros((*shape, last.shape[-1]), jnp.float32),
        hidden=jnp.broadcast_to(last[:, None], (*shape, last.shape[-1])),
        frozen=jnp.zeros((*shape, max_new_tokens, last.shape[-1]), sampling.dtype) if kept_stacks else None,
        caches=tuple(decoder.empty_cache(s, config, *shape, max_new_tokens, sampling.dtype) for s in stacks),
    )
    end, computed = start, sizes(num_prompts * num_samples)
    for size, smaller in zip(computed, [*computed[1:], 0], strict=True):
        active = None if size == computed[0] else packing.choose(~end.done.reshape(-1), size)
        end = jax.lax.while_loop(partial(go_on, smaller), partial(write, active), end)
    candidates = Candidates(
        tokens=end.tokens,
        lengths=end.lengths,
        logprobs=end.logprobs,
        features=end.feature_sum / jnp.maximum(end.lengths, 1)[..., None],
        frozen=None if end.frozen is None else FrozenStates(frozen_prompt, end.frozen),
    )
    return partition.whole(candidates)
