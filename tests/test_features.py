"""Features of a separate trunk: what the encoder is shown, and which of its hidden states are averaged."""

import json
import shutil
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sea_jax import features
from sea_jax.models import encoder
from sea_jax.models.checkpoints import hf, tiny_random
from sea_jax.models.checkpoints.config_json import from_hf
from sea_jax.models.config import EncoderConfig
from sea_jax.oracles.reward_model import reward_model_scores
from sea_jax.types import Candidates
from tests.support import tiny

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "sea", "salt", "is", "why", "wet", "it"]


@pytest.fixture(scope="module")
def trunk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random BERT of 16 positions with a word-level tokenizer."""
    origin = tmp_path_factory.mktemp("origin")
    fields = {
        "model_type": "bert", "vocab_size": len(WORDS), "hidden_size": 8, "num_hidden_layers": 2,
        "num_attention_heads": 2, "intermediate_size": 16, "max_position_embeddings": 16, "pad_token_id": 0,
        "initializer_range": 0.5,
    }  # fmt: skip
    special = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    files = {
        "config.json": fields,
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast", "cls_token": "[CLS]", "sep_token": "[SEP]",
            "pad_token": "[PAD]", "unk_token": "[UNK]",
        },
        "tokenizer.json": {
            "version": "1.0",
            "added_tokens": [{"id": i, "content": word, **special} for i, word in enumerate(WORDS[:4])],
            "pre_tokenizer": {"type": "Whitespace"},
            "post_processor": {
                "type": "TemplateProcessing",
                "single": [
                    {"SpecialToken": {"id": "[CLS]", "type_id": 0}},
                    {"Sequence": {"id": "A", "type_id": 0}},
                    {"SpecialToken": {"id": "[SEP]", "type_id": 0}},
                ],
                "pair": [],
                "special_tokens": {
                    word: {"id": word, "ids": [WORDS.index(word)], "tokens": [word]} for word in ("[CLS]", "[SEP]")
                },
            },
            "model": {"type": "WordLevel", "vocab": {w: i for i, w in enumerate(WORDS)}, "unk_token": "[UNK]"},
        },
    }  # fmt: skip
    for name, content in files.items():
        (origin / name).write_text(json.dumps(content))
    config = from_hf(fields)
    assert isinstance(config, EncoderConfig)
    directory = tmp_path_factory.mktemp("models") / "trunk"
    hf.save(directory, config, jax.device_get(encoder.init(config, jax.random.key(0))), origin)
    return directory


NOTHING = Candidates(
    tokens=jnp.zeros((0, 0, 0), jnp.int32),
    lengths=jnp.zeros((0, 0), jnp.int32),
    logprobs=jnp.zeros((0, 0, 0)),
    features=jnp.zeros((0, 0, 0)),
)


def by_hand(trunk: Path, prompt: list[str], response: list[str]) -> np.ndarray:
    """One pair without padding: mean over the response and its [SEP]."""
    loaded = hf.load(trunk)
    assert isinstance(loaded.config, EncoderConfig)
    words = ["[CLS]", *prompt, "[SEP]", *response, "[SEP]"]
    tokens = jnp.array([[WORDS.index(word) for word in words]])
    types = jnp.array([[0] * (len(prompt) + 2) + [1] * (len(response) + 1)])
    params, valid = jax.device_put(loaded.params), jnp.ones_like(tokens, bool)
    hidden = encoder.apply(params, loaded.config, tokens, valid, token_types=types, dtype="float32")
    return np.asarray(hidden)[0, len(prompt) + 2 :].mean(0)


def test_a_trunk_reads_prompt_and_response_as_a_pair_and_averages_over_the_response(trunk: Path) -> None:
    batch = {"prompt": ["why is sea salt", "wet"]}
    found = features.of_trunk(str(trunk), dtype="float32", batch_size=16)(
        batch, NOTHING, [["it is", "salt"], ["sea", ""]]
    )
    assert found.shape == (2, 2, 8)
    for row, prompt in enumerate(batch["prompt"]):
        for column, response in enumerate([["it is", "salt"], ["sea", ""]][row]):
            expected = by_hand(trunk, prompt.split(), response.split())
            np.testing.assert_allclose(found[row, column], expected, atol=1e-5)


def test_an_over_long_prompt_loses_its_beginning_and_the_response_stays_whole(trunk: Path) -> None:
    prompt = ["sea", "salt", "why", "wet"] * 5
    (found,) = features.of_trunk(str(trunk), dtype="float32", batch_size=16)(
        {"prompt": [" ".join(prompt)]}, NOTHING, [["it is wet"]]
    )
    expected = by_hand(trunk, prompt[-10:], ["it", "is", "wet"])  # 16 positions: [CLS] 10 [SEP] 3 [SEP]
    np.testing.assert_allclose(found[0], expected, atol=1e-5)


@pytest.mark.parametrize(("batch_size", "read"), [(0, [4]), (2, [2, 2]), (8, [4])])
def test_the_reference_reads_a_few_prompts_at_a_time_to_the_same_features(
    batch_size: int, read: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    params, prompts, random = tiny.params(cuts=(2,)), tiny.prompts(3, 8, 1, 5), np.random.default_rng(0)
    tokens = random.integers(0, tiny.CONFIG.vocab_size, (4, 3, 6), dtype=np.int32)
    lengths = jnp.asarray(random.integers(1, 7, (4, 3)), jnp.int32)
    written = Candidates(jnp.asarray(tokens), lengths, jnp.zeros(tokens.shape), jnp.zeros((4, 3, 0)))
    at_a_time: list[int] = []

    def counted(params: object, prompts: object, tokens: jax.Array, *arguments: object, **named: object) -> jax.Array:
        at_a_time.append(len(tokens))
        return original(params, prompts, tokens, *arguments, **named)

    original = features.response_features
    monkeypatch.setattr(features, "response_features", counted)
    how = tiny.generation_config(num_samples=3, max_new_tokens=6, eos_ids=(0,), pad_id=0, feature_stack=1)
    featurize = features.of_reference(
        params, tiny.CONFIG, feature_stack=how.feature_stack, dtype=how.dtype, batch_size=batch_size
    )
    found = featurize({"tokens": np.asarray(prompts.tokens), "valid": np.asarray(prompts.valid)}, written, ())
    assert at_a_time == read
    for row, column in [(0, 0), (1, 1), (3, 2)]:
        length = int(written.lengths[row, column])
        prompt, response = tiny.prompt_ids(prompts, row), tokens[row, column, :length].tolist()
        hidden = tiny.hidden_states(params, prompt + response, num_stacks=1)
        np.testing.assert_allclose(found[row, column], hidden[len(prompt) :].mean(0), rtol=1e-4, atol=1e-5)


def test_a_reward_model_that_is_a_decoder_gives_what_it_scores_from(tmp_path: Path) -> None:
    directory = tmp_path / "reward"
    tiny_random.write(directory, "tiny-random-llama-reward", changes={"max_position_embeddings": 128})
    prompts, texts = ["why is sea salt", "wet " * 60], [["it is", "salt"], ["sea" * 50, ""]]
    found = features.of_trunk(str(directory), dtype="float32", batch_size=3)({"prompt": prompts}, NOTHING, texts)
    assert found.shape == (2, 2, features.trunk_width(str(directory))) == (2, 2, 32)
    scores = reward_model_scores(str(directory), dtype="float32", batch_size=4, max_tokens=128)
    expected = scores([prompt for prompt in prompts for _ in range(2)], [text for row in texts for text in row])
    np.testing.assert_allclose(found.reshape(4, 32) @ hf.load(directory).params["score"], expected, atol=1e-4)
    assert np.ptp(expected) > 0.1


def test_a_decoder_that_does_not_score_is_refused_as_a_trunk() -> None:
    of_trunk = partial(features.of_trunk, dtype="float32", batch_size=16)
    for refuses in (of_trunk, features.trunk_width):
        with pytest.raises(ValueError, match=r"expected a BERT or DeBERTa"):
            refuses("builtin:tiny-random-llama")


@pytest.fixture(scope="module")
def pair_ranker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random DeBERTa with a tokenizer of bytes that has PairRM's tokens."""
    directory = tmp_path_factory.mktemp("models") / "pair-ranker"
    tiny_random.write(directory, "tiny-random-deberta")
    return directory


def at_prefixes(directory: Path, prompt: str, response: str) -> np.ndarray:
    """What transformers says of one pair, cut to at most 1224 tokens, and 2048 in all; special tokens in it stay text."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    words = transformers.AutoTokenizer.from_pretrained(directory)

    def part(prefix: str, text: str, limit: int) -> list[int]:
        *begin, end = words.encode(prefix)
        plain = words(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        return [*[*begin, *plain][: limit - 1], end]

    ids = part("<|source|>", prompt, 1224)
    marks = [1, len(ids) + 1]  # each behind the token that begins a text
    ids += part("<|candidate|>", response, 2048 - len(ids))
    assert [ids[mark] for mark in marks] == words.convert_tokens_to_ids(["<|source|>", "<|candidate|>"])
    with torch.no_grad():
        hidden = transformers.DebertaV2Model.from_pretrained(directory)(torch.tensor([ids])).last_hidden_state[0]
    return hidden[marks].flatten().numpy()


def test_a_pair_ranker_gives_the_hidden_states_of_both_prefix_tokens(pair_ranker: Path) -> None:
    prompts, texts = ["Why is the sea salt?", "Wet?" * 40], [["Rivers.", "", "It is." * 30], ["Yes", "No", "é"]]
    found = features.of_trunk(str(pair_ranker), batch_size=4, dtype="float32")({"prompt": prompts}, NOTHING, texts)
    assert found.shape == (2, 3, features.trunk_width(str(pair_ranker))) == (2, 3, 64)
    for row, prompt in enumerate(prompts):
        for column, response in enumerate(texts[row]):
            np.testing.assert_allclose(found[row, column], at_prefixes(pair_ranker, prompt, response), atol=2e-5)


@pytest.mark.parametrize(
    ("prompt", "response"),
    [("sea" * 1000, "salt" * 500), ("a <|candidate|> b", "<|source|> c")],
    ids=["both too long", "prefix tokens in the texts"],
)
def test_a_pair_ranker_cuts_ends_and_is_not_misled(pair_ranker: Path, prompt: str, response: str) -> None:
    (found,) = features.of_trunk(str(pair_ranker), batch_size=1, dtype="float32")(
        {"prompt": [prompt]}, NOTHING, [[response]]
    )
    np.testing.assert_allclose(found[0], at_prefixes(pair_ranker, prompt, response), atol=2e-5)


def test_bfloat16_features_are_float32_and_near(pair_ranker: Path) -> None:
    pair: tuple = ({"prompt": ["sea"]}, NOTHING, [["salt", "wet"]])
    found = features.of_trunk(str(pair_ranker), dtype="bfloat16", batch_size=16)(*pair)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(
        found, features.of_trunk(str(pair_ranker), dtype="float32", batch_size=16)(*pair), atol=0.15
    )


def test_a_deberta_without_the_tokens_of_a_pair_ranker_is_refused(pair_ranker: Path, tmp_path: Path) -> None:
    shutil.copytree(pair_ranker, tmp_path / "trunk")
    file = tmp_path / "trunk" / "tokenizer.json"
    file.write_text(file.read_text().replace("<|candidate|>", "<|other|>"))
    message = r"its tokenizer has no token <\|candidate\|>; a DeBERTa trunk needs both"
    with pytest.raises(ValueError, match=message):
        features.of_trunk(str(tmp_path / "trunk"), dtype="float32", batch_size=16)
