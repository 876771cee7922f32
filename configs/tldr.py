"""The paper's TL;DR setting: Pythia summarises Reddit posts, Skywork's reward model judges, PairRM's trunk feeds the ERM.

python -m sea_jax.train --config=configs/tldr.py          (Pythia 1B; :2.8b and :6.9b for the larger ones)
python -m sea_jax.memory --config=configs/tldr.py:6.9b --devices=8

Made for 8 GPUs of 80 GB. Models and data come from the Hugging Face hub by the names below; without it, point
--config.policy.source, --config.erm.trunk, --config.oracle.reward_model and --config.data.path at local copies.

Expected (paper, Fig. 5): the win rate that passive online DPO reaches after 50,000 queries takes SEA half as many or fewer.
"""

import ml_collections

from sea_jax.config import default
from sea_jax.methods.table import with_method

POLICIES = {
    "1b": "trl-lib/pythia-1b-deduped-tldr-sft",
    "2.8b": "trl-lib/pythia-2.8b-deduped-tldr-sft",
    "6.9b": "trl-lib/pythia-6.9b-deduped-tldr-sft",
}

# Prompts answered at a time, for memory: the rest of a step needs no more than this, on 8 devices of 40 GB.
SAMPLED_AT_A_TIME = {"1b": 128, "2.8b": 64, "6.9b": 32}


def get_config(choice: str = "1b") -> ml_collections.ConfigDict:
    """Returns the configuration.

    Args:
      choice: one of POLICIES, or with a method of docs/methods.md behind it, as in 1b,online.

    Raises:
      ValueError: there is no such size or method.
    """
    size, _, method = choice.partition(",")
    if size not in POLICIES:
        raise ValueError(f"configs/tldr.py:{size}: the sizes are {', '.join(POLICIES)}")
    config = default()
    config.name = f"tldr-{size}"
    config.mesh = (1, -1, 1)  # parameters and batches divided over all devices
    config.max_queries = 50_000

    config.policy.source = POLICIES[size]
    config.policy.dtype = "bfloat16"

    config.data.source = "huggingface"
    config.data.path = "lkevinzc/tldr-with-sft-reference"
    config.data.split = "train"
    config.data.heldout_split = "test"
    config.data.prompt_field = "prompt"
    config.data.reference_field = f"pythia-{size}-reference"  # greedy responses of the policy that training starts from
    config.data.num_prompts = 50_000
    config.data.near_duplicate_share = 1 / 3  # posts are reposted, with small changes
    config.data.max_prompt_tokens = 1024
    config.data.batch_size = 128

    config.sampling.num_samples = 20
    config.sampling.max_new_tokens = 53
    config.sampling.temperature = 0.7
    config.sampling.batch_size = SAMPLED_AT_A_TIME[size]

    config.exploration.rule = "bai_ts"
    config.exploration.gamma = 0.7
    config.exploration.burn_in_queries = 1000

    config.erm.trunk = "llm-blender/PairRM-hf"
    config.erm.trunk_dtype = "bfloat16"
    config.erm.trunk_batch_size = 64
    config.erm.standardise = False

    config.loss.name = "dpo"
    config.learner.microbatch_size = 8
    config.learner.remat = True

    config.oracle.kind = "reward_model"
    config.oracle.reward_model = "Skywork/Skywork-Reward-Llama-3.1-8B"
    config.oracle.dtype = "bfloat16"
    config.oracle.scale = 1.0  # the reward is a Bradley-Terry logit
    config.oracle.label = "bradley_terry"
    config.oracle.batch_size = 32

    config.eval.every_queries = 1280  # ten steps while every duel goes to the oracle
    config.eval.num_prompts = 1000
    config.eval.batch_size = SAMPLED_AT_A_TIME[size]
    config.eval.max_new_tokens = 128  # longer than in training, so that summaries end by themselves
    config.eval.against_references = True
    return with_method(config, method)
