"""Annotations of shapes and dtypes are checked in tests; that they are is what is tested here."""

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest

from sea_jax import ensemble, sampling
from sea_jax.types import Duel, Prompts

FAULTS = jaxtyping.TypeCheckError


def test_a_call_with_another_shape_or_dtype_is_refused():
    assert sampling.best_of_n(jnp.zeros((2, 3, 4))).shape == (3,)
    for wrong in (jnp.zeros((3, 4)), jnp.zeros((2, 3, 4), jnp.int32)):
        with pytest.raises(FAULTS, match="best_of_n"):
            sampling.best_of_n(wrong)


def test_letters_agree_between_arguments():
    rewards, distinct = jnp.zeros((2, 3, 4)), jnp.ones((3, 4, 4), bool)
    assert sampling.uncertainty(rewards, distinct, jax.random.key(0)).first.shape == (3,)
    with pytest.raises(FAULTS, match="uncertainty"):
        sampling.uncertainty(rewards, distinct[:2], jax.random.key(0))


def test_a_pytree_is_refused_when_its_fields_do_not_fit_and_may_hold_arrays_of_the_host():
    tokens, valid = np.zeros((2, 5), np.int32), np.ones((2, 5), bool)
    Prompts(tokens, valid)
    for wrong in (valid[:1], valid[:, 0], valid.astype(np.int32)):
        with pytest.raises(FAULTS, match="Prompts"):
            Prompts(tokens, wrong)


def test_jax_may_put_anything_into_a_pytree():
    duel = Duel(jnp.zeros(3, jnp.int32), jnp.ones(3, jnp.int32))
    shapes = jax.eval_shape(lambda: duel)
    assert shapes.first.shape == (3,)
    assert jax.tree.map(lambda x: x[None], duel).first.shape == (1, 3)
    assert jax.vmap(lambda one: one)(duel).second.shape == (3,)
    _, stacked = jax.lax.scan(lambda carry, _: (carry, duel), 0, length=2)
    assert stacked.first.shape == (2, 3)
    with pytest.raises(FAULTS, match="Duel"):
        Duel(stacked.first, stacked.second)


def test_results_are_checked_too(monkeypatch):
    monkeypatch.setattr(ensemble, "_head_reward", lambda head, features: features)
    erm = ensemble.init(ensemble.EnsembleSettings(num_heads=2, hidden_size=3), 4, jax.random.key(0))
    with pytest.raises(FAULTS, match="rewards"):
        ensemble.rewards(erm, jnp.zeros((2, 3, 4)))
