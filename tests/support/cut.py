"""A run that is cut off behind one of its steps, as a kill would: the labels are paid for, a checkpoint may not be written."""

from pathlib import Path
from typing import Any

import ml_collections
import pytest

from sea_jax import agent, train


def train_and_cut(config: ml_collections.ConfigDict, workdir: Path, step: int) -> None:
    """Begins a run and ends it behind a step, counted from 0."""
    real_step = agent.step

    def cut(this: agent.Agent, state: agent.State, key: Any) -> Any:
        after = real_step(this, state, key)
        if state.step == step:
            raise KeyboardInterrupt
        return after

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(agent, "step", cut)
        with pytest.raises(KeyboardInterrupt):
            train.train(config, workdir)
