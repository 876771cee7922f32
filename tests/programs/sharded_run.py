"""One run of the tiny configuration on a mesh, in a process of its own.

python -m tests.programs.sharded_run MESH WORKDIR [MODELS]

MESH is like 2,2,2. MODELS is a directory that holds the models that `write_models` writes.
"""

import sys
from pathlib import Path

import ml_collections
from absl import flags

from configs import tiny_random as tiny_config
from sea_jax import train
from sea_jax.models.checkpoints import tiny_random
from sea_jax.runtime import cache, console, processes


def write_models(directory: Path) -> None:
    """Writes a policy whose heads eight devices can share, and a reward model."""
    sizes = {"hidden_size": 64, "num_attention_heads": 8, "num_key_value_heads": 8}
    tiny_random.write(directory / "policy", "tiny-random-gpt-neox", changes=sizes)
    tiny_random.write(
        directory / "reward", "tiny-random-llama-reward", seed=1, changes=sizes | {"max_position_embeddings": 2048}
    )


def configured(mesh: tuple[int, ...], models: Path) -> ml_collections.ConfigDict:
    """The tiny configuration with every part of the paper's setting, all trained, in batches that eight devices can share."""
    config = tiny_config.get_config()
    config.mesh = mesh
    config.policy.source = str(models / "policy")
    config.policy.train_last_layers = 0
    config.data.batch_size = 8
    config.learner.microbatch_size = 8
    config.eval.batch_size = 8
    config.erm.trunk, config.erm.feature_layer = "builtin:tiny-random-deberta", 0
    config.erm.trunk_batch_size = 8
    config.eval.best_of_n = 0
    config.oracle.kind = "reward_model"
    config.oracle.reward_model = str(models / "reward")
    config.oracle.dtype = "float32"
    config.oracle.batch_size = 8
    return config


if __name__ == "__main__":
    flags.FLAGS(sys.argv[:1])
    mesh, workdir, models = sys.argv[1:4]
    cache.keep_compiled_programs()
    if len(sys.argv) > 4:
        processes.connect(sys.argv[4], 2, int(sys.argv[5]))
    console.quiet_libraries()
    train.train(configured(tuple(int(size) for size in mesh.split(",")), Path(models)), Path(workdir))
