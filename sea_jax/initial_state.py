"""The state of a run before its first step: the policy, the ERM, and room for what will be labelled."""

import jax

from sea_jax import ensemble, learner
from sea_jax.agent import State
from sea_jax.config import RunSettings
from sea_jax.data import batching
from sea_jax.models import decoder, partition
from sea_jax.open_pairs import OpenPairs, empty_open_pairs
from sea_jax.replay import empty_replay
from sea_jax.types import LateOracle, Oracle
from sea_jax.wiring import Parts


def replay_capacity(config: RunSettings, num_carried: int = 0) -> int:
    """Returns how many duels the replay holds: never more than the run pays for or began with, and always a batch."""
    return max(min(config.erm.replay_capacity, num_carried + config.max_queries), config.data.batch_size)


def initial_state(
    config: RunSettings, loaded: Parts, total_steps: int, num_carried: int = 0, oracle: Oracle | None = None
) -> State:
    """Returns the state of a run before its first step.

    Args:
      config: RunSettings.
      loaded: Parts.
      total_steps: policy steps of the schedule.
      num_carried: labels of another run that the replay must have room for as well.
      oracle: for whose late answers there is room; None: nobody's.
    """
    model, initial = loaded.policy.config, loaded.policy.initial
    key = jax.random.fold_in(jax.random.key(config.seed), 0)
    return State(
        learner=learner.init(
            partition.put(initial, decoder.specs(model, initial)),
            learner.configured(config.learner, total_steps=total_steps, dtype=config.policy.dtype),
        ),
        ensemble=ensemble.init(config.erm, loaded.num_features, key),
        replay=empty_replay(replay_capacity(config, num_carried), loaded.num_features),
        step=0,
        queries=0,
        batches=0,
        open=room_for_open_pairs(config, loaded, oracle) if isinstance(oracle, LateOracle) else None,
    )


def room_for_open_pairs(config: RunSettings, loaded: Parts, oracle: LateOracle) -> OpenPairs:
    """Returns room for all that can be open at a time: an oracle step is a policy step, and older pairs are withdrawn."""
    longest = max(len(prompt.tokens) for prompt in loaded.train_prompts)
    return empty_open_pairs(
        config.data.batch_size * (oracle.max_staleness + 2),
        batching.rounded(longest, config.data.bucket),
        config.sampling.max_new_tokens,
        loaded.num_features,
    )
