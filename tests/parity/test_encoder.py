"""The encoder against transformers' BertModel."""

from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from sea_jax.models import encoder  # noqa: E402
from sea_jax.models.config import EncoderConfig  # noqa: E402
from tests.support import tiny_torch  # noqa: E402

LENGTHS = (7, 3, 1)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"num_attention_heads": 3, "hidden_act": "gelu_new", "type_vocab_size": 3, "layer_norm_eps": 1e-2},
    ],
    ids=["plain", "three heads, three token types"],
)
def test_hidden_states_and_their_mean(fields: dict[str, Any], tmp_path: Path) -> None:
    model = tiny_torch.bert(**fields)
    loaded = tiny_torch.handed_over(model, tmp_path)
    assert isinstance(loaded.config, EncoderConfig)
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, tiny_torch.SIZES["vocab_size"], (len(LENGTHS), max(LENGTHS)))
    types = rng.integers(0, loaded.config.num_token_types, tokens.shape)
    valid = np.arange(tokens.shape[1]) < np.array(LENGTHS)[:, None]
    for token_types in (None, types):
        given: Any = {} if token_types is None else {"token_types": jnp.asarray(token_types)}
        mask = jnp.asarray(valid)
        found = encoder.apply(loaded.params, loaded.config, jnp.asarray(tokens), mask, dtype=jnp.float32, **given)
        pooled = encoder.mean_pool(found, mask)
        for row, length in enumerate(LENGTHS):
            given = {} if token_types is None else {"token_type_ids": torch.tensor(types[row : row + 1, :length])}
            with torch.no_grad():
                expected = model(torch.tensor(tokens[row : row + 1, :length]), **given).last_hidden_state[0]
            np.testing.assert_allclose(found[row, :length], expected, atol=2e-5)
            np.testing.assert_allclose(pooled[row], expected.mean(axis=0), atol=2e-5)
