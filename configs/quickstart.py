"""SEA on a laptop: SmolLM2-135M learns one-sentence summaries of docstrings from a few hundred labels.

python -m sea_jax.sft --config=configs/quickstart_sft.py      (once; about 2 minutes on 2 cores)
python -m sea_jax.train --config=configs/quickstart.py        (29 minutes on one core that is shared)

Expected after 256 queries, of one seed: win rate 0.67 by the oracle, and by the judge 0.54 [0.47, 0.61], which is not told
from the 0.50 of the start; see docs/results.md.
"""

import ml_collections

from configs import quickstart_sft
from sea_jax.config import default
from sea_jax.methods.table import with_method


def get_config(method: str = "") -> ml_collections.ConfigDict:
    """Returns the configuration.

    Args:
      method: one of docs/methods.md, as in configs/quickstart.py:online; "": as told above.
    """
    config, sft = default(), quickstart_sft.get_config()
    config.name = "quickstart"
    config.max_queries = 256

    config.policy = sft.policy
    config.policy.source = sft.output
    config.data = sft.data
    config.data.batch_size = 16

    config.sampling.num_samples = 8
    config.sampling.max_new_tokens = 20

    config.exploration.gamma = 1.0
    config.exploration.burn_in_queries = 0
    config.exploration.planning_steps = 0  # the heads tell too little of this oracle to teach the policy
    config.exploration.planning_after_queries = 48  # of a method that plans

    config.erm.feature_layer = 12
    config.erm.anchor_strength = 50.0  # at the paper's 0.5 the heads are far too sure of what few labels say
    config.learner.learning_rate = 1e-4
    config.learner.microbatch_size = 16
    config.learner.remat = False
    config.learner.warmup_fraction = 0.0
    config.learner.final_fraction = 1.0

    config.oracle.against = "mixture"  # half the post, half the summary that a person wrote of it
    config.oracle.reference_weight = 0.5
    config.oracle.repetition_penalty = 0.25  # without, it likes longer responses
    config.oracle.label = "deterministic"

    config.eval.every_queries = 128
    config.eval.num_prompts = 256
    config.eval.batch_size = 64
    config.eval.max_new_tokens = 20
    config.eval.likelihood_prompts = 32
    config.eval.judge.kind = "embedding"
    config.eval.judge.against = "reference"  # people's summaries of the held-out posts, which nothing is learnt from
    config.checkpoint.every_steps = 4
    return with_method(config, method)
