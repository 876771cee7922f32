"""What a configuration sets for each method by name; all else, budget, models and data, stays the same for all of them."""

from collections.abc import Mapping
from typing import Any

import ml_collections

PLAIN: Mapping[str, Any] = {
    "exploration.rule": "passive",
    "exploration.gamma": 1.0,
    "exploration.planning_steps": 0,
    "eval.best_of_n": 0,
}
ACTIVE: Mapping[str, Any] = {**PLAIN, "exploration.rule": "bai_ts"}
BEST_OF_N: Mapping[str, Any] = {"eval.best_of_n": 8, "eval.best_of_n_always": True}

METHODS: Mapping[str, Mapping[str, Any]] = {
    "sea": {**ACTIVE, "exploration.gamma": 0.7},
    "dyna": {**ACTIVE, "exploration.planning_steps": 3},
    "information_directed": {
        **ACTIVE,
        "exploration.rule": "infomax",
        "exploration.planning_steps": 1,
        "exploration.planning_after_queries": 0,
        "sampling.num_samples": 16,
        "loss.name": "linear",
        "learner.anchor_decay": 0.95,
    },
    "reinforce": ACTIVE,
    "ppo": ACTIVE,
    "offline": PLAIN,
    "iterative": {**PLAIN, "actor.sync_every": 4},
    "online": PLAIN,
    "apl": PLAIN,
    "xpo": {**PLAIN, "sampling.num_samples": 2, "loss.name": "xpo"},
    "selm": {**PLAIN, "loss.name": "selm"},
    "variant1": PLAIN,
    "variant2": ACTIVE,
    "variant3": {**ACTIVE, "exploration.gamma": 0.7},
    "variant4": {**PLAIN, **BEST_OF_N},
    "variant5": {**ACTIVE, **BEST_OF_N},
    "variant6": {**ACTIVE, **BEST_OF_N, "exploration.gamma": 0.7},
    "variant7": {**ACTIVE, **BEST_OF_N},
}


def with_method(config: ml_collections.ConfigDict, name: str) -> ml_collections.ConfigDict:
    """Returns a configuration with the settings of a method; the name is put behind the configuration's.

    Args:
      config: is changed.
      name: one of METHODS; "": it stays as it is.

    Raises:
      ValueError: there is no such method.
    """
    if not name:
        return config
    if name not in METHODS:
        raise ValueError(f"{name}: the methods are {', '.join(METHODS)}")
    config.name = f"{config.name}-{name}"
    config.method = name
    config.update_from_flattened_dict(dict(METHODS[name]))
    return apl_prompts(config) if name == "apl" else config


def apl_prompts(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    """Draws eight prompts for each one that is asked about, 1024 -> 128 as in the paper, with 8 responses each."""
    config.exploration.asked_prompts = config.data.batch_size
    config.data.batch_size *= 8
    config.sampling.num_samples = 8
    return config
