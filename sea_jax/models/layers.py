"""What decoders and encoders have in common: norms, linear maps and activation functions."""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp

ACTIVATIONS: Mapping[str, Callable[[jax.Array], jax.Array]] = {
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_new": lambda x: jax.nn.gelu(x, approximate=True),
    "gelu_fast": lambda x: jax.nn.gelu(x, approximate=True),
    "gelu_pytorch_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
    "swish": jax.nn.silu,
    "tanh": jnp.tanh,
}
"""The activation functions, by the names that Hugging Face configurations use."""


def linear(x: jax.Array, weights: Mapping[str, jax.Array]) -> jax.Array:
    """Applies x @ kernel + bias in the dtype of x.

    Args:
      x: [N, in]; two axes, because XLA's CPU bfloat16 gradient through more of them is many times slower.
      weights: "kernel" [in, out] and, where the layer has one, "bias" [out].

    Returns:
      [N, out] in the dtype of x.
    """
    out = x @ weights["kernel"].astype(x.dtype)
    return out + weights["bias"].astype(x.dtype) if "bias" in weights else out


def rms_norm(x: jax.Array, weights: Mapping[str, jax.Array], eps: float) -> jax.Array:
    """Root mean square norm (https://arxiv.org/abs/1910.07467), computed in float32.

    Args:
      x: [..., d].
      weights: "scale" [d].
      eps: added to the mean square.

    Returns:
      [..., d] in the dtype of x.
    """
    wide = x.astype(jnp.float32)
    wide = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + eps)
    return (wide * weights["scale"].astype(jnp.float32)).astype(x.dtype)


def layer_norm(x: jax.Array, weights: Mapping[str, jax.Array], eps: float) -> jax.Array:
    """Layer norm (https://arxiv.org/abs/1607.06450), computed in float32.

    Args:
      x: [..., d].
      weights: "scale" [d] and "bias" [d].
      eps: added to the variance.

    Returns:
      [..., d] in the dtype of x.
    """
    wide = x.astype(jnp.float32)
    wide = wide - jnp.mean(wide, axis=-1, keepdims=True)
    wide = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + eps)
    return (wide * weights["scale"].astype(jnp.float32) + weights["bias"].astype(jnp.float32)).astype(x.dtype)
