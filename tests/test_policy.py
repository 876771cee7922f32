"""A policy's weights are told from others by a fingerprint."""

import jax
import numpy as np

from sea_jax import policy
from sea_jax.policy import weights_fingerprint
from tests.support import tiny


def test_a_fingerprint_is_that_of_the_weights():
    params = jax.tree.map(np.asarray, tiny.params())
    same = jax.tree.map(np.copy, params)
    assert weights_fingerprint(params) == weights_fingerprint(same)
    same["final_norm"]["scale"][0] += 1e-3
    assert weights_fingerprint(params) != weights_fingerprint(same)


def test_of_a_long_parameter_some_numbers_are_read(monkeypatch):
    monkeypatch.setattr(policy, "NUMBERS_READ", 4)
    numbers = np.arange(10.0)
    found = weights_fingerprint({"w": numbers})
    assert found != weights_fingerprint({"w": numbers + 1})
    assert found != weights_fingerprint({"v": numbers})
    assert found != weights_fingerprint({"w": numbers.reshape(2, 5)})
