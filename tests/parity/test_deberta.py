"""The DeBERTa encoder against transformers' DebertaV2Model."""

from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from transformers.models.deberta_v2 import modeling_deberta_v2  # noqa: E402

from sea_jax.models import deberta  # noqa: E402
from sea_jax.models.checkpoints import hf  # noqa: E402
from sea_jax.models.config import DebertaConfig  # noqa: E402
from tests.support import tiny_torch  # noqa: E402

LENGTHS = (40, 17, 1)  # beyond the farthest distance, beyond the buckets, and alone

MODELS: dict[str, dict[str, Any]] = {
    "v3": {},
    "v2-xlarge": {"conv_kernel_size": 3, "conv_act": "gelu", "type_vocab_size": 2},
    "own projections, embedded positions": {
        "share_att_key": False,
        "norm_rel_ebd": "none",
        "position_biased_input": True,
        "max_position_embeddings": 64,
        "max_relative_positions": 12,
        "num_attention_heads": 3,
    },
    "one term, a row for each distance, wide convolution": {
        "share_att_key": False,
        "pos_att_type": "p2c",
        "position_buckets": -1,
        "conv_kernel_size": 5,
        "layer_norm_eps": 1e-2,
    },
    "the other term": {"pos_att_type": ["c2p"], "share_att_key": False, "hidden_act": "gelu_new"},
}


def _expected(model: Any, tokens: np.ndarray, types: np.ndarray, length: int) -> np.ndarray:
    """Hidden states of one sequence without padding."""
    row = {"input_ids": torch.tensor(tokens[None, :length]), "token_type_ids": torch.tensor(types[None, :length])}
    with torch.no_grad():
        return model(**row).last_hidden_state[0].numpy()


def _from_pretrained(model: Any, directory: Path) -> Any:
    """What transformers makes of the directory, and its report."""
    return type(model).from_pretrained(directory, output_loading_info=True)


@pytest.mark.parametrize("name", MODELS)
def test_hidden_states_and_what_transformers_makes_of_them_saved(name: str, tmp_path: Path) -> None:
    model = tiny_torch.deberta(**MODELS[name])
    loaded = tiny_torch.handed_over(model, tmp_path / "theirs")
    assert isinstance(loaded.config, DebertaConfig)
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, tiny_torch.SIZES["vocab_size"], (len(LENGTHS), max(LENGTHS)))
    types = rng.integers(0, max(1, loaded.config.num_token_types), tokens.shape)
    valid = jnp.asarray(np.arange(tokens.shape[1]) < np.array(LENGTHS)[:, None])
    found = deberta.apply(
        loaded.params, loaded.config, jnp.asarray(tokens), valid, token_types=jnp.asarray(types), dtype=jnp.float32
    )
    hf.save(tmp_path / "ours", loaded.config, loaded.params)
    again, report = _from_pretrained(model, tmp_path / "ours")
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    for row, length in enumerate(LENGTHS):
        expected = _expected(model, tokens[row], types[row], length)
        np.testing.assert_allclose(found[row, :length], expected, atol=5e-5)
        np.testing.assert_allclose(_expected(again.eval(), tokens[row], types[row], length), expected, atol=1e-5)


@pytest.mark.parametrize(("buckets", "farthest"), [(256, 512), (8, 24), (32, 2048)])
def test_every_distance_has_the_row_that_transformers_gives_it(buckets: int, farthest: int, tmp_path: Path) -> None:
    fields = {"position_buckets": buckets, "max_relative_positions": farthest, "num_hidden_layers": 1}
    config = tiny_torch.handed_over(tiny_torch.deberta(**fields), tmp_path).config
    assert isinstance(config, DebertaConfig)
    length = 2500
    distances = torch.arange(1 - length, length)
    expected = modeling_deberta_v2.make_log_bucket_position(distances, buckets, farthest).long() + buckets
    np.testing.assert_array_equal(deberta.relative_rows(config, length), expected.clamp(0, 2 * buckets - 1))


def test_the_trunk_of_a_pair_ranker_is_read_and_its_head_is_not(tmp_path: Path) -> None:
    loaded = tiny_torch.handed_over(tiny_torch.deberta(), tmp_path)
    trunk = {f"pretrained_model.{name}": tensor for name, tensor in load_file(tmp_path / "model.safetensors").items()}
    head = {f"head_layer.{i}.{part}": np.ones((1, 2), np.float32) for i in (1, 4) for part in ("weight", "bias")}
    save_file(trunk | head, tmp_path / "model.safetensors")
    again = hf.load(tmp_path)
    np.testing.assert_array_equal(again.params["relative"], loaded.params["relative"])
    save_file(
        trunk | {"pretrained_model.encoder.extra.weight": head["head_layer.1.bias"]}, tmp_path / "model.safetensors"
    )
    with pytest.raises(ValueError, match=r"encoder\.extra\.weight.*has no place in a deberta-v2"):
        hf.load(tmp_path)
