"""Rotary position embedding: inverse frequencies of every scaling rule, and the rotation itself."""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Float32, Int

from sea_jax.types import AnyArray, Array

if TYPE_CHECKING:
    from sea_jax.models.config import ModelConfig


@dataclass(frozen=True)
class Linear:
    """Position interpolation: every frequency divided by `factor` (https://arxiv.org/abs/2306.15595)."""

    factor: float


@dataclass(frozen=True)
class Dynamic:
    """A base that grows once a sequence is longer than `max_positions` (https://arxiv.org/abs/2309.00071, B.2)."""

    factor: float


@dataclass(frozen=True)
class Yarn:
    """NTK-by-parts interpolation (https://arxiv.org/abs/2309.00071); `attention_factor` multiplies cos and sin."""

    factor: float
    attention_factor: float
    original_max_positions: int
    beta_fast: float
    beta_slow: float
    truncate: bool


@dataclass(frozen=True)
class LongRope:
    """One divisor per frequency, chosen by the sequence length (https://arxiv.org/abs/2402.13753)."""

    short_factors: tuple[float, ...]
    long_factors: tuple[float, ...]
    attention_factor: float
    original_max_positions: int


@dataclass(frozen=True)
class Llama3:
    """Low frequencies divided by `factor`, high ones kept, a ramp between (https://arxiv.org/abs/2407.21783, 3.4)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_positions: int


@dataclass(frozen=True)
class Proportional:
    """The first `rope_fraction` of the frequencies of a full rotation, the others zero, all divided by `factor`."""

    factor: float


RopeScaling = Linear | Dynamic | Yarn | LongRope | Llama3 | Proportional


def inverse_frequencies(config: "ModelConfig", lengths: Int[AnyArray, " B"]) -> Float32[Array, "_B r"]:
    """Inverse frequencies of the rotation, as transformers' ROPE_INIT_FUNCTIONS define them, in radians per position.

    Args:
      config: the decoder's.
      lengths: tokens in each whole sequence; only Dynamic and LongRope read them.

    Returns:
      [B, r] for Dynamic and LongRope, [1, r] otherwise; 2 r features are rotated.
    """
    scaling = config.rope_scaling
    # float32 throughout, because transformers computes these in float32 and long positions magnify a last bit.
    theta = np.float32(config.rope_theta)
    dim = int(config.head_dim * config.rope_fraction)
    exponents = np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim)
    plain = np.float32(1.0) / theta**exponents
    match scaling:
        case None:
            return jnp.asarray(plain)[None]
        case Linear(factor):
            return jnp.asarray(plain / np.float32(factor))[None]
        case Dynamic(factor):
            beyond = jnp.maximum(lengths, config.max_positions).astype(jnp.float32) / config.max_positions
            base = theta * (factor * beyond - (factor - 1)) ** (dim / (dim - 2))
            return 1.0 / base[:, None] ** exponents
        case LongRope():
            long = np.float32(1.0) / (np.asarray(scaling.long_factors, np.float32) * theta**exponents)
            short = np.float32(1.0) / (np.asarray(scaling.short_factors, np.float32) * theta**exponents)
            return jnp.where(jnp.asarray(lengths)[:, None] > scaling.original_max_positions, long, short)
        case Yarn():
            return jnp.asarray(_yarn(scaling, config.rope_theta, dim, plain))[None]
        case Llama3():
            return jnp.asarray(_llama3(scaling, plain))[None]
        case Proportional(factor):
            angles = int(config.rope_fraction * config.head_dim // 2)
            kept = np.arange(0, 2 * angles, 2, dtype=np.float32) / np.float32(config.head_dim)
            frequencies = np.zeros(config.head_dim // 2, np.float32)
            frequencies[:angles] = np.float32(1.0) / theta**kept / np.float32(factor)
            return jnp.asarray(frequencies)[None]


def _yarn(scaling: Yarn, theta: float, dim: int, plain: Float32[np.ndarray, " r"]) -> Float32[np.ndarray, " r"]:
    """NTK-by-parts frequencies (https://arxiv.org/abs/2309.00071, eq. 17-19): a ramp from kept to interpolated."""

    def dimension(rotations: float) -> float:
        return dim * math.log(scaling.original_max_positions / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low, high = dimension(scaling.beta_fast), dimension(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    # A ramp of no width would divide by zero.
    width = high - low if high != low else 0.001
    interpolated = np.clip((np.arange(len(plain), dtype=np.float32) - low) / width, 0, 1).astype(np.float32)
    return plain / np.float32(scaling.factor) * interpolated + plain * (1 - interpolated)


def _llama3(scaling: Llama3, plain: Float32[np.ndarray, " r"]) -> Float32[np.ndarray, " r"]:
    """Llama 3.1 frequencies: by wavelength, kept, divided by the factor, or between the two."""
    low, high, length = scaling.low_freq_factor, scaling.high_freq_factor, scaling.original_max_positions
    wavelengths = 2 * math.pi / plain
    divided = plain / np.float32(scaling.factor)
    smooth = (length / wavelengths - low) / (high - low)
    between = (1 - smooth) * divided + smooth * plain
    return np.where(wavelengths < length / high, plain, np.where(wavelengths > length / low, divided, between)).astype(
        np.float32
    )


def rotations(
    config: "ModelConfig", positions: Int[Array, " B *S"], lengths: Int[AnyArray, " B"]
) -> tuple[Float32[Array, "B *S r"], Float32[Array, "B *S r"]]:
    """Cosines and sines by which queries and keys are rotated.

    Args:
      config: the decoder's.
      positions: of each token in its own sequence.
      lengths: tokens in each whole sequence.
    """
    frequencies = inverse_frequencies(config, lengths)
    frequencies = frequencies.reshape(len(frequencies), *(1,) * (positions.ndim - 1), -1)
    angles = positions[..., None].astype(jnp.float32) * frequencies
    scaling = config.rope_scaling
    factor = scaling.attention_factor if isinstance(scaling, Yarn | LongRope) else 1.0
    return jnp.cos(angles) * factor, jnp.sin(angles) * factor


def rotate(x: Float[Array, "*N h"], cos: Float32[Array, "... r"], sin: Float32[Array, "... r"]) -> Float[Array, "*N h"]:
    """Rotates the first 2 r features of every head, feature i paired with feature i + r, and leaves the others as they are.

    Args:
      x: queries or keys, whose dtype the result has.
      cos: broadcast against x.
      sin: broadcast against x.
    """
    half = cos.shape[-1]
    first, second, rest = jnp.split(x.astype(jnp.float32), [half, 2 * half], axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin, rest], axis=-1).astype(x.dtype)
