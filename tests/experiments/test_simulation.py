"""A laboratory so small that its numbers can be worked out."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import bandit, results, simulation
from experiments.simulation import Environment, Recipe, Sizes, laboratory
from sea_jax.ensemble import EnsembleSettings
from sea_jax.losses import LossSettings

SIZES = Sizes(
    queries=12,
    batch_size=4,
    num_samples=3,
    best_of_n=2,
    evaluations=2,
    ensemble=EnsembleSettings(num_heads=2, hidden_size=4, batch_size=4, steps=1),
    loss=LossSettings(),
    rules=("passive", "bai_ts", "uncertainty"),
)
NUM_TRAIN = SIZES.batch_size * (1 + simulation.MAX_PLANNING)


def made_up(key: jax.Array) -> Environment:
    """Five responses, told apart by one feature, of which the reward is twice as much."""
    feature = jax.random.normal(key, (NUM_TRAIN + 6, 5, 1))
    return Environment(
        erm_features=feature,
        policy_features=feature,
        oracle=2 * feature[..., 0],
        judge=-2 * feature[..., 0],
        text=jnp.broadcast_to(jnp.arange(5), feature.shape[:2]),
        lengths=jnp.ones(feature.shape[:2], jnp.int32),
        num_train=NUM_TRAIN,
    )


@pytest.fixture(scope="module")
def run():
    return laboratory(SIZES, lambda given, key: made_up(key))


def test_a_response_wins_against_those_below_it_and_half_against_its_equals():
    rates = simulation.win_rates(jnp.array([[3.0, 1.0, 1.0, 0.0]]))
    np.testing.assert_allclose(rates, [[1.0, 0.5, 0.5, 0.0]])


def test_the_best_of_two_is_the_better_one_unless_the_worse_was_drawn_twice():
    chosen = simulation.best_of_n(jnp.array([[0.2, 0.5, 0.3]]), jnp.array([[9.0, 1.0, 5.0]]), 2)
    # Worst first: 0.5^2, then 0.8^2 - 0.5^2, then the rest.
    np.testing.assert_allclose(chosen, [[0.36, 0.25, 0.39]], rtol=1e-5)


def test_the_starting_policy_wins_half_and_a_passive_run_teaches_it_what_the_oracle_likes(run):
    found = run(Recipe(), [0.5, 0.0], [0, 1])
    np.testing.assert_allclose(found["policy/oracle"][:, 0], 0.5, atol=1e-6)
    assert found["policy/oracle"][0, -1] > 0.6
    np.testing.assert_allclose(found["policy/oracle"][1], 0.5, atol=1e-6)  # no rate, no learning
    np.testing.assert_allclose(
        found["policy/oracle"] + found["policy/judge"], 1, atol=1e-5
    )  # who is of the opposite mind
    assert found["queries"][:, -1].max() <= SIZES.queries


def test_the_same_seed_twice_gives_the_same_numbers_and_another_recipe_others(run):
    first, again, other = (
        run(recipe, [0.5, 0.5], [3, 4]) for recipe in (Recipe(), Recipe(), Recipe(rule="uncertainty"))
    )
    for name, values in first.items():
        np.testing.assert_array_equal(values, again[name])
    assert (first["cumulative_regret"] != other["cumulative_regret"]).any()


def test_planning_takes_more_policy_steps_for_the_same_labels(run):
    plain, planned = (run(Recipe(planning_steps=p, planning_after_queries=0), [0.1] * 2, [0, 1]) for p in (0, 2))
    np.testing.assert_array_less(2 * plain["policy_steps"][:, -1], planned["policy_steps"][:, -1] + 1)
    assert planned["queries"][:, -1].max() <= SIZES.queries


def test_who_does_not_learn_stays_where_he_was(run):
    found = run(Recipe(rule="bai_ts", writer="reference", learns_policy=False), [0.5] * 2, [0, 1])
    np.testing.assert_allclose(found["policy/oracle"], 0.5, atol=1e-6)
    np.testing.assert_array_equal(found["policy_steps"], 0)
    assert found["queries"][:, -1].min() > 0


def test_regret_is_that_of_the_duellists_against_the_best_of_the_pool():
    """One step by hand: two responses alone, so that every duel compares them and its regret is half their distance."""
    environment = jax.tree.map(lambda x: x[:, :2], made_up(jax.random.key(0)))
    run = simulation.begin(SIZES, environment, jax.random.key(1))
    rows = jnp.arange(NUM_TRAIN).reshape(-1, SIZES.batch_size)
    step = jax.jit(simulation.step, static_argnums=1)
    after = step(
        Recipe().choices(SIZES.rules),
        SIZES,
        environment,
        run,
        rows.astype(jnp.int32),
        jnp.float32(0.0),
        jax.random.key(2),
    )
    count = int(after.queries)
    apart = np.abs(np.diff(np.asarray(environment.oracle[: SIZES.batch_size]), axis=1))[:, 0] / 2
    assert count > 0
    subsets = [apart[np.array(mask, bool)].sum() for mask in np.ndindex(*(2,) * len(apart)) if sum(mask) == count]
    assert min(abs(float(after.regret) - s) for s in subsets) < 1e-5
    assert float(after.online) == pytest.approx(0.5 * count)  # of two, one wins


def test_what_is_no_choice_is_refused_by_name():
    with pytest.raises(ValueError, match="lessons='all'"):
        replace(Recipe(), lessons="all").choices(SIZES.rules)


def test_the_bandit_has_variants_that_all_can_be_run():
    for recipe in bandit.recipes(100).values():
        recipe.choices(simulation.RULES)


def test_curves_are_read_where_queries_were_paid_for_and_nowhere_beyond():
    found = {"queries": np.array([[0.0, 4.0, 8.0]]), "w": np.array([[0.5, 0.6, 0.8]])}
    np.testing.assert_allclose(
        results.at_queries(found, np.array([0.0, 2.0, 6.0, 9.0]))["w"], [[0.5, 0.55, 0.7, np.nan]]
    )


def test_results_are_read_as_they_were_written(tmp_path):
    curves = {"passive": {"policy/oracle": np.array([[0.5, 0.75], [0.5, np.nan]])}}
    results.save(tmp_path / "r.json", {"commit": "x"}, np.array([0, 4]), {"passive": {"rate": 0.1}}, curves)
    read = results.read(tmp_path / "r.json")
    np.testing.assert_array_equal(read.curves["passive"]["policy/oracle"], curves["passive"]["policy/oracle"])
    assert read.about == {"commit": "x"}
