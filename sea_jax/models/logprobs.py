"""Token log-probs from hidden states: response positions only, the vocabulary in chunks."""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Float, Float32, Int

from sea_jax.models import decoder, packing, partition
from sea_jax.models.packing import Packing
from sea_jax.types import Array, Params

CHUNK = 8192  # vocabulary entries whose logits are held at a time


def _num_chunks(vocab_size: int, chunk: int) -> int:
    """The fewest equal chunks of at most `chunk` entries; vocabularies without a fitting divisor are padded to them."""
    fewest = -(-vocab_size // chunk)
    for count in range(fewest, 2 * fewest + 1):
        if vocab_size % count == 0:
            return count
    return fewest


def token_logprobs(
    hidden: Float[Array, "N d"], unembedding: Float[Array, "V d"], targets: Int[Array, " N"], *, chunk: int = CHUNK
) -> Float32[Array, " N"]:
    """Returns log softmax(hidden @ unembedding^T) at the targets; no [N, V] array is ever held, nor saved for the gradient.

    Args:
      hidden: in the compute dtype; the log-sum-exp is taken in float32.
      unembedding: in the compute dtype.
      targets: token ids.
      chunk: vocabulary entries whose logits are held at a time.
    """
    num_rows = hidden.shape[0]
    vocab_size, num_features = unembedding.shape
    count = _num_chunks(vocab_size, chunk)
    size = -(-vocab_size // count)
    padding = count * size - vocab_size
    padded = jnp.pad(unembedding, ((0, padding), (0, 0)))
    if partition.divides():
        # Every count-th row to a block: a vocabulary that is divided over a mesh in long runs is so in every block too.
        blocks = padded.reshape(size, count, num_features).swapaxes(0, 1)
        starts, distance = jnp.arange(count), count
    else:  # as they lie in memory: nothing is copied
        blocks = padded.reshape(count, size, num_features)
        starts, distance = size * jnp.arange(count), 1

    @partial(jax.checkpoint, prevent_cse=False)
    def step(
        carry: tuple[Float32[Array, " N"], Float32[Array, " N"]], block: tuple[Float[Array, "v d"], Int[Array, ""]]
    ) -> tuple[tuple[Float32[Array, " N"], Float32[Array, " N"]], None]:
        maximum, total = carry
        weights, start = block
        logits = jnp.einsum("nd,vd->nv", hidden, weights, preferred_element_type=jnp.float32)
        if padding:
            logits = jnp.where(start + distance * jnp.arange(size) < vocab_size, logits, -jnp.inf)
        new_maximum = jax.lax.stop_gradient(jnp.maximum(maximum, logits.max(-1)))
        total = total * jnp.exp(maximum - new_maximum) + jnp.exp(logits - new_maximum[:, None]).sum(-1)
        return (new_maximum, total), None

    zero = (jnp.full(num_rows, -jnp.inf), jnp.zeros(num_rows))
    (maximum, total), _ = jax.lax.scan(step, zero, (blocks, starts))
    target = jnp.einsum("nd,nd->n", hidden, unembedding[targets], preferred_element_type=jnp.float32)
    return target - maximum - jnp.log(total)


def response_logprobs(
    params: Params,
    config: decoder.ModelConfig,
    streams: decoder.Streams,
    tokens: Int[Array, "B M T"],
    *,
    predicted: Packing | None = None,
) -> Float32[Array, "B M T"]:
    """Returns the log-prob of every response token, from the hidden states behind the last layer; 0 on padding.

    Args:
      params: the decoder's parameters; only the last norm and the unembedding are used.
      config: ModelConfig.
      streams: behind the last stack.
      tokens: padded on the right.
      predicted: those of the B M T tokens that are valid; None: padding is computed too.
    """
    assert streams.responses is not None
    assert streams.responses_valid is not None
    last_prompt = jnp.broadcast_to(streams.prompt[:, None, -1:], (*tokens.shape[:2], 1, streams.prompt.shape[-1]))
    hidden = jnp.concatenate([last_prompt, streams.responses[:, :, :-1]], axis=2)
    rows, targets = partition.constrain(hidden, "batch").reshape(-1, hidden.shape[-1]), tokens.reshape(-1)
    if predicted is not None:
        rows, targets = packing.pack(rows, predicted), packing.pack(targets, predicted)
    unembedding = partition.constrain(decoder.unembedding(params).astype(hidden.dtype), "vocab")
    values = token_logprobs(decoder.final(params, config, rows), unembedding, targets)
    if predicted is not None:
        values = packing.spread(values, predicted)
    return jnp.where(streams.responses_valid, values.reshape(tokens.shape), 0.0)
