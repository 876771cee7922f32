"""Real prompts, responses, features, oracle and judge; the policy is a distribution over each prompt's pool.

python -m experiments.responses --prompts=256 --responses=16
python -m experiments.pool --prompts=256 --responses=16 --output=docs/results/pool.json
"""

import argparse
from collections.abc import Callable, Mapping
from dataclasses import replace

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Float32, Int32, PRNGKeyArray

from experiments import command, responses, results
from experiments.responses import Responses
from experiments.simulation import RULES, Environment, Recipe, laboratory
from sea_jax.runtime import cache

SCALE = 10.0  # of similarities, inside Bradley-Terry's sigmoid, as in the quickstart
COMPONENTS = 64  # of hidden states and embeddings
POLICY_LAYER = "mean-24"
Values = Float[np.ndarray, "P N"]
Features = Float32[np.ndarray, "P N d"]


def similarity(pool: Responses, to: Float32[np.ndarray, "P e"]) -> Values:
    """Cosine of the embeddings of responses and of one text per prompt."""
    return np.einsum("pne,pe->pn", pool.columns["minilm"], to).astype(np.float64)


def distinct_words(pool: Responses) -> Values:
    """The share of a response's words that are not a repetition; 1 where there is none."""
    split = [[text.split() for text in row] for row in pool.texts]
    return np.array([[len(set(words)) / max(len(words), 1) if words else 1.0 for words in row] for row in split])


def fluency(pool: Responses) -> Values:
    """Mean log-prob of a token under the starting policy."""
    return (pool.columns["logprobs"] / pool.columns["lengths"]).astype(np.float64)


def within(values: Values) -> Values:
    """Values apart from their prompt's mean, in units of their spread there; 0 where there is none."""
    apart = values - values.mean(1, keepdims=True)
    spread = np.sqrt((apart**2).mean())
    return apart / np.where(spread > 1e-6, spread, 1.0)


def _with_fluency(pool: Responses) -> Values:
    """Similarity to the post plus half as much spread of fluency."""
    post = similarity(pool, pool.prompt_embeddings)
    return post + 0.5 * np.sqrt(((post - post.mean(1, keepdims=True)) ** 2).mean()) * within(fluency(pool))


ORACLES: Mapping[str, Callable[[Responses], Values]] = {
    "post": lambda pool: similarity(pool, pool.prompt_embeddings),
    "post_x_distinct": lambda pool: similarity(pool, pool.prompt_embeddings) * distinct_words(pool),
    "post_and_human": lambda pool: (
        0.5 * similarity(pool, pool.prompt_embeddings) + 0.5 * similarity(pool, pool.reference_embeddings)
    ),
    "human": lambda pool: similarity(pool, pool.reference_embeddings),
    "post_and_fluency": _with_fluency,
}


def shallow(pool: Responses) -> Features:
    """Length, fluency and share of distinct words."""
    columns = (pool.columns["lengths"].astype(np.float64), fluency(pool), distinct_words(pool))
    return np.stack([within(each) for each in columns], axis=-1).astype(np.float32)


def minilm(pool: Responses) -> Features:
    """MiniLM's embedding of the response, and its product with the prompt's."""
    own = pool.columns["minilm"]
    return np.concatenate([own, own * pool.prompt_embeddings[:, None]], axis=-1)


def hidden(*names: str) -> Callable[[Responses], Features]:
    """Hidden states, side by side."""
    return lambda pool: np.concatenate([pool.columns[name] for name in names], axis=-1)


FEATURES: Mapping[str, Callable[[Responses], Features]] = {
    "mean-12": hidden("mean-12"),
    "last-12": hidden("last-12"),
    "mean-24": hidden("mean-24"),
    "mean-30": hidden("mean-30"),
    "last-30": hidden("last-30"),
    "layers": hidden(*(f"mean-{layer}" for layer in responses.LAYERS)),
    "mean-and-last": hidden("mean-12", "last-12", "mean-24", "last-24"),
    "minilm": minilm,
    "shallow": shallow,
    "minilm-and-shallow": lambda pool: np.concatenate([minilm(pool), shallow(pool)], axis=-1),
}


def components(features: Features, num_train: int, count: int = COMPONENTS) -> Features:
    """The principal components of what differs among the responses to a training prompt, after each feature's spread.

    As many as there are if these are fewer than `count`; their mean variance is 1.
    """
    spread = np.sqrt(((features[:num_train] - features[:num_train].mean(1, keepdims=True)) ** 2).mean((0, 1)))
    scaled = features / np.where(spread > 1e-6, spread, 1.0)
    apart = (scaled[:num_train] - scaled[:num_train].mean(1, keepdims=True)).reshape(-1, features.shape[-1])
    _, variance, axes = np.linalg.svd(apart / len(apart) ** 0.5, full_matrices=False)
    kept = axes[:count]
    projected = (scaled - scaled[:num_train].mean((0, 1))) @ kept.T
    return (projected / np.sqrt((variance[:count] ** 2).mean())).astype(np.float32)


def text_numbers(texts: list[list[str]]) -> Int32[np.ndarray, "P N"]:
    """Responses to one prompt have the same number where they are the same text."""
    return np.array([[row.index(text) for text in row] for row in texts], np.int32)


def sampled(pool: Responses) -> Responses:
    """The pool without its greedy responses, which stand first."""
    columns = {name: values[:, 1:] for name, values in pool.columns.items()}
    return replace(pool, texts=[row[1:] for row in pool.texts], columns=columns)


def environment(pool: Responses, oracle: str, features: str) -> Environment:
    """Returns a laboratory's environment of a pool.

    Args:
      pool: Responses.
      oracle: one of ORACLES.
      features: what the ERM sees, one of FEATURES.
    """
    pool = sampled(pool)
    states = components(pool.columns[POLICY_LAYER], pool.num_train)
    return Environment(
        erm_features=jnp.asarray(components(FEATURES[features](pool), pool.num_train)),
        policy_features=jnp.asarray(np.concatenate([states, shallow(pool)], axis=-1)),
        oracle=jnp.asarray(SCALE * ORACLES[oracle](pool), jnp.float32),
        judge=jnp.asarray(SCALE * ORACLES["human"](pool), jnp.float32),
        text=jnp.asarray(text_numbers(pool.texts)),
        lengths=jnp.asarray(pool.columns["lengths"], jnp.int32),
        num_train=pool.num_train,
    )


def given_to_all(given: Environment, key: PRNGKeyArray) -> Environment:
    """Every seed has the same pool."""
    return given


def recipes() -> dict[str, Recipe]:
    """Returns what is compared: every rule; where the reward model stands between; planning; and those without activity."""
    return {rule: Recipe(rule=rule) for rule in RULES} | {
        "offline": Recipe(writer="reference"),
        "passive_erm_best_worst": Recipe(lessons="erm_best_worst"),
        "passive_planning_4": Recipe(planning_steps=4),
        "bai_ts_planning_4": Recipe(rule="bai_ts", planning_steps=4),
        "bai_ts_planning_1": Recipe(rule="bai_ts", planning_steps=1),
        "bai_ts_planning_4_hard": Recipe(rule="bai_ts", planning_steps=4, planning_label="hard"),
        "infomax_planning_4": Recipe(rule="infomax", planning_steps=4),
        "drts_planning_4": Recipe(rule="drts", planning_steps=4),
        "bai_ts_erm_best_worst": Recipe(rule="bai_ts", lessons="erm_best_worst"),
        "bai_ts_erm_best_worst_planning_4": Recipe(rule="bai_ts", lessons="erm_best_worst", planning_steps=4),
        "uncertainty_erm_best_worst_planning_4": Recipe(rule="uncertainty", lessons="erm_best_worst", planning_steps=4),
        # `information_directed` but for its second pair, its loss and its anchor
        "infomax_erm_best_worst_planning_1": Recipe(
            rule="infomax", lessons="erm_best_worst", planning_steps=1, planning_after_queries=0
        ),
    }


def main() -> None:
    """Runs the recipes and writes what they found."""
    parser = argparse.ArgumentParser(prog="python -m experiments.pool", description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", type=int, default=512, help="of the pool, as for experiments.responses")
    parser.add_argument("--responses", type=int, default=32, help="the same")
    parser.add_argument("--samples", type=int, default=8, help="M, candidates of a prompt")
    parser.add_argument("--flip", type=float, default=0.0, help="share of the labels that are exchanged")
    parser.add_argument("--anchor", type=float, default=50.0, help="pull of the ERM's heads, as in the quickstart")
    parser.add_argument("--erm_steps", type=int, default=2, help="gradient steps of the ERM per step")
    parser.add_argument("--oracle", choices=list(ORACLES), default="post")
    parser.add_argument("--features", choices=list(FEATURES), default="mean-12", help="what the ERM sees")
    parser.add_argument("--tune_by", default="policy/judge", help="what the search for the rate maximises")
    command.add_arguments(parser, queries=512, output="runs/pool.json")
    arguments = parser.parse_args()
    chosen = command.choose_recipes(parser, arguments, recipes())
    cache.keep_compiled_programs()
    pool = responses.load_or_write(arguments.prompts, arguments.responses)
    sizes = command.sizes_for(chosen, queries=arguments.queries, batch_size=8, num_samples=arguments.samples)
    sizes = replace(sizes, ensemble=replace(sizes.ensemble, steps=arguments.erm_steps))
    grid = results.log_grid(arguments.queries, 4 * sizes.batch_size)
    noise = {"flip_probability": arguments.flip, "anchor_strength": arguments.anchor}
    results.run_all(
        laboratory(sizes, given_to_all, environment(pool, arguments.oracle, arguments.features)),
        {name: replace(recipe, **noise) for name, recipe in chosen.items()},
        rates=arguments.rates,
        num_seeds=arguments.seeds,
        tune_by=arguments.tune_by,
        grid=grid,
        path=arguments.output,
        about=results.about(sizes),
    )


if __name__ == "__main__":
    main()
