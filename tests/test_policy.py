"""A policy's weights are told from others by a fingerprint."""

from pathlib import Path

import jax
import numpy as np

from sea_jax import policy
from sea_jax.models.checkpoints import hf, tiny_random
from sea_jax.policy import export_policy, load_policy, weights_fingerprint
from tests.support import tiny


def test_a_fingerprint_is_that_of_the_weights():
    params = jax.tree.map(np.asarray, tiny.params())
    same = jax.tree.map(np.copy, params)
    assert weights_fingerprint(params) == weights_fingerprint(same)
    same["final_norm"]["scale"][0] += 1e-3
    assert weights_fingerprint(params) != weights_fingerprint(same)


def test_of_a_long_parameter_some_numbers_are_read(monkeypatch):
    monkeypatch.setattr(policy, "NUMBERS_READ", 4)
    numbers = np.arange(10.0)
    found = weights_fingerprint({"w": numbers})
    assert found != weights_fingerprint({"w": numbers + 1})
    assert found != weights_fingerprint({"v": numbers})
    assert found != weights_fingerprint({"w": numbers.reshape(2, 5)})


def test_an_export_has_the_dtype_of_what_training_began_with_unless_another_is_asked_for(tmp_path: Path):
    tiny_random.write(tmp_path / "tiny", "tiny-random-llama")
    loaded = hf.load(tmp_path / "tiny")
    hf.save(tmp_path / "bfloat16", loaded.config, loaded.params, tmp_path / "tiny", "bfloat16")
    narrow = load_policy(str(tmp_path / "bfloat16"), 1, dtype="float32")
    for asked, expected in (("", "bfloat16"), ("float32", "float32")):
        export_policy(narrow, narrow.reference, tmp_path / f"export-{asked}", asked)
        assert hf.stored_dtype(tmp_path / f"export-{asked}") == expected
        exported = hf.load(tmp_path / f"export-{asked}")
        jax.tree.map(np.testing.assert_array_equal, exported.params, hf.load(tmp_path / "bfloat16").params)
    wide = load_policy(str(tmp_path / "tiny"), 1, dtype="bfloat16")
    export_policy(wide, wide.initial, tmp_path / "export-wide")
    assert hf.stored_dtype(tmp_path / "export-wide") == "float32"
