"""A contextual dueling bandit with a known nonlinear reward: the SEA paper's findings, looked for in minutes.

python -m experiments.bandit --output=docs/results/bandit.json
"""

import argparse

import jax
import jax.numpy as jnp
from jaxtyping import PRNGKeyArray

from experiments import command, results
from experiments.simulation import RULES, Environment, Recipe, laboratory
from sea_jax.runtime import cache

NUM_TRAIN, NUM_HELD_OUT, NUM_RESPONSES = 256, 64, 64
NUM_FEATURES = 16
HIDDEN = 32
SCALE = 3.0  # standard deviation of the reward among the responses to a prompt, in logits


def environment(given: None, key: PRNGKeyArray) -> Environment:
    """Draws prompts, responses and a taste: a random network of the features; the judge is the oracle itself.

    The policy sees the features and random nonlinear functions of them, none of which is the reward's.
    """
    keys = jax.random.split(key, 5)
    prompts = NUM_TRAIN + NUM_HELD_OUT
    shape = (prompts, NUM_RESPONSES, NUM_FEATURES)
    context = jax.random.normal(keys[0], (prompts, 1, NUM_FEATURES))
    features = (jax.random.normal(keys[1], shape) + 0.5 * context) / 1.25**0.5
    inner = jax.random.normal(keys[2], (NUM_FEATURES, HIDDEN)) / NUM_FEATURES**0.5
    outer = jax.random.normal(keys[3], (HIDDEN,))
    reward = jnp.tanh(2 * features @ inner) @ outer
    spread = jnp.sqrt(reward.var(1).mean())
    reward = SCALE * (reward - reward.mean(1, keepdims=True)) / spread
    random = jnp.cos(features @ jax.random.normal(keys[4], (NUM_FEATURES, 2 * HIDDEN)) / NUM_FEATURES**0.5)
    return Environment(
        erm_features=features,
        policy_features=jnp.concatenate([features, random], axis=-1),
        oracle=reward,
        judge=reward,
        text=jnp.broadcast_to(jnp.arange(NUM_RESPONSES), (prompts, NUM_RESPONSES)),
        lengths=jnp.ones((prompts, NUM_RESPONSES), jnp.int32),
        num_train=NUM_TRAIN,
    )


def recipes(queries: int) -> dict[str, Recipe]:
    """Returns what is compared: every rule; variants of Table 1 that are not among them; planning.

    Variants 1 and 4 are "passive" by its policy and by its best of n, 2 and 5 "bai_ts", 3 and 6 "sea", 7
    "reference_bai_ts" by its best of n.

    Args:
      queries: the budget; the burn-in is a fiftieth of it, as in the paper.
    """
    burn_in = queries // 50
    return {rule: Recipe(rule=rule) for rule in RULES} | {
        "offline": Recipe(writer="reference"),
        "sea": Recipe(rule="bai_ts", gamma=0.7, burn_in_queries=burn_in),
        "sea_max_margin": Recipe(rule="bai_ts", gamma=0.7, burn_in_queries=burn_in, erm_pair="max_margin"),
        "reference_bai_ts": Recipe(rule="bai_ts", writer="reference", learns_policy=False),
        "passive_planning_4": Recipe(planning_steps=4),
        "bai_ts_planning_1": Recipe(rule="bai_ts", planning_steps=1),
        "bai_ts_planning_4": Recipe(rule="bai_ts", planning_steps=4),
        "bai_ts_planning_4_hard": Recipe(rule="bai_ts", planning_steps=4, planning_label="hard"),
    }


def main() -> None:
    """Runs the recipes and writes what they found."""
    parser = argparse.ArgumentParser(prog="python -m experiments.bandit", description=__doc__.splitlines()[0])
    command.add_arguments(parser, queries=768, output="runs/bandit.json")
    arguments = parser.parse_args()
    chosen = command.choose_recipes(parser, arguments, recipes(arguments.queries))
    cache.keep_compiled_programs()
    sizes = command.sizes_for(chosen, queries=arguments.queries, batch_size=16, num_samples=8)
    grid = results.log_grid(arguments.queries, 4 * sizes.batch_size)
    results.run_all(
        laboratory(sizes, environment),
        chosen,
        rates=arguments.rates,
        num_seeds=arguments.seeds,
        tune_by="policy/oracle",
        grid=grid,
        path=arguments.output,
        about=results.about(sizes),
    )


if __name__ == "__main__":
    main()
