"""A decoder (Llama, Mistral, Qwen, GPT-NeoX) as pure functions over stacked layers, for prompts shared by many responses."""

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.nn.initializers import normal
from jaxtyping import Bool, Float, Int, PRNGKeyArray

from sea_jax.models import objectives, packing, partition, rope
from sea_jax.models.config import ModelConfig
from sea_jax.models.layers import ACTIVATIONS, layer_norm, linear, rms_norm
from sea_jax.models.packing import Packing
from sea_jax.models.parameters import ParamSpec, initialise, matrices, norm
from sea_jax.types import AnyArray, Array, Params

# Letters of this file: k key and value heads, g query heads to each of them, h features of a head, n layers of a stack.
KV = tuple[Float[Array, "..."], Float[Array, "..."]]
"""Rotated keys and values of one layer or, with an axis in front, of some."""

PromptKV = tuple[Float[Array, "*n B k P h"], Float[Array, "*n B k P h"]]
ResponseKV = tuple[Float[Array, "*n B M k T h"], Float[Array, "*n B M k T h"]]

# Finite, so that a padding token, which may attend to nothing, still gets finite numbers and gradients.
_MASKED = -1e30


@flax.struct.dataclass
class Streams:
    """Prompts and the M responses that share each, as hidden states; the responses are None for prompts alone.

    Valid is False on padding: on the left of a prompt, whose last token is at P - 1, and on the right of a response.
    """

    prompt: Float[Array, "B P d"]
    responses: Float[Array, "B M T d"] | None
    prompt_valid: Bool[AnyArray, "B P"]
    responses_valid: Bool[AnyArray, "B M T"] | None


def valid_tokens(
    prompt_valid: Bool[AnyArray, "B P"], responses_valid: Bool[AnyArray, "B M T"] | None = None
) -> Bool[Array, " N"]:
    """Which tokens are no padding, in the order in which layers take them: each prompt's and, behind them, its responses'."""
    parts = [part for part in (prompt_valid, responses_valid) if part is not None]
    return jnp.concatenate([jnp.asarray(part).reshape(len(part), -1) for part in parts], axis=1).reshape(-1)


def abstract(config: ModelConfig, cuts: Sequence[int] = ()) -> Params:
    """The parameter tree with a ParamSpec for every leaf, from which init, loading and sharding derive.

    Args:
      config: the decoder's.
      cuts: layer numbers, ascending, at which the layers are divided into stacks; (20,) gives [0, 20) and [20, L).

    Returns:
      {"embed": [V, d], "stacks": one dict of [n_i, ...] leaves per stack, "final_norm": {...}} and "score": [d] in a
      reward model, or what `objectives.abstract` has, else "unembed": [V, d] where the embeddings are not tied.

    Raises:
      ValueError: cuts that are not ascending or not strictly between 0 and the number of layers.
    """
    weight, d, layer_norms = normal(config.init_std), config.d_model, config.norm == "layer"

    def stack(n: int) -> Params:
        q, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        layers = {
            "attention_norm": norm(n, d, bias=layer_norms),
            "q": matrices((n, d, q), ("embed", "heads"), weight, config.attention_bias),
            "k": matrices((n, d, kv), ("embed", "kv_heads"), weight, config.attention_bias),
            "v": matrices((n, d, kv), ("embed", "kv_heads"), weight, config.attention_bias),
            "o": matrices((n, q, d), ("heads", "embed"), weight, config.output_bias),
            "mlp_norm": norm(n, d, bias=layer_norms),
            "up": matrices((n, d, config.d_ff), ("embed", "mlp"), weight, config.mlp_bias),
            "down": matrices((n, config.d_ff, d), ("mlp", "embed"), weight, config.mlp_bias),
        }
        if config.gated_mlp:
            layers["gate"] = matrices((n, d, config.d_ff), ("embed", "mlp"), weight, config.mlp_bias)
        if config.head_norms:
            layers |= {name: norm(n, config.head_dim, bias=False) for name in ("q_norm", "k_norm")}
        return layers

    table = ParamSpec((config.vocab_size, d), ("vocab", "embed"), weight)
    params: Params = {
        "embed": table,
        "stacks": tuple(stack(high - low) for low, high in _stacks(cuts, config.num_layers)),
        "final_norm": norm(d, bias=layer_norms),
    }
    if config.gating:
        return params | objectives.abstract(config.gating, d, weight)
    if config.scalar_head:
        return params | {"score": ParamSpec((d,), ("embed",), weight)}
    return params if config.tie_embeddings else params | {"unembed": table}


def specs(config: ModelConfig, part: Params) -> Params:
    """The ParamSpec of each parameter in a part of the tree, for their logical axes.

    Args:
      config: the decoder's.
      part: some entries of a tree like `abstract`'s, with any number of stacks.

    Returns:
      A tree of the part's structure; the shapes in its stacks are those of all layers in one.
    """
    whole = abstract(config)
    return {name: whole[name] * len(part[name]) if name == "stacks" else whole[name] for name in part}


def init(config: ModelConfig, key: PRNGKeyArray, cuts: Sequence[int] = ()) -> Params:
    """Random parameters in float32: matrices normal with the configuration's standard deviation, biases 0, norm scales 1."""
    return initialise(abstract(config, cuts), key)


def recut(params: Params, cuts: Sequence[int]) -> Params:
    """Divides the same layers into other stacks; numpy arrays stay numpy arrays.

    Args:
      params: a decoder's parameters, however its layers are divided.
      cuts: where they are to be divided, see `abstract`.

    Raises:
      ValueError: cuts that are not ascending or not strictly between 0 and the number of layers.
    """
    num_layers = sum(len(stack["q"]["kernel"]) for stack in params["stacks"])
    bounds = _stacks(cuts, num_layers)

    def join(*leaves: Any) -> Any:
        if len(leaves) == 1:
            return leaves[0]
        return np.concatenate(leaves) if isinstance(leaves[0], np.ndarray) else jnp.concatenate(leaves)

    whole = jax.tree.map(join, *params["stacks"])
    stacks = tuple(jax.tree.map(lambda leaf, low=low, high=high: leaf[low:high], whole) for low, high in bounds)
    return params | {"stacks": stacks}


def _stacks(cuts: Sequence[int], num_layers: int) -> list[tuple[int, int]]:
    """The first layer of every stack and the one after its last."""
    bounds = list(itertools.pairwise((0, *cuts, num_layers)))
    if any(low >= high for low, high in bounds):
        raise ValueError(f"cuts {tuple(cuts)} must ascend strictly between 0 and {num_layers} layers")
    return bounds


def embed(
    params: Params,
    config: ModelConfig,
    prompt_tokens: Int[AnyArray, "B P"],
    prompt_valid: Bool[AnyArray, "B P"],
    response_tokens: Int[AnyArray, "B M T"] | None = None,
    responses_valid: Bool[AnyArray, "B M T"] | None = None,
    *,
    dtype: Any,
) -> Streams:
    """Looks up the embeddings of prompts and responses, the streams before the first layer.

    Args:
      params: the decoder's.
      config: the decoder's.
      prompt_tokens: padded on the left.
      prompt_valid: False on padding.
      response_tokens: padded on the right.
      responses_valid: False on padding.
      dtype: in which all later layers compute.
    """
    # Looked up in float32, the gradients of a token that comes often are then summed in it.
    table = partition.gathered(jnp.asarray(params["embed"]), abstract(config)["embed"], jnp.float32)
    responses = None if response_tokens is None else table[response_tokens].astype(dtype)
    return Streams(table[prompt_tokens].astype(dtype), responses, prompt_valid, responses_valid)


def run_stack(
    stack: Params, config: ModelConfig, streams: Streams, *, remat: bool = False, counted: Packing | None = None
) -> tuple[Streams, PromptKV]:
    """Runs the layers of one stack over prompts and responses.

    Every prompt token attends to the valid prompt tokens up to itself; every response token to all valid prompt
    tokens and to its own response up to itself. A prompt token's position is the number of valid prompt tokens before
    it, that of response token t the prompt's length plus t.

    Where the rope depends on the length of the sequence (Dynamic, LongRope), that is the prompt's length plus its
    longest response's, so that the responses can share their prompt: a shorter one then differs from a forward pass
    of its own if the longest passes the rule's threshold. Below the threshold all agree.

    Args:
      stack: one element of params["stacks"], leaves [n, ...].
      config: the decoder's.
      streams: before the stack.
      remat: whether the backward pass computes each layer again rather than keep what is inside it.
      counted: of each prompt's tokens with those of its responses behind them, in a row, which are computed: all that are
        `valid_tokens`; None: padding too. What is returned of the others means nothing.

    Returns:
      The streams after the stack, and the prompt's keys and values.
    """
    batch, prompt_length, d = streams.prompt.shape
    tokens = streams.prompt
    lengths = longest = jnp.sum(streams.prompt_valid, axis=1)
    if streams.responses is not None and streams.responses_valid is not None:
        samples, steps = streams.responses.shape[1:3]
        # Behind their prompt rather than behind all prompts, so that each device of a mesh has both of its own prompts.
        tokens = jnp.concatenate([tokens, streams.responses.reshape(batch, -1, d)], axis=1)
        longest = lengths + jnp.max(jnp.sum(streams.responses_valid, axis=2), axis=1)
        positions = jnp.broadcast_to(lengths[:, None, None] + jnp.arange(steps), (batch, 1, steps))
        response_rotations = rope.rotations(config, positions, longest)
    positions = jnp.maximum(jnp.cumsum(streams.prompt_valid, axis=1) - 1, 0)
    prompt_rotations = rope.rotations(config, positions, longest)

    def attend(
        q: Float[Array, "N _q"], k: Float[Array, "N _kv"], v: Float[Array, "N _kv"]
    ) -> tuple[Float[Array, "N _q"], PromptKV]:
        if counted is not None:
            q, k, v = (packing.spread(rows, counted) for rows in (q, k, v))
        q, k, v = (rows.reshape(batch, -1, rows.shape[-1]) for rows in (q, k, v))
        of_prompt = (part[:, :prompt_length] for part in (q, k, v))
        prompt_q, prompt_kv = _heads(config, (batch, prompt_length), prompt_rotations, *of_prompt)
        out = _attend_within(prompt_q, prompt_kv, streams.prompt_valid)
        if streams.responses is None:
            return out if counted is None else packing.pack(out, counted), prompt_kv
        of_responses = (part[:, prompt_length:] for part in (q, k, v))
        own_q, own_kv = _heads(config, (batch, samples, steps), response_rotations, *of_responses)
        causal = jnp.arange(steps) <= jnp.arange(steps)[:, None]
        out_responses = _attend_shared(own_q, prompt_kv, streams.prompt_valid, own_kv, causal)
        both = (out.reshape(batch, prompt_length, -1), out_responses.reshape(batch, samples * steps, -1))
        out = jnp.concatenate(both, axis=1).reshape(-1, out.shape[-1])
        return out if counted is None else packing.pack(out, counted), prompt_kv

    layer_specs = abstract(config)["stacks"][0]

    def body(x: Float[Array, "*N d"], layer: Params) -> tuple[Float[Array, "*N d"], PromptKV]:
        x = partition.constrain(x, "batch") if counted is None else x
        rows, kept = _layer(partition.gathered(layer, layer_specs, x.dtype), config, x.reshape(-1, d), attend)
        return rows.reshape(x.shape), kept

    x = tokens if counted is None else packing.pack(tokens.reshape(-1, d), counted)
    x, kv = jax.lax.scan(jax.checkpoint(body) if remat else body, x, stack)
    tokens = x if counted is None else packing.spread(x, counted).reshape(tokens.shape)
    prompt, responses = tokens[:, :prompt_length], None
    if streams.responses is not None:
        responses = tokens[:, prompt_length:].reshape(streams.responses.shape)
    return Streams(prompt, responses, streams.prompt_valid, streams.responses_valid), kv


def final(params: Params, config: ModelConfig, hidden: Float[Array, "*N d"]) -> Float[Array, "*N d"]:
    """Applies the norm before the unembedding; logits are the product with `unembedding(params)`."""
    return _norm(hidden, params["final_norm"], config)


def hidden_states(
    params: Params, config: ModelConfig, tokens: Int[AnyArray, "N S"], valid: Bool[AnyArray, "N S"], *, dtype: Any
) -> Float[Array, "N S d"]:
    """Runs all layers over plain sequences, padded on the left; the states are those before the last norm."""
    streams = embed(params, config, tokens, valid, dtype=dtype)
    for stack in params["stacks"]:
        streams, _ = run_stack(stack, config, streams)
    return streams.prompt


def unembedding(params: Params) -> Float[Array, "V d"]:
    """The matrix whose rows score the tokens, the embeddings themselves where they are tied."""
    return params["unembed"] if "unembed" in params else params["embed"]


def empty_cache(stack: Params, config: ModelConfig, batch: int, samples: int, steps: int, dtype: Any) -> ResponseKV:
    """Room, zeros, for the keys and values of responses.

    Args:
      stack: one element of params["stacks"].
      config: the decoder's.
      batch: B prompts.
      samples: M responses per prompt.
      steps: T tokens per response.
      dtype: of the hidden states.
    """
    shape = (len(stack["q"]["kernel"]), batch, samples, config.num_kv_heads, steps, config.head_dim)
    return jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)


def decode(
    stack: Params,
    config: ModelConfig,
    hidden: Float[Array, "B M d"],
    prompt_kv: PromptKV,
    prompt_valid: Bool[AnyArray, "B P"],
    cache: ResponseKV,
    step: Int[Array, ""],
    *,
    active: Packing | None = None,
) -> tuple[Float[Array, "B M d"], ResponseKV]:
    """Runs the layers of one stack over one new token of every response.

    Where the rope depends on the length of the sequence (Dynamic, LongRope), each step takes the length so far and
    leaves the keys that are already cached as they are, like cached generation in transformers; past the rule's
    threshold this differs from `run_stack` over the whole responses.

    Args:
      stack: one element of params["stacks"]; before a loop over steps, cast it to the dtype of `hidden`.
      config: the decoder's.
      hidden: of the new tokens before the stack.
      prompt_kv: from `run_stack`.
      prompt_valid: False on padding.
      cache: the responses' keys and values, filled at positions before `step`.
      step: the position of the new token in its response.
      active: those of the B M responses that go on; None: all. What is returned of the others means nothing.

    Returns:
      The hidden states after the stack, and the cache filled at `step` too.
    """
    batch, samples, d = hidden.shape
    positions = (jnp.sum(prompt_valid, axis=1) + step)[:, None, None]
    rotations = rope.rotations(config, positions, positions[:, 0, 0] + 1)
    filled = jnp.arange(cache[0].shape[4])[None] <= step

    def body(x: Float[Array, "*N d"], layer: tuple[Params, PromptKV, ResponseKV]) -> tuple[Float[Array, "*N d"], KV]:
        weights, layer_prompt_kv, layer_cache = layer
        x = partition.constrain(x, "batch") if active is None else x

        def attend(
            q: Float[Array, "N _q"], k: Float[Array, "N _kv"], v: Float[Array, "N _kv"]
        ) -> tuple[Float[Array, "N _q"], KV]:
            if active is not None:
                q, k, v = (packing.spread(rows, active) for rows in (q, k, v))
            new_q, new_kv = _heads(config, (batch, samples, 1), rotations, q, k, v)
            own_kv = _put_at(layer_cache, new_kv, step)
            out = _attend_shared(new_q, layer_prompt_kv, prompt_valid, own_kv, filled)
            return out if active is None else packing.pack(out, active), new_kv

        rows, kept = _layer(partition.gathered(weights, layer_specs, x.dtype), config, x.reshape(-1, d), attend)
        return rows.reshape(x.shape), kept

    layer_specs = abstract(config)["stacks"][0]
    x = hidden if active is None else packing.pack(hidden.reshape(-1, d), active)
    x, new_kv = jax.lax.scan(body, x, (stack, prompt_kv, cache))
    x = x if active is None else packing.spread(x, active).reshape(hidden.shape)
    # Written once for all layers: a cache that the scan over layers returned would be copied whole at every step.
    return x, _put_at(cache, new_kv, step)


def _put_at(cache: ResponseKV, new: KV, step: Int[Array, ""]) -> ResponseKV:
    """The cache with the new keys and values, one for each response, at position `step`."""
    k, v = (jax.lax.dynamic_update_slice_in_dim(old, new, step, axis=-2) for old, new in zip(cache, new, strict=True))
    return k, v


def _norm(x: Float[Array, "*N d"], weights: Params, config: ModelConfig) -> Float[Array, "*N d"]:
    """The family's norm."""
    return (rms_norm if config.norm == "rms" else layer_norm)(x, weights, config.norm_eps)


def _layer(
    layer: Params,
    config: ModelConfig,
    x: Float[Array, "N d"],
    attend: Callable[[Array, Array, Array], tuple[Array, KV]],
) -> tuple[Float[Array, "N d"], KV]:
    """One layer over tokens; `attend` mixes tokens, given their q, k and v, and says what to keep of them."""
    normed = _norm(x, layer["attention_norm"], config)
    q, k, v = (linear(normed, layer[name]) for name in ("q", "k", "v"))
    if config.head_norms:
        q, k = _norm_heads(q, layer["q_norm"], config), _norm_heads(k, layer["k_norm"], config)
    out, kept = attend(q, k, v)
    attended = x + linear(out, layer["o"])
    normed = _norm(x if config.parallel_residual else attended, layer["mlp_norm"], config)
    inner = ACTIVATIONS[config.activation](linear(normed, layer["gate" if config.gated_mlp else "up"]))
    if config.gated_mlp:
        inner = inner * linear(normed, layer["up"])
    return attended + linear(inner, layer["down"]), kept


def _norm_heads(rows: Float[Array, "N H"], weights: Params, config: ModelConfig) -> Float[Array, "N H"]:
    """The family's norm over each head's features; H: of all heads."""
    return _norm(rows.reshape(len(rows), -1, config.head_dim), weights, config).reshape(rows.shape)


def _heads(
    config: ModelConfig,
    shape: tuple[int, ...],
    rotations: tuple[Float[Array, "*S r"], Float[Array, "*S r"]],
    q: Float[Array, "*N q"],
    k: Float[Array, "*N kv"],
    v: Float[Array, "*N kv"],
) -> tuple[Float[Array, "... k g h"], KV]:
    """Features of `shape`'s tokens, whatever the axes N, as scaled and rotated q [*shape, k, g, h], and k and v by heads.

    k and v are [B, ..., k, S, h], heads before tokens, which XLA's CPU multiplies without copying them first.
    """
    cos, sin = (part[..., None, :] for part in rotations)
    q, k, v = (rows.reshape(*shape, -1, config.head_dim) for rows in (q, k, v))
    q = rope.rotate(q * config.head_dim**-0.5, cos, sin).reshape(*shape, config.num_kv_heads, -1, config.head_dim)
    return q, (jnp.swapaxes(rope.rotate(k, cos, sin), -3, -2), jnp.swapaxes(v, -3, -2))


def _attend_within(q: Float[Array, "B P k g h"], kv: PromptKV, valid: Bool[AnyArray, "B P"]) -> Float[Array, "N _q"]:
    """Causal attention of tokens to the valid ones among themselves, as rows of N = B P tokens."""
    k, v = kv
    batch, length = valid.shape
    mask = valid[:, None, :] & (jnp.arange(length) <= jnp.arange(length)[:, None])
    scores = jnp.einsum("bskgh,bkrh->bksgr", q, k, preferred_element_type=jnp.float32)
    weights = jax.nn.softmax(jnp.where(mask[:, None, :, None, :], scores, _MASKED), axis=-1)
    return jnp.einsum("bksgr,bkrh->bskgh", weights.astype(v.dtype), v).reshape(batch * length, -1)


def _attend_shared(
    q: Float[Array, "B M S k g h"],
    prompt_kv: PromptKV,
    prompt_valid: Bool[AnyArray, "B P"],
    own_kv: ResponseKV,
    own: Bool[Array, "S T"],
) -> Float[Array, "N _q"]:
    """Attention of S tokens of each response to their prompt and to their own response's T tokens, as rows of N = B M S.

    One softmax over both, whose sums are taken apart so that the prompt's keys and values are neither repeated for
    the M responses nor joined with theirs; own: who may attend to whom.
    """
    to_prompt = jnp.einsum("bmskgh,bkrh->bkmsgr", q, prompt_kv[0], preferred_element_type=jnp.float32)
    to_prompt = jnp.where(prompt_valid[:, None, None, None, None, :], to_prompt, _MASKED)
    to_own = jnp.einsum("bmskgh,bmkrh->bmksgr", q, own_kv[0], preferred_element_type=jnp.float32)
    to_own = jnp.where(own[:, None, :], to_own, _MASKED)
    largest = jnp.maximum(jnp.swapaxes(jnp.max(to_prompt, -1), 1, 2), jnp.max(to_own, -1))
    largest = jax.lax.stop_gradient(largest)[..., None]
    to_prompt = jnp.exp(to_prompt - jnp.swapaxes(largest, 1, 2))
    to_own = jnp.exp(to_own - largest)
    total = jnp.swapaxes(jnp.sum(to_prompt, -1), 1, 2) + jnp.sum(to_own, -1)
    dtype = q.dtype
    from_prompt = jnp.einsum("bkmsgr,bkrh->bmksgh", to_prompt.astype(dtype), prompt_kv[1])
    from_own = jnp.einsum("bmksgr,bmkrh->bmksgh", to_own.astype(dtype), own_kv[1])
    out = (from_prompt + from_own) / total[..., None].astype(dtype)
    batch, samples, length = q.shape[:3]
    return jnp.moveaxis(out, 2, 3).reshape(batch * samples * length, -1)


def divide(params: Params, num_trained_stacks: int | None) -> tuple[Params, Params]:
    """Divides parameters into (frozen, trained), which `join` puts together again.

    Args:
      params: a decoder's parameters.
      num_trained_stacks: the last so many stacks of layers and the last norm are trained; None: everything.
    """
    if num_trained_stacks is None:
        return {"stacks": ()}, params
    trained = {"stacks": params["stacks"][-num_trained_stacks:], "final_norm": params["final_norm"]}
    frozen = {name: value for name, value in params.items() if name not in trained}
    return {**frozen, "stacks": params["stacks"][:-num_trained_stacks]}, trained


def join(frozen: Params, trained: Params) -> Params:
    """Returns the whole tree of parameters of the two parts of `divide`."""
    return {**frozen, **trained, "stacks": (*frozen["stacks"], *trained["stacks"])}
