"""Supervised fine-tuning on the tiny random model: it learns, writes a loadable policy, and does nothing twice."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest

from configs import tiny_random
from sea_jax import cache, config, console, learner, policies, sft
from sea_jax.learner import LearnerConfig
from sea_jax.types import Prompts


@pytest.fixture(autouse=True, scope="module")
def _compiled_once() -> None:
    cache.keep_compiled_programs()


def configured(output: Path, **fields: Any) -> ml_collections.ConfigDict:
    settings, tiny = config.default_sft(), tiny_random.get_config()
    settings.data, settings.policy = tiny.data, tiny.policy
    settings.update_from_flattened_dict(
        {
            "output": str(output),
            "steps": 20,
            "max_response_tokens": 40,
            "learner.learning_rate": 1e-2,
            "learner.microbatch_size": 4,
            "learner.remat": False,
            "eval.num_prompts": 8,
        }
        | {name.replace("__", "."): value for name, value in fields.items()}
    )
    config.validate(settings)
    return settings


def run_main(settings: ml_collections.ConfigDict, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(console, "CONFIG", SimpleNamespace(value=settings))
    sft.main()


def test_it_learns_and_writes_a_policy_that_loads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = configured(tmp_path / "policy")
    run_main(settings, monkeypatch)
    before, after = (float(number) for number in capsys.readouterr().out.split(" nats")[0].split()[-3::2])
    assert after < before - 0.5
    loaded = policies.load(str(tmp_path / "policy"), train_last_layers=1)
    source = policies.load("builtin:tiny-random-llama", train_last_layers=1)
    np.testing.assert_array_equal(loaded.frozen["embed"], source.frozen["embed"])
    changed = jax.tree.map(lambda a, b: bool((a != b).any()), loaded.reference, source.reference)
    assert all(jax.tree.leaves(changed))

    written = (tmp_path / "policy" / "model.safetensors").stat().st_mtime_ns
    run_main(settings, monkeypatch)
    assert "nothing to do" in capsys.readouterr().out
    assert (tmp_path / "policy" / "model.safetensors").stat().st_mtime_ns == written


def test_another_recipe_replaces_the_policy_but_never_a_foreign_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "policy"
    run_main(configured(target, steps=1), monkeypatch)
    run_main(configured(target, steps=2), monkeypatch)
    assert json.loads((target / sft.RECIPE).read_text())["steps"] == 2
    (target / sft.RECIPE).unlink()
    with pytest.raises(ValueError, match=r"config.output=.*holds something else"):
        run_main(configured(target, steps=2), monkeypatch)
    assert (target / "model.safetensors").exists()


def test_the_loss_is_the_mean_over_reference_tokens() -> None:
    policy = policies.load("builtin:tiny-random-llama", train_last_layers=1)
    prompts = Prompts(jnp.array([[5, 6, 7], [0, 9, 9]]), jnp.array([[True] * 3, [False, True, True]]))
    tokens, lengths = jnp.array([[[8, 9, 0, 0]], [[3, 4, 5, 0]]]), jnp.array([[3], [4]])
    learner_config = LearnerConfig(microbatch_size=2)
    loss = sft.negative_logprob(
        policy.reference, policy.frozen, prompts, tokens, lengths, config=policy.config, learner_config=learner_config
    )
    (values,) = learner.response_logprobs(
        policy.frozen,
        (policy.reference,),
        prompts,
        tokens,
        lengths,
        config=policy.config,
        remat=False,
        dtype="float32",
    )
    assert float(loss) == pytest.approx(-(values[0, 0, :3].sum() + values[1, 0].sum()) / 7)


def test_prompts_without_a_short_enough_reference_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"config.max_response_tokens=2"):
        sft.fine_tune(configured(tmp_path / "policy", max_response_tokens=2), tmp_path / "policy")
