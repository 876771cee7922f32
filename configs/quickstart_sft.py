"""The starting policy of the quickstart: SmolLM2-135M-Instruct, fine-tuned briefly to end after one sentence.

python -m sea_jax.sft --config=configs/quickstart_sft.py      (about 2 minutes on 2 cores; a second call does nothing)

Expected: the held-out loss falls from 3.8 to 3.0 nats per token.
"""

import ml_collections

from sea_jax.config import default_sft


def get_config() -> ml_collections.ConfigDict:
    """Returns the configuration."""
    config = default_sft()
    config.name = "quickstart_sft"
    config.output = "cache:quickstart-sft"
    config.steps = 48
    config.max_response_tokens = 20

    config.policy.source = "builtin:smollm2-135m-instruct"
    config.policy.train_last_layers = 10
    config.policy.dtype = "float32"

    config.data.source = "docstrings"
    config.data.template = "{prompt}\n\nOne-sentence summary:"
    config.data.max_prompt_tokens = 64
    config.data.bucket = 64
    config.data.heldout_fraction = 0.15
    config.data.near_duplicate_share = 1 / 3
    config.data.special_tokens = "tokens"  # one docstring has <filename>
    config.data.batch_size = 8

    config.learner.learning_rate = 1e-4
    config.learner.microbatch_size = 8
    config.learner.remat = False
    return config
