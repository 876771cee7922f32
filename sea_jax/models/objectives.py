"""A reward of several objectives, which a network weighs by the prompt (ArmoRM, https://arxiv.org/abs/2406.12845)."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.nn.initializers import ones, zeros
from jaxtyping import Float, Float32, Int

from sea_jax.models.config import Gating
from sea_jax.models.layers import linear
from sea_jax.models.parameters import ParamSpec
from sea_jax.types import AnyArray, Array, Params


def abstract(gating: Gating, d: int, weight: Callable[..., Array]) -> Params:
    """Returns a ParamSpec for every parameter behind the last norm; all stay float32, as they are published.

    Args:
      gating: sizes.
      d: features of a hidden state.
      weight: initialiser of matrices.
    """
    n = gating.num_objectives
    widths = [d, *(gating.hidden_size for _ in range(gating.num_hidden)), n]

    def layer(rows: int, columns: int) -> Params:
        return {
            "kernel": ParamSpec((rows, columns), (None, None), weight, wide=True),
            "bias": ParamSpec((columns,), (None,), zeros, wide=True),
        }

    layers = {str(i): layer(*widths[i : i + 2]) for i in range(len(widths) - 1)}
    return {
        "objectives": {"kernel": ParamSpec((d, n), (None, None), weight, wide=True)},
        "transform": ParamSpec((n, n), (None, None), lambda key, shape, dtype: jnp.eye(n, dtype=dtype), wide=True),
        "gating": {**layers, "scale": ParamSpec((1,), (None,), ones, wide=True)},
    }


def score(
    params: Params, gating: Gating, last: Float[Array, "N d"], prompt: Float[Array, "N d"]
) -> Float32[Array, " N"]:
    """Returns sum_i g_i (r T)_i: objectives r, freed of verbosity by T, weighed by g = scale softmax(network / temperature).

    Args:
      params: as of `abstract`.
      gating: as of `abstract`.
      last: hidden states of the last tokens, from which the objectives are read.
      prompt: those where the prompts end, by which they are weighed.
    """
    rewards = linear(last.astype(jnp.float32), params["objectives"])
    logits = prompt.astype(jnp.float32)
    for i in range(gating.num_hidden):
        logits = jax.nn.relu(linear(logits, params["gating"][str(i)]))
    logits = linear(logits, params["gating"][str(gating.num_hidden)])
    weights = jax.nn.softmax(logits / gating.temperature) * params["gating"]["scale"]
    return (weights * (rewards @ params["transform"])).sum(-1)


def starts(tokens: Int[AnyArray, "N S"], pattern: tuple[int, ...]) -> Int[Array, " N"]:
    """Returns where a sequence of tokens begins for the last time in each row; 0 or more where it does not."""
    tokens, count = jnp.asarray(tokens), tokens.shape[1] - len(pattern) + 1
    windows = jnp.stack([tokens[:, i : i + count] for i in range(len(pattern))], axis=-1)
    found = (windows == jnp.array(pattern)).all(-1)
    return count - 1 - found[:, ::-1].argmax(1)
