"""A decoder for Llama and GPT-NeoX as pure functions over stacked layers, for prompts shared by many responses."""

from collections.abc import Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.nn.initializers import normal, ones, zeros

from sea_jax.models import rope
from sea_jax.models.config import ModelConfig
from sea_jax.models.layers import ACTIVATIONS, layer_norm, linear, rms_norm
from sea_jax.models.parameters import Params, ParamSpec, initialise

KV = tuple[jax.Array, jax.Array]
"""Rotated keys and values of some layers."""

# Finite, so that a padding token, which may attend to nothing, still gets finite numbers and gradients.
_MASKED = -1e30


@flax.struct.dataclass
class Streams:
    """Prompts and the M responses that share each, as hidden states; `responses` is None for prompts alone.

    prompt: [B, P, d]; prompt_valid: bool [B, P], padding on the left, so that the last token is at P - 1.
    responses: [B, M, T, d]; responses_valid: bool [B, M, T], padding on the right.
    """

    prompt: jax.Array
    responses: jax.Array | None
    prompt_valid: jax.Array
    responses_valid: jax.Array | None


def abstract(config: ModelConfig, cuts: Sequence[int] = ()) -> Params:
    """The parameter tree with a ParamSpec for every leaf, from which init, loading and sharding derive.

    Args:
        config: the decoder's configuration.
        cuts: layer numbers, ascending, at which the layers are divided into stacks; (20,) gives [0, 20) and [20, L).

    Returns:
        {"embed": [V, d], "stacks": one dict of [n_i, ...] leaves per stack, "final_norm": {...}} and, where the
        embeddings are not tied, "unembed": [V, d].

    Raises:
        ValueError: cuts that are not ascending or not strictly between 0 and the number of layers.
    """
    weight = normal(config.init_std)
    bounds = (0, *cuts, config.num_layers)
    if any(low >= high for low, high in zip(bounds[:-1], bounds[1:], strict=True)):
        raise ValueError(f"cuts {tuple(cuts)} must ascend strictly between 0 and {config.num_layers} layers")

    def norm(*stacked: int) -> Params:
        axes = ("layers",) * len(stacked) + (None,)
        scale = ParamSpec((*stacked, config.d_model), axes, ones)
        bias = ParamSpec((*stacked, config.d_model), axes, zeros)
        return {"scale": scale, "bias": bias} if config.norm == "layer" else {"scale": scale}

    def matrix(n: int, rows: int, columns: int, axes: tuple[str, str], bias: bool) -> Params:
        kernel = ParamSpec((n, rows, columns), ("layers", *axes), weight)
        if not bias:
            return {"kernel": kernel}
        return {"kernel": kernel, "bias": ParamSpec((n, columns), ("layers", axes[1]), zeros)}

    def stack(n: int) -> Params:
        d, q, kv = config.d_model, config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        layers = {
            "attention_norm": norm(n),
            "q": matrix(n, d, q, ("embed", "heads"), config.attention_bias),
            "k": matrix(n, d, kv, ("embed", "kv_heads"), config.attention_bias),
            "v": matrix(n, d, kv, ("embed", "kv_heads"), config.attention_bias),
            "o": matrix(n, q, d, ("heads", "embed"), config.attention_bias),
            "mlp_norm": norm(n),
            "up": matrix(n, d, config.d_ff, ("embed", "mlp"), config.mlp_bias),
            "down": matrix(n, config.d_ff, d, ("mlp", "embed"), config.mlp_bias),
        }
        if config.gated_mlp:
            layers["gate"] = matrix(n, d, config.d_ff, ("embed", "mlp"), config.mlp_bias)
        return layers

    table = ParamSpec((config.vocab_size, config.d_model), ("vocab", "embed"), weight)
    params: Params = {
        "embed": table,
        "stacks": tuple(stack(high - low) for low, high in zip(bounds[:-1], bounds[1:], strict=True)),
        "final_norm": norm(),
    }
    return params if config.tie_embeddings else params | {"unembed": table}


def init(config: ModelConfig, key: jax.Array, cuts: Sequence[int] = ()) -> Params:
    """Random parameters: matrices normal with the configuration's standard deviation, biases 0, norm scales 1.

    Args:
        config: the decoder's configuration.
        key: a random key.
        cuts: where the layers are divided into stacks, see `abstract`.

    Returns:
        The parameters, float32.
    """
    return initialise(abstract(config, cuts), key)


def recut(params: Params, cuts: Sequence[int]) -> Params:
    """Divides the same layers into other stacks; numpy arrays stay numpy arrays.

    Args:
        params: a decoder's parameters, however its layers are divided.
        cuts: where the layers are divided, see `abstract`.

    Returns:
        The parameters with the layers divided at the cuts.

    Raises:
        ValueError: cuts that are not ascending or not strictly between 0 and the number of layers.
    """
    num_layers = sum(len(stack["q"]["kernel"]) for stack in params["stacks"])
    bounds = (0, *cuts, num_layers)
    if any(low >= high for low, high in zip(bounds[:-1], bounds[1:], strict=True)):
        raise ValueError(f"cuts {tuple(cuts)} must ascend strictly between 0 and {num_layers} layers")

    def join(*leaves: Any) -> Any:
        if len(leaves) == 1:
            return leaves[0]
        return np.concatenate(leaves) if isinstance(leaves[0], np.ndarray) else jnp.concatenate(leaves)

    whole = jax.tree.map(join, *params["stacks"])
    pairs = zip(bounds[:-1], bounds[1:], strict=True)
    stacks = tuple(jax.tree.map(lambda leaf, low=low, high=high: leaf[low:high], whole) for low, high in pairs)
    return params | {"stacks": stacks}


def embed(
    params: Params,
    config: ModelConfig,
    prompt_tokens: jax.Array,
    prompt_valid: jax.Array,
    response_tokens: jax.Array | None = None,
    responses_valid: jax.Array | None = None,
    *,
    dtype: Any,
) -> Streams:
    """Looks up the embeddings of prompts and responses.

    Args:
        params: the decoder's parameters.
        config: the decoder's configuration.
        prompt_tokens: int [B, P], padded on the left.
        prompt_valid: bool [B, P], False on padding.
        response_tokens: int [B, M, T], padded on the right, or None.
        responses_valid: bool [B, M, T], False on padding, or None.
        dtype: the dtype in which all later layers compute.

    Returns:
        The streams before the first layer.
    """
    table = params["embed"]
    responses = None if response_tokens is None else table[response_tokens].astype(dtype)
    return Streams(table[prompt_tokens].astype(dtype), responses, prompt_valid, responses_valid)


def run_stack(stack: Params, config: ModelConfig, streams: Streams, *, remat: bool = False) -> tuple[Streams, KV]:
    """Runs the layers of one stack over prompts and responses.

    Every prompt token attends to the valid prompt tokens up to itself; every response token to all valid prompt
    tokens and to its own response up to itself. A prompt token's position is the number of valid prompt tokens before
    it, that of response token t the prompt's length plus t.

    Where the rope depends on the length of the sequence (Dynamic, LongRope), that is the prompt's length plus its
    longest response's, so that M responses can share their prompt: a shorter response of the same prompt differs from
    a forward pass of its own once the longest passes the rule's threshold. Below the threshold all agree.

    Args:
        stack: one element of params["stacks"], leaves [n, ...].
        config: the decoder's configuration.
        streams: hidden states before the stack.
        remat: whether the backward pass computes each layer again rather than keep what is inside it.

    Returns:
        The streams after the stack, and the prompt's keys and values, each [n, B, P, KV heads, head_dim].
    """
    batch, prompt_length, d = streams.prompt.shape
    prompt_count = batch * prompt_length
    lengths = jnp.sum(streams.prompt_valid, axis=1)
    longest = lengths
    prompt_positions = jnp.maximum(jnp.cumsum(streams.prompt_valid, axis=1) - 1, 0)
    # [B, 1, 1, P, P]: from any prompt token to the valid ones up to it.
    causal = jnp.tril(jnp.ones((prompt_length, prompt_length), bool))
    prompt_mask = (causal & streams.prompt_valid[:, None, :])[:, None, None]
    if streams.responses is not None:
        assert streams.responses_valid is not None
        _, samples, steps, _ = streams.responses.shape
        longest = lengths + jnp.max(jnp.sum(streams.responses_valid, axis=2), axis=1)
        response_rotations = rope.rotations(config, lengths[:, None] + jnp.arange(steps), longest)
        response_rotations = tuple(part[:, None, :, None, :] for part in response_rotations)
        own_causal = jnp.tril(jnp.ones((steps, steps), bool))
        own_mask = (own_causal & streams.responses_valid[:, :, None, :])[:, :, None, None]
    prompt_rotations = tuple(part[:, :, None, :] for part in rope.rotations(config, prompt_positions, longest))

    def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, KV]:
        q, k, v = (rows.reshape(len(rows), -1, config.head_dim) for rows in (q, k, v))
        shape = (batch, prompt_length, -1, config.head_dim)
        prompt_q = rope.rotate(q[:prompt_count].reshape(shape), *prompt_rotations)
        prompt_k = rope.rotate(k[:prompt_count].reshape(shape), *prompt_rotations)
        prompt_v = v[:prompt_count].reshape(shape)
        scores = _scores(prompt_q, prompt_k)
        prompt_out = _mix(_softmax(jnp.where(prompt_mask, scores, _MASKED)), prompt_v)
        outs = [prompt_out.reshape(prompt_count, -1)]
        if streams.responses is not None:
            shape = (batch, samples, steps, -1, config.head_dim)
            own_q = rope.rotate(q[prompt_count:].reshape(shape), *response_rotations)
            own_k = rope.rotate(k[prompt_count:].reshape(shape), *response_rotations)
            own_v = v[prompt_count:].reshape(shape)
            outs.append(
                _attend_shared(own_q, own_k, own_v, own_mask, prompt_k, prompt_v, streams.prompt_valid).reshape(
                    batch * samples * steps, -1
                )
            )
        return jnp.concatenate(outs), (prompt_k, prompt_v)

    def body(x: jax.Array, layer: Params) -> tuple[jax.Array, KV]:
        return _layer(layer, config, x, attend)

    rows = [streams.prompt.reshape(-1, d)]
    if streams.responses is not None:
        rows.append(streams.responses.reshape(-1, d))
    x, kv = jax.lax.scan(jax.checkpoint(body) if remat else body, jnp.concatenate(rows), stack)
    responses = None if streams.responses is None else x[prompt_count:].reshape(streams.responses.shape)
    return streams.replace(prompt=x[:prompt_count].reshape(streams.prompt.shape), responses=responses), kv


def final(params: Params, config: ModelConfig, hidden: jax.Array) -> jax.Array:
    """Applies the norm that stands before the unembedding.

    Args:
        params: the decoder's parameters.
        config: the decoder's configuration.
        hidden: [..., d] hidden states after the last stack.

    Returns:
        [..., d]; logits are their product with `unembedding(params)`.
    """
    return _norm(hidden, params["final_norm"], config)


def unembedding(params: Params) -> jax.Array:
    """The matrix [V, d] whose rows score the tokens, the embeddings themselves where they are tied.

    Args:
        params: the decoder's parameters.

    Returns:
        [V, d].
    """
    return params["unembed"] if "unembed" in params else params["embed"]


def empty_cache(stack: Params, config: ModelConfig, batch: int, samples: int, steps: int, dtype: Any) -> KV:
    """Room for the keys and values of responses.

    Args:
        stack: one element of params["stacks"].
        config: the decoder's configuration.
        batch: B prompts.
        samples: M responses per prompt.
        steps: T tokens per response.
        dtype: the dtype of the hidden states.

    Returns:
        Zeros, each [n, B, M, T, KV heads, head_dim].
    """
    shape = (len(stack["q"]["kernel"]), batch, samples, steps, config.num_kv_heads, config.head_dim)
    return jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)


def decode(
    stack: Params,
    config: ModelConfig,
    hidden: jax.Array,
    prompt_kv: KV,
    prompt_valid: jax.Array,
    cache: KV,
    step: jax.Array,
) -> tuple[jax.Array, KV]:
    """Runs the layers of one stack over one new token of every response.

    Where the rope depends on the length of the sequence (Dynamic, LongRope), each step uses the length so far and
    leaves the cached keys as they are, as cached generation in transformers does; past the rule's threshold this
    differs from `run_stack` over the whole responses.

    Args:
        stack: one element of params["stacks"]; cast it to the dtype of `hidden` before a loop over steps.
        config: the decoder's configuration.
        hidden: [B, M, d] hidden states of the new tokens before the stack.
        prompt_kv: the prompt's keys and values from `run_stack`.
        prompt_valid: bool [B, P].
        cache: the responses' keys and values, filled at positions before `step`.
        step: int32 scalar, the position of the new token in its response.

    Returns:
        The hidden states [B, M, d] after the stack, and the cache filled at `step` too.
    """
    batch, samples, d = hidden.shape
    steps = cache[0].shape[3]
    positions = jnp.sum(prompt_valid, axis=1) + step
    rotation = tuple(part[:, None, None, None, :] for part in rope.rotations(config, positions, positions + 1))
    own_mask = (jnp.arange(steps) <= step)[None, None, None, None, None]

    def body(x: jax.Array, layer_and_kv: tuple[Params, KV, KV]) -> tuple[jax.Array, KV]:
        layer, (prompt_k, prompt_v), (own_k, own_v) = layer_and_kv

        def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, KV]:
            q, k, v = (rows.reshape(batch, samples, 1, -1, config.head_dim) for rows in (q, k, v))
            q, k = rope.rotate(q, *rotation), rope.rotate(k, *rotation)
            new_k = jax.lax.dynamic_update_slice_in_dim(own_k, k, step, axis=2)
            new_v = jax.lax.dynamic_update_slice_in_dim(own_v, v, step, axis=2)
            out = _attend_shared(q, new_k, new_v, own_mask, prompt_k, prompt_v, prompt_valid)
            return out.reshape(batch * samples, -1), (new_k, new_v)

        return _layer(layer, config, x, attend)

    x, cache = jax.lax.scan(body, hidden.reshape(-1, d), (stack, prompt_kv, cache))
    return x.reshape(hidden.shape), cache


def _norm(x: jax.Array, weights: Params, config: ModelConfig) -> jax.Array:
    """The family's norm."""
    return (rms_norm if config.norm == "rms" else layer_norm)(x, weights, config.norm_eps)


def _layer(layer: Params, config: ModelConfig, x: jax.Array, attend: Any) -> tuple[jax.Array, KV]:
    """One layer over tokens [N, d]; `attend` maps the rows of q, k and v to the attention's rows and something to keep."""
    normed = _norm(x, layer["attention_norm"], config)
    out, kept = attend(*(linear(normed, layer[name]) for name in ("q", "k", "v")))
    after_attention = x + linear(out, layer["o"])
    normed = _norm(x if config.parallel_residual else after_attention, layer["mlp_norm"], config)
    activation = ACTIVATIONS[config.activation]
    if config.gated_mlp:
        inner = activation(linear(normed, layer["gate"])) * linear(normed, layer["up"])
    else:
        inner = activation(linear(normed, layer["up"]))
    return after_attention + linear(inner, layer["down"]), kept


def _grouped(q: jax.Array, kv_heads: int) -> jax.Array:
    """Splits the heads axis of [..., H, h] into [..., KV heads, H / KV heads, h]."""
    return q.reshape(*q.shape[:-2], kv_heads, -1, q.shape[-1])


def _scores(q: jax.Array, k: jax.Array) -> jax.Array:
    """Scaled products of q [..., S, H, h] and k [..., R, KV heads, h] as float32 [..., KV heads, H / KV heads, S, R]."""
    grouped = _grouped(q, k.shape[-2]) * q.shape[-1] ** -0.5
    return jnp.einsum("...skgh,...rkh->...kgsr", grouped, k, preferred_element_type=jnp.float32)


def _mix(weights: jax.Array, v: jax.Array) -> jax.Array:
    """Values [..., R, KV heads, h] averaged by weights [..., KV heads, G, S, R] into [..., S, KV heads, G, h]."""
    return jnp.einsum("...kgsr,...rkh->...skgh", weights.astype(v.dtype), v)


def _softmax(scores: jax.Array) -> jax.Array:
    return jax.nn.softmax(scores, axis=-1)


def _attend_shared(
    q: jax.Array,
    own_k: jax.Array,
    own_v: jax.Array,
    own_mask: jax.Array,
    prompt_k: jax.Array,
    prompt_v: jax.Array,
    prompt_valid: jax.Array,
) -> jax.Array:
    """Attention of responses q [B, M, S, H, h] to their prompt [B, P, ...] and to themselves [B, M, R, ...]."""
    batch, samples, length = q.shape[:3]
    prompt_length = prompt_k.shape[1]
    # The M responses stand in one row of queries against their prompt's keys, so that these are never copied.
    flat = q.reshape(batch, samples * length, *q.shape[3:])
    to_prompt = _scores(flat, prompt_k)
    to_prompt = jnp.where(prompt_valid[:, None, None, None, :], to_prompt, _MASKED)
    kv_heads, group = to_prompt.shape[1:3]
    to_prompt = to_prompt.reshape(batch, kv_heads, group, samples, length, prompt_length)
    to_prompt = jnp.moveaxis(to_prompt, 3, 1)
    to_own = jnp.where(own_mask, _scores(q, own_k), _MASKED)
    weights = _softmax(jnp.concatenate([to_prompt, to_own], axis=-1))
    on_prompt = jnp.moveaxis(weights[..., :prompt_length], 1, 3)
    on_prompt = on_prompt.reshape(batch, kv_heads, group, samples * length, prompt_length)
    out = _mix(on_prompt, prompt_v).reshape(batch, samples, length, kv_heads, group, -1)
    return out + _mix(weights[..., prompt_length:], own_v)
