"""Supervised fine-tuning on the tiny random model: it learns, writes a loadable policy, and does nothing twice."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
import pytest

from configs import tiny_random
from sea_jax import config, learner, sft
from sea_jax.models import tokenizer
from sea_jax.models.checkpoints import tiny_random as tiny_models
from sea_jax.policy import load_policy
from sea_jax.runtime import cache, console, files
from sea_jax.types import Prompts
from tests.support import tiny


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
    config.resolve_sft(settings)
    return settings


def run_main(settings: ml_collections.ConfigDict, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(console, "CONFIG", SimpleNamespace(value=settings))
    monkeypatch.setattr(console, "DETERMINISTIC", SimpleNamespace(value=False))
    monkeypatch.setattr(console, "HELP_CONFIG", SimpleNamespace(value=False))
    sft.main()


def test_it_learns_and_writes_a_policy_that_loads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = configured(tmp_path / "policy")
    run_main(settings, monkeypatch)
    before, after = (float(number) for number in capsys.readouterr().out.split(" nats")[0].split()[-3::2])
    assert after < before - 0.5
    loaded = load_policy(str(tmp_path / "policy"), train_last_layers=1, dtype="float32")
    source = load_policy("builtin:tiny-random-llama", train_last_layers=1, dtype="float32")
    np.testing.assert_array_equal(loaded.frozen["embed"], source.frozen["embed"])
    changed = jax.tree.map(lambda a, b: bool((a != b).any()), loaded.reference, source.reference)
    assert all(jax.tree.leaves(changed))
    assert loaded.tokenizer.end_ids == source.tokenizer.end_ids == (0,)

    written = (tmp_path / "policy" / "model.safetensors").stat().st_mtime_ns
    run_main(settings, monkeypatch)
    assert "nothing to do" in capsys.readouterr().out
    recipe = tmp_path / "policy" / sft.RECIPE
    older = json.loads(recipe.read_text())
    del older["output_dtype"]  # which there was no setting for
    recipe.write_text(json.dumps(older))
    run_main(settings, monkeypatch)
    assert "nothing to do" in capsys.readouterr().out
    assert (tmp_path / "policy" / "model.safetensors").stat().st_mtime_ns == written


def made_with(target: Path) -> int:
    load_policy(str(target), train_last_layers=1, dtype="float32")
    return json.loads((target / sft.RECIPE).read_text())["seed"]


def test_another_or_torn_recipe_replaces_the_policy_but_never_a_foreign_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    target = tmp_path / "policy"
    run_main(configured(target, steps=1), monkeypatch)
    run_main(configured(target, steps=1, seed=1), monkeypatch)
    assert made_with(target) == 1
    recipe = target / sft.RECIPE
    older = json.loads(recipe.read_text())
    del older["data"]["skip_bad_rows"]
    recipe.write_text(json.dumps(older))
    run_main(configured(target, steps=1, seed=1), monkeypatch)
    assert json.loads(recipe.read_text()) == older  # nothing is made anew for a setting that was not there
    recipe.write_text(recipe.read_text()[:-9])
    run_main(configured(target, steps=1, seed=1), monkeypatch)
    assert made_with(target) == 1
    assert f"{recipe} is not readable" in caplog.text
    recipe.unlink()
    with pytest.raises(ValueError, match=r"config.output=.*holds something else"):
        run_main(configured(target, steps=1), monkeypatch)
    assert (target / "model.safetensors").exists()


def test_pairs_are_learnt_from_and_more_of_them_make_the_policy_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def pairs(count: int) -> str:
        rows = ({"chosen": f"What is {i}? A word.", "rejected": f"What is {i}? The end."} for i in range(count))
        return "".join(json.dumps(row) + "\n" for row in rows)

    target, path = tmp_path / "policy", tmp_path / "pairs.jsonl"
    fields = {"data.path": str(path), "data.prompt_field": "", "data.rejected_field": "rejected"}
    settings = configured(
        target, steps=1, **fields | {"data.reference_field": "chosen", "data.near_duplicate_share": 0.0}
    )
    for count in (30, 40):
        path.write_text(pairs(count))
        run_main(settings, monkeypatch)
    assert f"{target} was made of other prompts than there are now" in caplog.text
    made = (target / "model.safetensors").stat().st_mtime_ns
    run_main(settings, monkeypatch)
    path.unlink()
    run_main(settings, monkeypatch)
    assert f"whether {target} was made of these prompts cannot be told" in caplog.text
    assert (target / "model.safetensors").stat().st_mtime_ns == made


def test_a_killed_run_leaves_the_older_policy_and_the_next_run_makes_the_new_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    def kill(module: Any, place: str, settings: ml_collections.ConfigDict) -> None:
        with monkeypatch.context() as patches:
            patches.setattr(module, place, killed)
            with pytest.raises(KeyboardInterrupt):
                run_main(settings, patches)

    target = tmp_path / "policy"
    older, newer = configured(target, steps=1), configured(target, steps=1, seed=1)
    kill(files, "write_whole", older)
    run_main(older, monkeypatch)
    for module, place in ((sft, "update"), (files, "write_whole")):
        kill(module, place, newer)
        assert made_with(target) == 0
    run_main(newer, monkeypatch)
    assert made_with(target) == 1
    assert list(tmp_path.iterdir()) == [target]


def test_what_a_link_points_to_is_replaced_and_its_responses_end_as_the_chat_template_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    there, link, source = tmp_path / "disk" / "policy", tmp_path / "link", tmp_path / "source"
    there.mkdir(parents=True)
    link.symlink_to(there)
    tiny_models.write(source, "tiny-random-llama")
    rules = json.loads((source / "tokenizer_config.json").read_text())
    rules["chat_template"] = "{% for m in messages %}{{ m['role'] }}:{{ m['content'] }}<|start|>\n{% endfor %}"
    (source / "tokenizer_config.json").write_text(json.dumps(rules))
    run_main(configured(link, steps=1, policy__source=str(source), data__chat=True), monkeypatch)
    assert link.is_symlink()
    assert made_with(there) == 0
    assert tokenizer.load(source).end_ids == (0,)
    assert tokenizer.load(there).end_ids == (0, 1)


def test_microbatches_change_nothing_but_the_memory() -> None:
    policy = load_policy("builtin:tiny-random-llama", train_last_layers=1, dtype="float32")
    rng = np.random.default_rng(0)
    prompts = Prompts(jnp.asarray(rng.integers(3, 200, (8, 64)), jnp.int32), jnp.ones((8, 64), bool))
    tokens = jnp.asarray(rng.integers(3, 200, (8, 1, 16)), jnp.int32)
    lengths = jnp.array([[1], [16], [3], [9], [16], [2], [5], [1]])  # no two microbatches have as many tokens
    results, memory = {}, {}
    for size in (2, 8):
        how = tiny.learner_config(learning_rate=1e-2, microbatch_size=size)
        state = learner.init(policy.initial, how)
        lowered = sft.update.lower(
            state, policy.frozen, prompts, tokens, lengths, config=policy.config, learner_config=how
        )
        step: Any = lowered.compile()
        results[size] = step(state, policy.frozen, prompts, tokens, lengths)
        memory[size] = step.memory_analysis().temp_size_in_bytes
    (in_parts, loss_in_parts), (whole, loss) = results[2], results[8]
    assert float(loss_in_parts) == pytest.approx(float(loss), abs=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-6), in_parts.trained, whole.trained)
    moments = [optax.tree_utils.tree_get(state.opt_state, "mu") for state in (in_parts, whole)]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-8), *moments)
    assert memory[2] < memory[8] / 2


def test_the_loss_is_the_mean_over_reference_tokens() -> None:
    policy = load_policy("builtin:tiny-random-llama", train_last_layers=1, dtype="float32")
    prompts = Prompts(jnp.array([[5, 6, 7], [0, 9, 9]]), jnp.array([[True] * 3, [False, True, True]]))
    tokens, lengths = jnp.array([[[8, 9, 0, 0]], [[3, 4, 5, 0]]]), jnp.array([[3], [4]])
    learner_config = tiny.learner_config(microbatch_size=2)
    loss = sft.negative_logprob(
        policy.reference,
        policy.frozen,
        prompts,
        tokens,
        lengths,
        lengths.sum(),
        config=policy.config,
        learner_config=learner_config,
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
        sft.fine_tune(config.resolve_sft(configured(tmp_path / "policy", max_response_tokens=2)), tmp_path / "policy")
