"""How time and memory grow with every size of a step: `python -m benchmarks.growth`.

A decoder of random weights writes, learns, and its reward model learns, at sizes that double along one axis at a time.
Memory is the compiler's own count of what a program needs beside its arguments. The slope of each curve in doubly
logarithmic axes is printed beside it, over its last three points: 1 is linear. Asserted: memory grows no faster than linearly
(but for attention among the tokens of a sequence, whose scores are quadratic), and learning holds no array of responses by
tokens by vocabulary.
"""

import argparse
import inspect
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np

from sea_jax import ensemble, learner, losses
from sea_jax.actors import generation
from sea_jax.actors.generation import GenerationConfig
from sea_jax.ensemble import EnsembleSettings
from sea_jax.learner import LearnerConfig
from sea_jax.models import decoder
from sea_jax.models.config import ModelConfig
from sea_jax.replay import empty_replay
from sea_jax.types import PreferenceBatch, Prompts

matplotlib.use("Agg")
from matplotlib import pyplot as plt

LAYERS, WIDTH, HEADS, FEATURES = 2, 128, 4, 64
LINEAR = 1.1  # a slope up to which growth counts as linear


@dataclass(frozen=True)
class Sizes:
    """Where every axis starts.

    Attributes:
      samples: M.
      prompts: B.
      new_tokens: T.
      prompt_tokens: P.
      vocabulary: V.
      heads: K.
      replay: pairs.
    """

    samples: int = 8
    prompts: int = 8
    new_tokens: int = 32
    prompt_tokens: int = 64
    vocabulary: int = 8192
    heads: int = 16
    replay: int = 1024


# The axes that a part depends on; each goes from its start through so many doublings.
AXES = {
    "generate": ("samples", "prompts", "new_tokens", "prompt_tokens", "vocabulary"),
    "learn": ("prompts", "new_tokens", "prompt_tokens", "vocabulary"),
    "ERM": ("heads", "replay"),
}
QUADRATIC = {("generate", "prompt_tokens"), ("learn", "prompt_tokens"), ("learn", "new_tokens")}
LOSS = partial(losses.dpo, beta=0.1)


def part(name: str, sizes: Sizes) -> tuple[Callable[[], Any], int]:
    """Returns how one part is run at some sizes, and the bytes that its program needs beside its arguments."""
    if name == "ERM":
        settings = EnsembleSettings(num_heads=sizes.heads)
        heads = ensemble.init(settings, FEATURES, jax.random.key(0))
        replay = replace(empty_replay(sizes.replay, FEATURES), added=jnp.asarray(sizes.replay, jnp.int32))
        lowered = jax.jit(partial(ensemble.update, config=settings)).lower(heads, replay, jax.random.key(1))
        return bound(lowered, heads, replay, jax.random.key(1))
    config = ModelConfig(
        family="llama",
        vocab_size=sizes.vocabulary,
        d_model=WIDTH,
        num_layers=LAYERS,
        num_heads=HEADS,
        num_kv_heads=HEADS,
        head_dim=WIDTH // HEADS,
        d_ff=4 * WIDTH,
        activation="silu",
        norm_eps=1e-5,
        max_positions=8192,
        tie_embeddings=True,
    )
    params = decoder.init(config, jax.random.key(0))
    shape = (sizes.prompts, sizes.prompt_tokens)
    prompts = Prompts(jnp.ones(shape, jnp.int32), jnp.ones(shape, bool))
    if name == "generate":
        how = GenerationConfig(
            num_samples=sizes.samples,
            max_new_tokens=sizes.new_tokens,
            eos_ids=(),
            pad_id=0,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            feature_stack=None,
            frozen_stacks=0,
            dtype="float32",
        )
        lowered = generation.generate.lower(params, prompts, jax.random.key(1), config=config, sampling=how)
        return bound(lowered, params, prompts, jax.random.key(1))
    pairs = PreferenceBatch(
        prompts=prompts,
        tokens=jnp.ones((sizes.prompts, 2, sizes.new_tokens), jnp.int32),
        lengths=jnp.full((sizes.prompts, 2), sizes.new_tokens, jnp.int32),
        labels=jnp.ones(sizes.prompts),
        weights=jnp.ones(sizes.prompts),
    )
    how_to_learn = LearnerConfig(total_steps=100, dtype="float32", microbatch_size=sizes.prompts, remat=True)
    state = learner.init(params, how_to_learn)
    # Not donated, so that it can be run again on the same state.
    step = jax.jit(partial(inspect.unwrap(learner.update), loss=LOSS, config=config, learner_config=how_to_learn))
    arguments = (state, {"stacks": ()}, params, pairs)
    return bound(step.lower(*arguments), *arguments)


def bound(lowered: Any, *arguments: Any) -> tuple[Callable[[], Any], int]:
    """Compiles; returns the program with its arguments and its bytes."""
    program = lowered.compile()
    return lambda: jax.block_until_ready(program(*arguments)), program.memory_analysis().temp_size_in_bytes


def slope(sizes: list[int], values: list[float]) -> float:
    """The slope of a curve in doubly logarithmic axes, over its last three points."""
    return float(np.polyfit(np.log(sizes[-3:]), np.log(values[-3:]), 1)[0])


def curve(name: str, axis: str, doublings: int, repeats: int) -> tuple[list[int], list[float], list[float]]:
    """Measures a part along one axis: sizes, seconds (medians of interleaved repeats), bytes."""
    start = Sizes()
    sizes = [getattr(start, axis) * 2**power for power in range(doublings + 1)]
    runs, num_bytes = zip(*(part(name, replace(start, **{axis: size})) for size in sizes), strict=True)
    seconds: list[list[float]] = [[] for _ in runs]
    for repeat in range(repeats + 1):
        for index, run in enumerate(runs):
            begin = time.perf_counter()
            run()
            if repeat:
                seconds[index].append(time.perf_counter() - begin)
    return sizes, [float(np.median(row)) for row in seconds], [float(size) for size in num_bytes]


def main() -> None:
    """Measures, asserts, prints and draws."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.growth", description=__doc__.splitlines()[0])
    parser.add_argument("--doublings", type=int, default=3, help="of every axis")
    parser.add_argument("--repeats", type=int, default=3, help="of every size, interleaved")
    parser.add_argument("--output", type=Path, default=Path("growth.png"), help="where the picture goes")
    arguments = parser.parse_args()
    figure, panels = plt.subplots(2, len(AXES), figsize=(4 * len(AXES), 6), squeeze=False)
    print(
        "| part | axis | sizes | seconds | slope | MB beside the arguments | slope |\n|---|---|---|---|---:|---|---:|"
    )
    too_fast = []
    for column, (name, axes) in enumerate(AXES.items()):
        for axis in axes:
            sizes, seconds, num_bytes = curve(name, axis, arguments.doublings, arguments.repeats)
            slopes = slope(sizes, seconds), slope(sizes, num_bytes)
            shown = ", ".join(f"{value:.3g}" for value in seconds), ", ".join(f"{b / 2**20:.1f}" for b in num_bytes)
            print(
                f"| {name} | {axis} | {sizes[0]}-{sizes[-1]} | {shown[0]} | {slopes[0]:.2f} | {shown[1]} | {slopes[1]:.2f} |",
                flush=True,
            )
            if slopes[1] > LINEAR and (name, axis) not in QUADRATIC:
                too_fast.append(f"{name} by {axis}: slope {slopes[1]:.2f}")
            if (name, axis) == ("learn", "vocabulary"):
                start = Sizes()
                logits = 4 * start.prompts * 2 * start.new_tokens * sizes[-1]
                grown = num_bytes[-1] - num_bytes[0]
                held = 6 * 4 * WIDTH * (sizes[-1] - sizes[0])  # gradient, clipped, moments and new weights of the table
                if grown > held + logits / 2:
                    too_fast.append(f"learn holds an array like its logits: {grown} bytes more, {held} are the table's")
            for row, values in enumerate((seconds, num_bytes)):
                panels[row, column].loglog([size / sizes[0] for size in sizes], values, marker="o", label=axis)
        panels[0, column].set_title(name)
        panels[0, column].legend(fontsize=7)
        panels[1, column].set_xlabel("times the first size")
    panels[0, 0].set_ylabel("seconds")
    panels[1, 0].set_ylabel("bytes beside the arguments")
    figure.tight_layout()
    figure.savefig(arguments.output, dpi=100)
    assert not too_fast, too_fast


if __name__ == "__main__":
    main()
