"""A BERT encoder (https://arxiv.org/abs/1810.04805) as pure functions over stacked layers."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.nn.initializers import normal
from jaxtyping import Bool, Float, Float32, Int, PRNGKeyArray

from sea_jax.models import partition
from sea_jax.models.config import EncoderConfig
from sea_jax.models.layers import ACTIVATIONS, layer_norm, linear
from sea_jax.models.parameters import ParamSpec, initialise, matrices, norm
from sea_jax.types import AnyArray, Array, Params


def abstract(config: EncoderConfig) -> Params:
    """The parameter tree with a ParamSpec for every leaf, from which init, loading and sharding derive.

    Returns:
      {"embed": {"word": [V, d], "position": [positions, d], "token_type": [types, d]}, "embed_norm": {...},
      "stacks": (one dict of [L, ...] leaves,)}.
    """
    weight, d = normal(config.init_std), config.d_model
    return {
        "embed": {
            "word": ParamSpec((config.vocab_size, d), ("vocab", "embed"), weight),
            "position": ParamSpec((config.max_positions, d), (None, "embed"), weight),
            "token_type": ParamSpec((config.num_token_types, d), (None, "embed"), weight),
        },
        "embed_norm": norm(d),
        "stacks": (layers(config.num_layers, d, config.d_ff, weight),),
    }


def layers(num_layers: int, d_model: int, d_ff: int, weight: Callable[..., Array]) -> Params:
    """The ParamSpec, [L, ...], of an encoder's layers, a norm behind each half of a layer.

    Args:
      num_layers: L.
      d_model: d.
      d_ff: width of the inner half.
      weight: initialiser of the matrices.
    """
    n, d = num_layers, d_model
    return {
        "q": matrices((n, d, d), ("embed", "heads"), weight),
        "k": matrices((n, d, d), ("embed", "heads"), weight),
        "v": matrices((n, d, d), ("embed", "heads"), weight),
        "o": matrices((n, d, d), ("heads", "embed"), weight),
        "attention_norm": norm(n, d),
        "up": matrices((n, d, d_ff), ("embed", "mlp"), weight),
        "down": matrices((n, d_ff, d), ("mlp", "embed"), weight),
        "mlp_norm": norm(n, d),
    }


def init(config: EncoderConfig, key: PRNGKeyArray) -> Params:
    """Random parameters in float32: matrices normal with the configuration's standard deviation, biases 0, norm scales 1."""
    return initialise(abstract(config), key)


def apply(
    params: Params,
    config: EncoderConfig,
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
      dtype: in which the layers compute; norms and softmax are float32.

    Returns:
      Hidden states after the last layer, in `dtype`.

    Raises:
      ValueError: S exceeds the positions that the encoder has embeddings for.
    """
    batch, length = tokens.shape
    if length > config.max_positions:
        raise ValueError(f"sequences of {length} tokens exceed the encoder's {config.max_positions} positions")
    table = params["embed"]
    x = (
        table["word"][tokens]
        + table["token_type"][0 if token_types is None else token_types]
        + table["position"][:length]
    )
    x = layer_norm(x, params["embed_norm"], config.norm_eps).astype(dtype).reshape(batch * length, -1)
    # Finite, so that a row without a valid token still gets finite numbers.
    bias = jnp.where(valid, 0.0, -1e30)[:, None, None, :]

    layer_specs = abstract(config)["stacks"][0]

    def body(x: Float[Array, "N d"], layer: Params) -> tuple[Float[Array, "N d"], None]:
        layer = partition.gathered(layer, layer_specs, x.dtype)
        x = partition.constrain(x, "batch")
        q, k, v = (linear(x, layer[name]).reshape(batch, length, config.num_heads, -1) for name in ("q", "k", "v"))
        scores = jnp.einsum("bqhd,bkhd->bhqk", q, k, preferred_element_type=jnp.float32) * q.shape[-1] ** -0.5
        weights = jax.nn.softmax(scores + bias, axis=-1).astype(dtype)
        out = jnp.einsum("bhqk,bkhd->bqhd", weights, v).reshape(batch * length, -1)
        x = layer_norm(x + linear(out, layer["o"]), layer["attention_norm"], config.norm_eps)
        inner = ACTIVATIONS[config.activation](linear(x, layer["up"]))
        return layer_norm(x + linear(inner, layer["down"]), layer["mlp_norm"], config.norm_eps), None

    x, _ = jax.lax.scan(body, x, params["stacks"][0])
    return x.reshape(batch, length, -1)


def mean_pool(hidden: Float[Array, "B S d"], valid: Bool[AnyArray, "B S"]) -> Float32[Array, "B d"]:
    """Averages hidden states over the valid tokens, the sentence embedding of Sentence-BERT (https://arxiv.org/abs/1908.10084).

    It is not normalised; zeros where no token is valid.
    """
    weights = valid.astype(jnp.float32)[..., None]
    total = jnp.sum(hidden.astype(jnp.float32) * weights, axis=1)
    return total / jnp.maximum(jnp.sum(weights, axis=1), 1.0)
