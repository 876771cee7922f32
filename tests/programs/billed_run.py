"""The tiny run with an oracle that bills: a service over HTTP, which the tests run. Every phase is told as it begins.

python -m tests.programs.billed_run --config=tests/programs/billed_run.py --workdir=DIR, with the service's address in
BILLED_RUN_SERVICE and a file for the phases in BILLED_RUN_PHASE.
"""

import contextlib
import json
import os
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path

import ml_collections
import numpy as np

from configs import tiny_random
from sea_jax import agent, train
from sea_jax.runtime import console


def billed(
    prompts: Sequence[str], first: Sequence[str], second: Sequence[str], keys: list[str] | None = None
) -> np.ndarray:
    """Asks the service where a label is to be paid for, and its public price list where a win rate is measured."""
    if keys is None:
        return tiny_random.prefers_many_es(prompts, first, second)
    body = json.dumps({"prompts": prompts, "first": first, "second": second, "keys": keys}).encode()
    with urllib.request.urlopen(os.environ["BILLED_RUN_SERVICE"], body, timeout=60) as answer:
        return np.array(json.load(answer))


def get_config() -> ml_collections.ConfigDict:
    """Returns the tiny configuration with more steps."""
    config = tiny_random.get_config()
    config.name = "billed_run"
    config.max_queries = 96
    config.exploration.planning_after_queries = 40
    config.oracle.kind = "tests.programs.billed_run:billed"
    config.oracle.label = "bradley_terry"
    config.oracle.flip_probability = 0.1
    config.eval.every_queries = 24
    return config


def tell_phases(told: Path) -> None:
    """Writes what the agent is about to do to a file, whenever that changes."""
    timed, number = agent.timed, 0

    @contextlib.contextmanager
    def telling(metrics: agent.Metrics, name: str) -> Iterator[None]:
        nonlocal number
        number += 1
        told.write_text(f"{number} {name} .")
        with timed(metrics, name):
            yield
        told.write_text(f"{number} between steps .")

    agent.timed = telling


if __name__ == "__main__":
    tell_phases(Path(os.environ["BILLED_RUN_PHASE"]))

    def main() -> None:
        train.cache.keep_compiled_programs()
        train.train(console.CONFIG.value, Path(str(console.WORKDIR.value)))

    console.run(main)
