"""What decoders and encoders have in common: norms, linear maps and activation functions."""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Float

from sea_jax.types import Array

ACTIVATIONS: Mapping[str, Callable[[Array], Array]] = {
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


def linear(x: Float[Array, "N in"], weights: Mapping[str, Array]) -> Float[Array, "N out"]:
    """Applies x @ kernel + bias in the dtype of x.

    Args:
      x: two axes, because XLA's CPU bfloat16 gradient through more of them is many times slower.
      weights: "kernel" [in, out] and, where the layer has one, "bias" [out].
    """
    out = x @ weights["kernel"].astype(x.dtype)
    return out + weights["bias"].astype(x.dtype) if "bias" in weights else out


def rms_norm(x: Float[Array, "*N d"], weights: Mapping[str, Array], eps: float) -> Float[Array, "*N d"]:
    """Root mean square norm (https://arxiv.org/abs/1910.07467), computed in float32, returned in the dtype of x.

    Args:
      x: hidden states.
      weights: "scale" [d].
      eps: added to the mean square.
    """
    wide = x.astype(jnp.float32)
    wide = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + eps)
    return (wide * weights["scale"].astype(jnp.float32)).astype(x.dtype)


def layer_norm(x: Float[Array, "*N d"], weights: Mapping[str, Array], eps: float) -> Float[Array, "*N d"]:
    """Layer norm (https://arxiv.org/abs/1607.06450), computed in float32, returned in the dtype of x.

    Args:
      x: hidden states.
      weights: "scale" [d] and "bias" [d].
      eps: added to the variance.
    """
    wide = x.astype(jnp.float32)
    wide = wide - jnp.mean(wide, axis=-1, keepdims=True)
    wide = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + eps)
    return (wide * weights["scale"].astype(jnp.float32) + weights["bias"].astype(jnp.float32)).astype(x.dtype)
