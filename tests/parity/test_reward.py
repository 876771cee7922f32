"""The scores of reward models against transformers."""

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from sea_jax.models import reward  # noqa: E402
from sea_jax.models.checkpoints import hf  # noqa: E402
from sea_jax.models.config import ModelConfig  # noqa: E402
from tests.support import tiny_torch  # noqa: E402

LENGTHS = (1, 9, 4)
_apply = jax.jit(reward.apply, static_argnames=("config", "dtype"))


@pytest.mark.parametrize("make", [tiny_torch.llama_reward, tiny_torch.gpt_neox_reward, tiny_torch.qwen3_reward])
def test_scores_of_texts_of_several_lengths(make: Any, tmp_path: Path) -> None:
    model = make(pad_token_id=0)
    loaded = tiny_torch.handed_over(model, tmp_path, cuts=(1,))
    assert isinstance(loaded.config, ModelConfig)
    tokens = np.random.default_rng(0).integers(1, loaded.config.vocab_size, (len(LENGTHS), 10))
    valid = np.arange(10) >= 10 - np.array(LENGTHS)[:, None]
    with torch.no_grad():
        theirs = model(torch.tensor(np.where(valid, tokens, 0)), attention_mask=torch.tensor(valid)).logits[:, 0]
    # Ours with random tokens in the padding, so that a mask left out would show.
    found = _apply(loaded.params, config=loaded.config, tokens=tokens, valid=valid, dtype="float32")
    assert found.dtype == np.float32
    assert np.ptp(found) > 0.1
    np.testing.assert_allclose(found, theirs, atol=5e-5, rtol=1e-5)


@pytest.mark.parametrize("fields", [{}, {"pooler_hidden_act": "tanh"}])
def test_scores_of_a_deberta_also_when_written_again(fields: dict[str, Any], tmp_path: Path) -> None:
    model = tiny_torch.deberta_reward(**fields)
    loaded = tiny_torch.handed_over(model, tmp_path / "theirs")
    config = reward.check(loaded.config)
    assert not reward.reads_left_padded(config)
    tokens = np.random.default_rng(0).integers(1, config.vocab_size, (len(LENGTHS), 10))
    valid = np.arange(10) < np.array(LENGTHS)[:, None]
    inputs = {"input_ids": torch.tensor(np.where(valid, tokens, 0)), "attention_mask": torch.tensor(valid)}
    with torch.no_grad():
        theirs = model(**inputs).logits[:, 0]
    found = _apply(loaded.params, config=config, tokens=tokens, valid=valid, dtype="float32")
    assert np.ptp(found) > 0.1
    np.testing.assert_allclose(found, theirs, atol=5e-5, rtol=1e-5)
    hf.save(tmp_path / "ours", config, loaded.params)
    again = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "ours").eval()
    with torch.no_grad():
        torch.testing.assert_close(again(**inputs).logits[:, 0], theirs)


def test_a_deberta_of_several_labels_is_an_encoder(tmp_path: Path) -> None:
    model = transformers.DebertaV2ForSequenceClassification(tiny_torch.deberta(num_labels=3).config)
    loaded = tiny_torch.handed_over(model, tmp_path)
    with pytest.raises(ValueError, match="with one label, found an encoder"):
        reward.check(loaded.config)


def test_two_labels_are_refused(tmp_path: Path) -> None:
    tiny_torch.llama_reward(num_labels=2).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="LlamaForSequenceClassification with 2 labels"):
        hf.read_config(tmp_path)
