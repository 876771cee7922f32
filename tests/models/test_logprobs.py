from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sea_jax.models import decoder, logprobs
from sea_jax.types import Array
from tests.support import tiny

SHAPES = [(3, 7, 7), (4, 12, 5), (5, 13, 4), (2, 100, 33), (1, 5, 1), (6, 257, 64), (2, 3, 8)]  # N, V, chunk


def inputs(num_rows: int, vocab_size: int, scale: float = 1.0) -> tuple[Array, Array, Array]:
    """Hidden states [N, 6], an unembedding [V, 6] and targets [N]."""
    rng = np.random.default_rng(num_rows * vocab_size)
    return (
        jnp.asarray(scale * rng.normal(size=(num_rows, 6)), jnp.float32),
        jnp.asarray(rng.normal(size=(vocab_size, 6)), jnp.float32),
        jnp.asarray(rng.integers(0, vocab_size, num_rows), jnp.int32),
    )


def plain(hidden: Array, unembedding: Array, targets: Array) -> Array:
    """The same by the full array of logits."""
    logits = hidden.astype(jnp.float32) @ unembedding.astype(jnp.float32).T
    return jax.nn.log_softmax(logits)[jnp.arange(len(targets)), targets]


@pytest.mark.parametrize(("num_rows", "vocab_size", "chunk"), SHAPES)
def test_values_and_gradients_are_those_of_log_softmax(num_rows, vocab_size, chunk):
    hidden, unembedding, targets = inputs(num_rows, vocab_size)
    weights = jnp.arange(1.0, num_rows + 1)

    def chunked(hidden: Array, unembedding: Array) -> tuple[Array, Array]:
        values = logprobs.token_logprobs(hidden, unembedding, targets, chunk=chunk)
        return values @ weights, values

    def full(hidden: Array, unembedding: Array) -> tuple[Array, Array]:
        values = plain(hidden, unembedding, targets)
        return values @ weights, values

    found, values = jax.jit(jax.grad(chunked, argnums=(0, 1), has_aux=True))(hidden, unembedding)
    expected, expected_values = jax.jit(jax.grad(full, argnums=(0, 1), has_aux=True))(hidden, unembedding)
    np.testing.assert_allclose(values, expected_values, rtol=1e-5, atol=1e-5)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)


def test_half_precision_inputs_give_float32_sums():
    hidden, unembedding, targets = (x.astype(jnp.bfloat16) if x.ndim == 2 else x for x in inputs(6, 257))
    values = logprobs.token_logprobs(hidden, unembedding, targets, chunk=64)
    assert values.dtype == jnp.float32
    np.testing.assert_allclose(values, plain(hidden, unembedding, targets), rtol=1e-5, atol=1e-5)


def test_large_logits_do_not_overflow():
    hidden, unembedding, targets = inputs(5, 13, scale=1e4)
    values = logprobs.token_logprobs(hidden, unembedding, targets, chunk=4)
    assert np.isfinite(np.asarray(values)).all()
    np.testing.assert_allclose(values, plain(hidden, unembedding, targets), rtol=1e-5)


def shapes(jaxpr: Any) -> Iterator[tuple[int, ...]]:
    """The shape of everything that a program computes, inner programs included."""
    for equation in jaxpr.eqns:
        yield from (variable.aval.shape for variable in equation.outvars)
        for inner in jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")
        ):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                yield from shapes(inner)


def test_no_array_of_all_logits_is_ever_held():
    hidden, unembedding, targets = inputs(50, 64)

    def total(hidden: Array, unembedding: Array) -> Array:
        return logprobs.token_logprobs(hidden, unembedding, targets, chunk=8).sum()

    def full(hidden: Array, unembedding: Array) -> Array:
        return plain(hidden, unembedding, targets).sum()

    def largest(function: Any) -> int:
        program = jax.make_jaxpr(jax.grad(function, argnums=(0, 1)))(hidden, unembedding)
        return max(int(np.prod(shape)) for shape in shapes(program.jaxpr))

    assert largest(full) == 50 * 64
    assert largest(total) == 50 * 8


def test_chunks_are_as_few_as_they_can_be():
    assert logprobs._num_chunks(100, 100) == 1
    assert logprobs._num_chunks(49152, 8192) == 6
    assert logprobs._num_chunks(50304, 8192) == 8  # 7 does not divide it
    assert logprobs._num_chunks(50257, 8192) == 7  # 29 x 1733: nothing near divides it, so the last chunk is padded


def test_every_response_token_gets_its_own_log_prob():
    params = tiny.params()
    prompts, lengths = tiny.prompts(3, 8), np.array([[5, 1, 0], [2, 5, 4]])
    tokens = np.random.default_rng(1).integers(0, tiny.CONFIG.vocab_size, (2, 3, 5))

    @jax.jit
    def run(tokens: Array, valid: Array) -> Array:
        streams = decoder.embed(params, tiny.CONFIG, prompts.tokens, prompts.valid, tokens, valid, dtype="float32")
        for stack in params["stacks"]:
            streams, _ = decoder.run_stack(stack, tiny.CONFIG, streams)
        return logprobs.response_logprobs(params, tiny.CONFIG, streams, tokens)

    found = np.asarray(run(jnp.asarray(tokens, jnp.int32), np.arange(5) < lengths[..., None]))
    assert found.dtype == np.float32
    for row, sample in np.ndindex(2, 3):
        length = lengths[row, sample]
        assert (found[row, sample, length:] == 0).all()
        if length:
            response = tokens[row, sample, :length].tolist()
            np.testing.assert_allclose(
                found[row, sample, :length],
                tiny.response_logprobs(params, tiny.prompt_ids(prompts, row), response),
                rtol=1e-4,
                atol=1e-4,
            )
