import jax
import jax.numpy as jnp
import numpy as np

from sea_jax.models import packing


def test_the_wanted_rows_come_first_in_their_order_and_others_fill_up():
    chosen = packing.choose(jnp.array([False, True, False, True, True, False]), 4)
    np.testing.assert_array_equal(chosen.rows, [1, 3, 4, 0])
    np.testing.assert_array_equal(chosen.places[jnp.array([1, 3, 4, 0])], [0, 1, 2, 3])
    assert (np.asarray(chosen.places)[[2, 5]] >= 4).all()


def test_rows_come_back_to_their_places_and_gradients_with_them():
    x, weights = (np.random.default_rng(seed).normal(size=(5, 3)).astype(np.float32) for seed in (0, 1))
    chosen = packing.choose(jnp.array([True, False, True, False, False]), 3)  # rows 0 and 2, and 1 to fill up
    there = np.array([True, True, True, False, False])[:, None]

    def through(x: jax.Array) -> jax.Array:
        return (packing.spread(packing.pack(x, chosen) ** 2, chosen) * weights).sum()

    np.testing.assert_array_equal(packing.spread(packing.pack(jnp.asarray(x), chosen), chosen), np.where(there, x, 0))
    np.testing.assert_allclose(jax.grad(through)(jnp.asarray(x)), np.where(there, 2 * x * weights, 0), rtol=1e-6)


def test_sizes_are_eighths():
    assert [packing.rounded(count, 80) for count in (1, 10, 11, 70, 71, 80)] == [10, 10, 20, 70, None, None]
