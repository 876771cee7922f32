"""Every part of a run in seconds, on random weights: for tests and for trying things out. Nothing good can come of it.

python -m sea_jax.train --config=configs/tiny_random.py       (about 30 seconds on 2 cores, most of them compilation)
"""

from collections.abc import Sequence
from pathlib import Path

import ml_collections
import numpy as np

from sea_jax.config import default
from sea_jax.methods.table import with_method


def prefers_many_es(prompts: Sequence[str], first: Sequence[str], second: Sequence[str]) -> np.ndarray:
    """The oracle of this configuration: P(first wins) is a Bradley-Terry preference for the letter e."""
    margin = np.array([a.count("e") - b.count("e") for a, b in zip(first, second, strict=True)])
    return 1 / (1 + np.exp(-margin.astype(np.float64)))


def prefers_many_letters(prompts: Sequence[str], first: Sequence[str], second: Sequence[str]) -> np.ndarray:
    """The judge of this configuration: P(first wins) is a Bradley-Terry preference for different letters."""
    margin = np.array([len(set(a)) - len(set(b)) for a, b in zip(first, second, strict=True)])
    return 1 / (1 + np.exp(-margin.astype(np.float64)))


def get_config(method: str = "") -> ml_collections.ConfigDict:
    """Returns the configuration.

    Args:
      method: one of docs/methods.md, as in configs/tiny_random.py:online; "": as told here.
    """
    config = default()
    config.name = "tiny_random"
    config.max_queries = 24

    config.policy.source = "builtin:tiny-random-llama"
    config.policy.train_last_layers = 1
    config.policy.dtype = "float32"

    config.data.source = "jsonl"
    config.data.path = str(Path(__file__).parent / "tiny_prompts.jsonl")
    config.data.heldout_fraction = 0.25
    config.data.reference_field = "reference"
    config.data.near_duplicate_share = 1 / 3
    config.data.template = "Q: {prompt} A:"
    config.data.max_prompt_tokens = 64
    config.data.bucket = 32
    config.data.batch_size = 4

    config.sampling.num_samples = 4
    config.sampling.max_new_tokens = 8
    config.sampling.temperature = 1.0

    config.exploration.burn_in_queries = 8
    config.exploration.planning_steps = 1
    config.exploration.planning_after_queries = 16

    config.erm.feature_layer = 1
    config.erm.num_heads = 4
    config.erm.hidden_size = 16

    config.learner.learning_rate = 1e-3
    config.learner.microbatch_size = 2

    config.oracle.kind = "configs.tiny_random:prefers_many_es"

    config.eval.every_queries = 8
    config.eval.num_prompts = 6
    config.eval.batch_size = 4
    config.eval.max_new_tokens = 8
    config.eval.best_of_n = 2
    config.eval.best_of_n_prompts = 6
    config.eval.judge.kind = "configs.tiny_random:prefers_many_letters"
    config.checkpoint.every_steps = 2
    return with_method(config, method)
