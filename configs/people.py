"""The quickstart with you as the oracle: 64 of your clicks, each on a pair that Thompson sampling chose.

python -m sea_jax.sft --config=configs/quickstart_sft.py      (once; about 2 minutes on 2 cores)
python -m sea_jax.train --config=configs/people.py            (prints a link; open it in a browser)

`make people` does both. Three people: --config.people.names='("anna","ben","carla")' prints a link for each.
"""

from pathlib import Path

import ml_collections

from configs import quickstart


def get_config(method: str = "") -> ml_collections.ConfigDict:
    """Returns the configuration.

    Args:
      method: one of docs/methods.md; "": that of the quickstart.
    """
    config = quickstart.get_config(method)
    config.name = "people"
    config.max_queries = 64

    config.oracle.kind = "people"
    config.oracle.label = "deterministic"  # what people say is the label
    config.people.guidelines = str(Path(__file__).parent / "people_guidelines.md")

    config.exploration.planning_after_queries = 16

    config.eval.every_queries = 32
    config.eval.num_prompts = 64
    config.checkpoint.every_steps = 1  # so that nothing is computed again where a run is stopped while people think
    return config
