"""A policy's weights are told from others by a fingerprint."""

import jax
import numpy as np

from sea_jax import policies
from tests import tiny


def test_a_fingerprint_is_that_of_the_weights():
    params = jax.tree.map(np.asarray, tiny.params())
    same = jax.tree.map(np.copy, params)
    assert policies.fingerprint(params) == policies.fingerprint(same)
    same["final_norm"]["scale"][0] += 1e-3
    assert policies.fingerprint(params) != policies.fingerprint(same)


def test_of_a_long_parameter_some_numbers_are_read(monkeypatch):
    monkeypatch.setattr(policies, "NUMBERS_READ", 4)
    numbers = np.arange(10.0)
    found = policies.fingerprint({"w": numbers})
    assert found != policies.fingerprint({"w": numbers + 1})
    assert found != policies.fingerprint({"v": numbers})
    assert found != policies.fingerprint({"w": numbers.reshape(2, 5)})
