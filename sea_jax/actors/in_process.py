"""Who writes the responses: the policy itself, in this process, or servers that are given its weights."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PRNGKeyArray

from sea_jax.actors import generation
from sea_jax.actors.generation import GenerationConfig, ReadPrompts
from sea_jax.data import batching
from sea_jax.models import decoder, packing, partition
from sea_jax.models.config import ModelConfig
from sea_jax.types import Candidates, Generate, Params, Prompts, Respond


def at_once(generate: Generate) -> Respond:
    """Answers every batch when it is asked to, and has nothing to say of it."""
    return lambda number, trained, prompts, key, version: (generate(trained, prompts, key, version), {})


REMEMBERED_BYTES = 2**29  # of prompts that come again


def bytes_of_prompts(frozen: Params, config: ModelConfig, num_tokens: int, dtype: str) -> int:
    """Returns what the frozen layers make of prompts of so many tokens: hidden states, keys and values."""
    num_frozen = sum(stack["q"]["kernel"].shape[0] for stack in frozen["stacks"])
    per_token = config.d_model + 2 * num_frozen * config.num_kv_heads * config.head_dim
    return num_tokens * per_token * jnp.dtype(dtype).itemsize


def in_process(
    frozen: Params, config: ModelConfig, sampling: GenerationConfig, batch_size: int = 0, *, again: bool = False
) -> Generate:
    """The policy writes in this process; the number of policy steps is not used.

    Args:
      frozen: the frozen part of the policy's parameters.
      config: ModelConfig.
      sampling: GenerationConfig.
      batch_size: prompts that are answered at a time, which bounds the memory of keys and values; 0: all.
      again: the same prompts will come again; what the frozen layers make of them is remembered, as far as there is room.
    """
    remembered: dict[bytes, ReadPrompts] = {}

    def read(prompts: Prompts, rows: int | None) -> ReadPrompts | None:
        """The prompts behind the frozen layers, if they are to be remembered."""
        if not (again and frozen["stacks"]) or partition.divides():
            return None
        name = np.asarray(prompts.tokens).tobytes() + np.asarray(prompts.valid).tobytes()
        if name not in remembered:
            used = sum(leaf.nbytes for leaf in jax.tree.leaves(remembered))
            if used + bytes_of_prompts(frozen, config, prompts.tokens.size, sampling.dtype) > REMEMBERED_BYTES:
                return None
            remembered[name] = generation.read_prompts(
                frozen, prompts, config=config, dtype=sampling.dtype, prompt_rows=rows
            )
        return remembered[name]

    def generate(trained: Params, prompts: Prompts, key: PRNGKeyArray, version: int) -> Candidates:
        params = decoder.join(frozen, trained)

        def write(prompts: Prompts, key: PRNGKeyArray) -> Candidates:
            valid = np.asarray(prompts.valid)
            rows = packing.rounded(int(valid.sum()), valid.size)
            return generation.generate(
                params,
                prompts,
                key,
                config=config,
                sampling=sampling,
                prompt_rows=rows,
                read=read(prompts, rows),
            )

        portions = batching.portions(len(prompts.tokens), batch_size)
        if len(portions) == 1:
            return write(prompts, key)
        parts = [
            write(Prompts(prompts.tokens[rows], prompts.valid[rows]), jax.random.fold_in(key, rows.start))
            for rows in portions
        ]
        return jax.tree.map(lambda *part: jnp.concatenate(part), *parts)

    return generate
