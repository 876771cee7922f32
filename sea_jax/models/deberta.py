"""A DeBERTa-v2/v3 encoder (https://arxiv.org/abs/2006.03654, https://arxiv.org/abs/2111.09543) over stacked layers."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.nn.initializers import normal, zeros
from jaxtyping import Bool, Float, Int, Int32, PRNGKeyArray

from sea_jax.models import encoder, partition
from sea_jax.models.config import DebertaConfig
from sea_jax.models.layers import ACTIVATIONS, layer_norm, linear
from sea_jax.models.parameters import ParamSpec, initialise, matrices, norm
from sea_jax.types import AnyArray, Array, Params


def abstract(config: DebertaConfig) -> Params:
    """The parameter tree with a ParamSpec for every leaf, from which init, loading and sharding derive.

    Returns:
      {"embed": {"word": [V, d], "position": [positions, d], "token_type": [types, d]}, "embed_norm": {...},
      "relative": [2 span, d], "relative_norm": {...}, "conv": {"kernel": [width, d, d], "bias": [d]}, "conv_norm": {...},
      "stacks": (one dict of [L, ...] leaves,), "pooler": {"kernel": [d, d], "bias": [d]}, "classifier": {"kernel": [d, 1],
      "bias": [1]}}, without those that the configuration switches off.
    """
    weight, d = normal(config.init_std), config.d_model
    layers = encoder.layers(config.num_layers, d, config.d_ff, weight)
    for term, name in (("c2p", "relative_k"), ("p2c", "relative_q")):
        if term in config.relative_terms and not config.share_projections:
            layers[name] = matrices((config.num_layers, d, d), ("embed", "heads"), weight)

    def table(rows: int) -> ParamSpec:
        return ParamSpec((rows, d), (None, "embed"), weight)

    tree: Params = {
        "embed": {"word": ParamSpec((config.vocab_size, d), ("vocab", "embed"), weight)},
        "embed_norm": norm(d),
        "relative": table(2 * config.relative_span),
        "stacks": (layers,),
    }
    if config.absolute_positions:
        tree["embed"]["position"] = table(config.max_positions)
    if config.num_token_types:
        tree["embed"]["token_type"] = table(config.num_token_types)
    if config.norm_relative:
        tree["relative_norm"] = norm(d)
    if config.conv_width:
        kernel = ParamSpec((config.conv_width, d, d), (None, None, "embed"), weight)
        tree |= {"conv": {"kernel": kernel, "bias": ParamSpec((d,), ("embed",), zeros)}, "conv_norm": norm(d)}
    if config.scalar_head:
        tree["pooler"] = {"kernel": ParamSpec((d, d), ("embed", None), weight), "bias": ParamSpec((d,), (None,), zeros)}
        tree["classifier"] = {
            "kernel": ParamSpec((d, 1), (None, None), weight),
            "bias": ParamSpec((1,), (None,), zeros),
        }
    return tree


def init(config: DebertaConfig, key: PRNGKeyArray) -> Params:
    """Random parameters in float32: matrices normal with the configuration's standard deviation, biases 0, norm scales 1."""
    return initialise(abstract(config), key)


def apply(
    params: Params,
    config: DebertaConfig,
    tokens: Int[AnyArray, "B S"],
    valid: Bool[AnyArray, "B S"],
    *,
    token_types: Int[AnyArray, "B S"] | None = None,
    dtype: Any,
) -> Float[Array, "B S d"]:
    """Runs the encoder; every token attends to all valid tokens of its sequence.

    Args:
      params: the encoder's.
      config: the encoder's.
      tokens: padded on the right.
      valid: False on padding.
      token_types: which sentence of a pair a token belongs to, or None: all of the first.
      dtype: in which the layers compute; norms, attention scores and softmax are float32.

    Returns:
      Hidden states after the last layer, in `dtype`.

    Raises:
      ValueError: S exceeds the absolute positions that the encoder has embeddings for, if it has any.
    """
    batch, length = tokens.shape
    if config.absolute_positions and length > config.max_positions:
        raise ValueError(f"sequences of {length} tokens exceed the encoder's {config.max_positions} positions")
    table = params["embed"]
    x = table["word"][tokens]
    if config.num_token_types:
        x = x + table["token_type"][0 if token_types is None else token_types]
    if config.absolute_positions:
        x = x + table["position"][:length]
    x = layer_norm(x, params["embed_norm"], config.norm_eps)
    embedded = jnp.where(valid[..., None], x, 0).astype(dtype)
    # Finite, so that a row without a valid token still gets finite numbers.
    bias = jnp.where(valid, 0.0, -1e30)[:, None, None, :]
    relative = params["relative"]
    if config.norm_relative:
        relative = layer_norm(relative, params["relative_norm"], config.norm_eps)
    relative = relative.astype(dtype)
    rows = jnp.asarray(relative_rows(config, length))[jnp.arange(length)[:, None] - jnp.arange(length) + length - 1]
    names = ("q", "k") if config.share_projections else ("relative_q", "relative_k")

    def heads(x: Float[Array, "*N d"]) -> Float[Array, "*N heads h"]:
        return x.reshape(*x.shape[:-1], config.num_heads, -1)

    def attention(x: Float[Array, "N d"], layer: Params) -> Float[Array, "N d"]:
        q, k, v = (heads(linear(x, layer[name]).reshape(batch, length, -1)) for name in ("q", "k", "v"))
        scores = jnp.einsum("bqhd,bkhd->bhqk", q, k, preferred_element_type=jnp.float32)
        if "c2p" in config.relative_terms:
            keys = heads(linear(relative, layer[names[1]]))
            every = jnp.einsum("bqhd,rhd->bhqr", q, keys, preferred_element_type=jnp.float32)
            scores += jnp.take_along_axis(every, rows[None, None], axis=-1)
        if "p2c" in config.relative_terms:
            queries = heads(linear(relative, layer[names[0]]))
            every = jnp.einsum("bkhd,rhd->bhkr", k, queries, preferred_element_type=jnp.float32)
            scores += jnp.take_along_axis(every, rows.T[None, None], axis=-1).swapaxes(-1, -2)
        scores *= (q.shape[-1] * (1 + len(config.relative_terms))) ** -0.5
        weights = jax.nn.softmax(scores + bias, axis=-1).astype(dtype)
        return jnp.einsum("bhqk,bkhd->bqhd", weights, v).reshape(batch * length, -1)

    def convolved(x: Float[Array, "N d"]) -> Float[Array, "N d"]:
        """What the first layer returns where the encoder convolves the embeddings too."""
        local = jax.lax.conv_general_dilated(
            embedded, params["conv"]["kernel"].astype(dtype), (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC")
        )
        local = jnp.where(valid[..., None], local + params["conv"]["bias"].astype(dtype), 0).reshape(x.shape)
        return layer_norm(x + ACTIVATIONS[config.conv_activation](local), params["conv_norm"], config.norm_eps)

    def body(x: Float[Array, "N d"], inputs: tuple[Params, Bool[Array, ""]]) -> tuple[Float[Array, "N d"], None]:
        layer, is_first = inputs
        layer = partition.gathered(layer, layer_specs, x.dtype)
        x = partition.constrain(x, "batch")
        x = layer_norm(x + linear(attention(x, layer), layer["o"]), layer["attention_norm"], config.norm_eps)
        inner = ACTIVATIONS[config.activation](linear(x, layer["up"]))
        x = layer_norm(x + linear(inner, layer["down"]), layer["mlp_norm"], config.norm_eps)
        return jax.lax.cond(is_first, convolved, lambda x: x, x) if config.conv_width else x, None

    layer_specs = abstract(config)["stacks"][0]
    is_first = jnp.arange(config.num_layers) == 0
    x, _ = jax.lax.scan(body, embedded.reshape(batch * length, -1), (params["stacks"][0], is_first))
    return x.reshape(batch, length, -1)


def relative_rows(config: DebertaConfig, length: int) -> Int32[np.ndarray, " 2*{length}-1"]:
    """Which row of the relative embeddings stands for each distance: exact when near, in logarithmic buckets when far.

    The distances are query minus key, from 1 - S to S - 1, of a sequence of S = `length` tokens.
    """
    distance = np.arange(1 - length, length)
    if config.position_buckets:
        middle = config.position_buckets // 2
        # In float32, which decides on which side of a bucket's edge some distances fall.
        far = np.log(np.maximum(np.abs(distance), middle).astype(np.float32) / np.float32(middle))
        farthest = np.log(np.float32((config.max_relative_positions - 1) / middle))
        far = np.ceil(far / farthest * np.float32(middle - 1)) + middle
        distance = np.where(np.abs(distance) <= middle, distance, np.sign(distance) * far)
    span = config.relative_span
    return np.clip(distance + span, 0, 2 * span - 1).astype(np.int32)
