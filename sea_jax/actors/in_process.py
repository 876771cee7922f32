"""Who writes the responses: the policy itself, in this process, or servers that are given its weights."""

import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PRNGKeyArray

from sea_jax.actors import generation
from sea_jax.actors.generation import GenerationConfig
from sea_jax.actors.journal import Journal, Written
from sea_jax.data import batching
from sea_jax.models import decoder, partition
from sea_jax.models.config import ModelConfig
from sea_jax.types import Candidates, Generate, Params, Prompts, Respond


def kept(generate: Generate, journal: Journal) -> Respond:
    """Answers every batch when it is asked to, from the journal where it can, and has nothing to say of it.

    Devices of another kind would round otherwise and write other responses than those that were paid for.
    """

    def respond(
        number: int, trained: Params, prompts: Prompts, key: PRNGKeyArray, version: int
    ) -> tuple[Candidates, Mapping[str, float]]:
        name = np.asarray(jax.random.key_data(key)).tobytes().hex()  # a method may want several of one batch
        written = journal.find(number, name)
        if written is not None:
            return _WHOLE(written.candidates), {}
        candidates = generate(trained, prompts, key, version)
        journal.record(number, Written(candidates, version, logprob_gap=0.0), name)
        return candidates, {}

    return respond


_WHOLE = jax.jit(partition.whole)  # lie on the devices as those that are written now


def in_process(frozen: Params, config: ModelConfig, sampling: GenerationConfig, batch_size: int = 0) -> Generate:
    """The policy writes in this process; the number of policy steps is not used.

    Args:
      frozen: the frozen part of the policy's parameters.
      config: ModelConfig.
      sampling: GenerationConfig.
      batch_size: prompts that are answered at a time, which bounds the memory of keys and values; 0: all.
    """

    def generate(trained: Params, prompts: Prompts, key: PRNGKeyArray, version: int) -> Candidates:
        write = functools.partial(generation.generate, decoder.join(frozen, trained), config=config, sampling=sampling)
        portions = batching.portions(len(prompts.tokens), batch_size)
        if len(portions) == 1:
            return write(prompts, key)
        parts = [
            write(Prompts(prompts.tokens[rows], prompts.valid[rows]), jax.random.fold_in(key, rows.start))
            for rows in portions
        ]
        return jax.tree.map(lambda *part: jnp.concatenate(part), *parts)

    return generate
