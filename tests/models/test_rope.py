"""Rotary position embedding: numbers worked out by hand."""

from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest

from sea_jax.models import rope
from tests.support import tiny

CONFIG = replace(tiny.CONFIG, head_dim=4, rope_theta=100.0, max_positions=8)


@pytest.mark.parametrize(
    ("scaling", "length", "expected"),
    [
        (None, 99, [1.0, 0.1]),
        (rope.Linear(4.0), 99, [0.25, 0.025]),
        # base = 100 * (2 * 8 / 8 - 1) ** 2 below the threshold, 100 * (2 * 12 / 8 - 1) ** 2 = 400 past it
        (rope.Dynamic(2.0), 8, [1.0, 0.1]),
        (rope.Dynamic(2.0), 12, [1.0, 0.05]),
        (rope.LongRope((1.0, 2.0), (5.0, 10.0), 1.0, 8), 8, [1.0, 0.05]),
        (rope.LongRope((1.0, 2.0), (5.0, 10.0), 1.0, 8), 9, [0.2, 0.01]),
        # wavelengths 6.3 and 63: kept below 64 / 8, divided above 64 / 2
        (rope.Llama3(4.0, 2.0, 8.0, 64), 99, [1.0, 0.025]),
        (rope.Proportional(2.0), 99, [0.5, 0.05]),
    ],
)
def test_inverse_frequencies(scaling: rope.RopeScaling | None, length: int, expected: list[float]) -> None:
    found = rope.inverse_frequencies(replace(CONFIG, rope_scaling=scaling), jnp.array([length]))
    np.testing.assert_allclose(found, [expected], rtol=1e-6)


def test_lengths_count_for_each_sequence_of_its_own() -> None:
    config = replace(CONFIG, rope_scaling=rope.Dynamic(2.0))
    cos, sin = rope.rotations(config, jnp.array([[3], [3]]), jnp.array([4, 12]))
    np.testing.assert_allclose(cos, np.cos([[[3.0, 0.3]], [[3.0, 0.15]]]), rtol=1e-6)
    np.testing.assert_allclose(sin, np.sin([[[3.0, 0.3]], [[3.0, 0.15]]]), rtol=1e-6)


def test_rotate_turns_pairs_half_a_rotation_apart_and_leaves_the_rest() -> None:
    x = jnp.array([1.0, 0.0, 0.0, 2.0, 7.0])
    angles = jnp.array([0.5, 0.2])
    expected = [np.cos(0.5), -2 * np.sin(0.2), np.sin(0.5), 2 * np.cos(0.2), 7.0]
    np.testing.assert_allclose(rope.rotate(x, jnp.cos(angles), jnp.sin(angles)), expected, rtol=1e-6)


def test_attention_factor_scales_the_rotation() -> None:
    plain = replace(CONFIG, rope_scaling=rope.LongRope((1.0, 1.0), (1.0, 1.0), 1.0, 8))
    scaled = replace(CONFIG, rope_scaling=rope.LongRope((1.0, 1.0), (1.0, 1.0), 1.5, 8))
    positions, lengths = jnp.arange(5)[None], jnp.array([5])
    for part, larger in zip(
        rope.rotations(plain, positions, lengths), rope.rotations(scaled, positions, lengths), strict=True
    ):
        np.testing.assert_allclose(1.5 * part, larger, rtol=1e-6)
