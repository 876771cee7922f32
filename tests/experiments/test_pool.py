"""A pool of a few made-up texts, whose rewards are known."""

from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest

from experiments import pool, responses, results, simulation
from experiments.responses import Responses

NUM_TRAIN, NUM_HELD_OUT, NUM_SAMPLES, WIDTH = 40, 8, 5, 6


def turned(angles: np.ndarray) -> np.ndarray:
    """Unit vectors, so that the cosine of two of them is that of the difference of their angles."""
    return np.stack([np.cos(angles), np.sin(angles)], axis=-1).astype(np.float32)


@pytest.fixture(scope="module")
def made_up() -> Responses:
    """Every response is a number of words; its embedding is turned away from the post's by as many tenths, and by as many
    from a whole radian to that of the human summary; its hidden states tell the number.
    """
    generator = np.random.default_rng(0)
    shape = (NUM_TRAIN + NUM_HELD_OUT, 1 + NUM_SAMPLES)
    numbers = generator.permuted(np.broadcast_to(np.arange(1, 2 + NUM_SAMPLES), shape), axis=1).astype(np.int32)
    states = generator.normal(size=(*shape, WIDTH)).astype(np.float32)
    states[..., 0] = numbers
    layers = {f"{what}-{layer}": states for what in ("mean", "last") for layer in responses.LAYERS}
    columns = {"lengths": numbers, "logprobs": -2.0 * numbers, "minilm": turned(numbers / 10)}
    texts = [[" ".join(["word"] * number) for number in row] for row in numbers]
    anchor = np.zeros(shape[0])
    return Responses(
        NUM_TRAIN,
        ["post"] * shape[0],
        ["summary"] * shape[0],
        texts,
        columns | layers,
        turned(anchor),
        turned(anchor + 1),
    )


def test_what_is_known_of_a_response_is_what_can_be_worked_out(made_up: Responses) -> None:
    numbers = made_up.columns["lengths"]
    post, human = np.cos(numbers / 10), np.cos(1 - numbers / 10)
    expected = {"post": post, "human": human, "post_and_human": (post + human) / 2, "post_x_distinct": post / numbers}
    for name, values in expected.items():
        np.testing.assert_allclose(pool.ORACLES[name](made_up), values, rtol=1e-5)
    np.testing.assert_allclose(pool.fluency(made_up), -2.0)


def test_an_oracle_with_fluency_is_half_of_it_by_spread(made_up: Responses) -> None:
    uneven = replace(made_up, columns=made_up.columns | {"logprobs": -(made_up.columns["lengths"] ** 2.0)})
    post = pool.ORACLES["post"](uneven)
    added = pool.ORACLES["post_and_fluency"](uneven) - post
    spread = [np.sqrt((values - values.mean(1, keepdims=True)).__pow__(2).mean()) for values in (added, post)]
    assert spread[0] == pytest.approx(0.5 * spread[1])
    assert np.corrcoef(added[0], pool.fluency(uneven)[0])[0, 1] == pytest.approx(1)


def test_components_keep_distances_within_a_prompt_and_learn_from_no_prompt_that_is_held_out() -> None:
    features = np.random.default_rng(1).normal(size=(6, 4, 3)).astype(np.float32)
    spread = np.sqrt(((features[:4] - features[:4].mean(1, keepdims=True)) ** 2).mean((0, 1)))
    found = pool.components(features, 4)

    def distances(of: np.ndarray) -> np.ndarray:
        return np.linalg.norm(of[:, :, None] - of[:, None], axis=-1)

    # As many as there are: a turn of the features, each divided by its spread, which has the mean variance 1 on the left.
    np.testing.assert_allclose(distances(found) ** 2, distances(features / spread) ** 2, rtol=1e-4, atol=1e-5)
    strange = np.concatenate([features[:4], 100 * features[4:]])
    np.testing.assert_array_equal(pool.components(strange, 4)[:4], found[:4])
    assert pool.components(features, 4, count=2).shape == (6, 4, 2)


@pytest.mark.parametrize("features", list(pool.FEATURES))
def test_the_environment_has_samples_alone_and_rewards_in_logits(made_up: Responses, features: str) -> None:
    found = pool.environment(made_up, "post", features)
    numbers = made_up.columns["lengths"][:, 1:]  # without the greedy response
    np.testing.assert_allclose(found.oracle, 10 * np.cos(numbers / 10), rtol=1e-5)
    np.testing.assert_allclose(found.judge, 10 * np.cos(1 - numbers / 10), rtol=1e-5)
    np.testing.assert_array_equal(found.lengths, numbers)
    np.testing.assert_array_equal(found.text, np.broadcast_to(np.arange(NUM_SAMPLES), numbers.shape))
    assert found.erm_features.shape[:2] == found.policy_features.shape[:2] == numbers.shape


def test_equal_texts_have_one_number() -> None:
    np.testing.assert_array_equal(pool.text_numbers([["a", "b", "a"], ["b", "b", "c"]]), [[0, 1, 0], [0, 0, 2]])


def test_every_recipe_of_the_pool_can_be_run() -> None:
    for recipe in pool.recipes().values():
        recipe.choices(simulation.RULES)


def test_the_command_finds_that_the_policy_learns_what_the_oracle_likes_and_the_judge_does_not(
    made_up: Responses, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked: list[tuple[int, ...]] = []

    def load(*size: int) -> Responses:
        asked.append(size)
        return made_up

    monkeypatch.setattr(responses, "load_or_write", load)
    path = tmp_path / "pool.json"
    command = f"pool --prompts=48 --responses=5 --queries=96 --seeds=2 --rates 0.3 --output={path}"
    monkeypatch.setattr("sys.argv", [*command.split(), "--recipes", "passive_planning_4", "--erm_steps=1"])
    pool.main()
    assert asked == [(48, 5)]
    written = results.read(path)
    assert written.about["sizes"]["ensemble"]["steps"] == 1
    found = written.curves["passive_planning_4"]
    assert found["policy/oracle"].shape[0] == 2
    np.testing.assert_allclose(found["policy/oracle"][:, 0], 0.5, atol=1e-4)
    last = {name: np.nanmax(found[f"policy/{name}"], axis=1) for name in ("oracle", "judge")}
    lowest = np.nanmin(found["policy/judge"], axis=1)
    assert (last["oracle"] > 0.6).all()  # few words are close to the post
    assert (lowest < 0.45).all()  # and far from the human summary
    assert (np.nanmin(found["length"], axis=1) < found["length"][:, 0]).all()
    jax.clear_caches()
