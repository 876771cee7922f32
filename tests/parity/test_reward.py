"""The scores of reward models against transformers."""

import json
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import safetensors.torch

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from sea_jax.data.conversations import Conversation  # noqa: E402
from sea_jax.models import partition, reward, tokenizer  # noqa: E402
from sea_jax.models.checkpoints import hf, tiny_random  # noqa: E402
from sea_jax.models.config import ModelConfig  # noqa: E402
from sea_jax.oracles.reward_model import reward_model_scores  # noqa: E402
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


OBJECTIVES, GATING = 19, (24, 20, 20, 19)  # widths of the gating network's layers


def write_gated(directory: Path) -> dict[str, Any]:
    """Writes a tiny copy of ArmoRM with its tensors' published names, and Llama 3's template; returns the tensors."""
    tiny_random.write(directory / "files", "tiny-random-llama-gated")
    vocab_size = tokenizer.load(directory / "files").vocab_size
    model = tiny_torch.llama(vocab_size=vocab_size, num_key_value_heads=2, max_position_embeddings=256).model
    tensors = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    draw = torch.Generator().manual_seed(1)

    def random(*shape: int) -> Any:
        return torch.randn(shape, generator=draw)

    tensors |= {
        "regression_layer.weight": random(OBJECTIVES, GATING[0]),
        "reward_transform_matrix": torch.eye(OBJECTIVES) + 0.3 * random(OBJECTIVES, OBJECTIVES),
        "gating.logit_scale": torch.tensor([1.7]),
    }
    for layer in range(len(GATING) - 1):
        tensors[f"gating.layers.{layer}.weight"] = random(GATING[layer + 1], GATING[layer])
        tensors[f"gating.layers.{layer}.bias"] = random(GATING[layer + 1])
    told = {
        "architectures": ["LlamaForRewardModelWithGating"],
        "num_objectives": OBJECTIVES,
        "gating_n_hidden": len(GATING) - 2,
        "gating_hidden_dim": GATING[1],
        "gating_temperature": 20,
        "pad_token_id": 0,
    }
    shutil.copytree(directory / "files", directory / "model")
    (directory / "model" / "config.json").write_text(json.dumps(model.config.to_dict() | told))
    safetensors.torch.save_file(tensors, directory / "model" / "model.safetensors")
    return tensors


def gated_score(tensors: dict[str, Any], config: Any, ids: list[int], header: list[int]) -> tuple[Any, Any]:
    """What ArmoRM makes of one conversation, in its paper's terms: the score, and the weights of the objectives."""
    trunk = transformers.LlamaModel(config).eval()
    trunk.load_state_dict({name.removeprefix("model."): t for name, t in tensors.items() if name.startswith("model.")})
    with torch.no_grad():
        hidden = trunk(torch.tensor([ids])).last_hidden_state[0]
    begins = max(i for i in range(len(ids)) if ids[i : i + len(header)] == header)
    gate = hidden[begins]
    for layer in range(len(GATING) - 1):
        gate = tensors[f"gating.layers.{layer}.weight"] @ gate + tensors[f"gating.layers.{layer}.bias"]
        gate = gate.clamp(min=0) if layer < len(GATING) - 2 else gate
    weights = tensors["gating.logit_scale"] * torch.softmax(gate / 20, dim=0)
    rewards = tensors["regression_layer.weight"] @ hidden[-1]
    return (weights * (tensors["reward_transform_matrix"].T @ rewards)).sum(), weights


def test_objectives_weighed_by_the_prompt_score_as_armorm_does(tmp_path: Path) -> None:
    tensors = write_gated(tmp_path)
    words = tokenizer.load(tmp_path / "model")
    turns = [("user", "Hi"), ("assistant", "Hello!"), ("user", "How do boats float?")]
    chat = Conversation([{"role": role, "content": content} for role, content in turns])
    prompts = ["How do boats float?", "How do boats float?", "Count: 1, 2", chat]
    # One that is empty, one that would begin with another line break, and one with the header in writing, which is no header.
    answers = [
        "They push away water.",
        "\n\nThey do",
        "",
        "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n3",
    ]
    found = reward_model_scores(str(tmp_path / "model"), dtype="float32", batch_size=3, max_tokens=200)(
        prompts, answers
    )
    # In the published code's words: the last end of a turn before an answer's header and the two line breaks behind it.
    header = words.encode("<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n", add_special=False)
    config = transformers.LlamaConfig.from_pretrained(tmp_path / "model")
    weights = []
    for prompt, answer, score in zip(prompts, answers, found, strict=True):
        said = [*(prompt.messages if isinstance(prompt, Conversation) else [{"role": "user", "content": prompt}])]
        said = [*said, {"role": "assistant", "content": words.quoted(answer)}]
        ids = words.encode(words.chat(said, generation_prompt=False), add_special=False)
        expected, weight = gated_score(tensors, config, ids, header)
        weights.append(weight)
        assert score == pytest.approx(float(expected), abs=1e-4)
    assert np.ptp(found) > 0.1
    assert weights[0] == pytest.approx(weights[1])  # of the same prompt
    assert min(w.max() for w in weights) > 1.5 * 1.7 / OBJECTIVES  # far from even
    assert abs(weights[0] - weights[3]).max() > 0.01
    loaded = hf.load(tmp_path / "model")
    here = partition.put(loaded.params, hf.abstract(loaded.config), "bfloat16")
    assert {
        str(leaf.dtype) for name in ("gating", "objectives", "transform") for leaf in jax.tree.leaves(here[name])
    } == {"float32"}
    assert here["embed"].dtype == jax.numpy.bfloat16
    hf.save(tmp_path / "again", loaded.config, loaded.params, tmp_path / "model")
    again = safetensors.torch.load_file(tmp_path / "again" / "model.safetensors")
    assert again.keys() == tensors.keys()
    assert all(torch.equal(again[name], tensor) for name, tensor in tensors.items())
    assert hf.read_config(tmp_path / "again") == loaded.config
