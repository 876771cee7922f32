import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from sea_jax.data.conversations import Conversation
from sea_jax.models import decoder, encoder, reward, tokenizer
from sea_jax.models.checkpoints import hf, tiny_random
from sea_jax.models.config import EncoderConfig, ModelConfig
from sea_jax.oracles import oracle as oracles
from sea_jax.oracles import preferences
from sea_jax.oracles.embedding import ENCODER_BATCH, embed_texts, embedding_similarity
from sea_jax.oracles.oracle import JudgeSettings, OracleSettings, own_scale
from sea_jax.oracles.reward_model import remote_reward, reward_model_scores
from sea_jax.types import Judgement, Oracle
from tests.support import tiny

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *"abcdefghij"]
ENCODER = EncoderConfig(
    family="bert",
    vocab_size=len(WORDS),
    d_model=16,
    num_layers=2,
    num_heads=2,
    d_ff=24,
    activation="gelu",
    norm_eps=1e-12,
    max_positions=40,
    num_token_types=2,
)


def keys(count: int, seed: int = 0) -> jax.Array:
    return jax.random.split(jax.random.key(seed), count)


def texts(count: int) -> tuple[list[str], list[str], list[str]]:
    """Prompts, first and second responses."""
    return [f"x{i}" for i in range(count)], [f"y{i}" for i in range(count)], [f"z{i}" for i in range(count)]


def names(count: int) -> list[str]:
    """Of asks."""
    return [f"run/{i}" for i in range(count)]


AS_THEY_ARE = np.zeros(2, bool)  # neither of two pairs is shown the other way round


def asked(oracle: Oracle, count: int, swapped: np.ndarray | None = None) -> Judgement:
    """What an oracle says of pairs on which it answers all at once."""
    (judgement,) = oracle(
        *texts(count), np.zeros(count, bool) if swapped is None else swapped, keys(count), names(count)
    )
    np.testing.assert_array_equal(judgement.rows, np.arange(count))
    return judgement


def always(probability: float) -> preferences.Preference:
    return lambda prompts, first, second: np.full(len(prompts), probability)


def test_by_reward_is_bradley_terry():
    rewards = {("x0", "y0"): 1.0, ("x0", "z0"): 0.0, ("x1", "y1"): -0.5, ("x1", "z1"): 0.25}

    def reward(prompts, responses):
        return np.array([rewards[pair] for pair in zip(prompts, responses, strict=True)])

    # sigmoid(2 * 1) = 0.880797 and sigmoid(2 * -0.75) = 1 / (1 + exp(1.5)) = 0.182426
    probability = preferences.by_reward(reward, scale=2.0)(*texts(2))
    np.testing.assert_allclose(probability, [0.880797, 0.182426], rtol=1e-5)
    prompts, first, second = texts(2)
    np.testing.assert_allclose(preferences.by_reward(reward, 2.0)(prompts, second, first), 1 - probability)


def test_labels_by_hand():
    probability = np.array([0.7, 0.5, 0.2, 1.0, 0.0])
    np.testing.assert_array_equal(preferences.deterministic(probability, keys(5)), [1.0, 0.5, 0.0, 1.0, 0.0])
    np.testing.assert_array_equal(preferences.soft(probability, keys(5)), probability)
    drawn = preferences.bradley_terry(probability, keys(5))
    assert set(drawn) <= {0.0, 1.0}
    np.testing.assert_array_equal(drawn[3:], [1.0, 0.0])


def test_bradley_terry_draws_as_often_as_is_probable():
    wins = preferences.bradley_terry(np.full(2000, 0.3), keys(2000))
    assert stats.binomtest(int(wins.sum()), 2000, 0.3).pvalue > 0.01
    np.testing.assert_array_equal(preferences.bradley_terry(np.full(3, 0.3), keys(2000)[7:10]), wins[7:10])


@pytest.mark.parametrize("name", preferences.LABELS)
def test_an_oracle_tells_the_probability_and_the_label(name):
    shown = []

    def preference(prompts, first, second):
        shown.append((prompts, first, second))
        return np.array([0.75, 0.25], np.float32)

    judgement = asked(preferences.labelled(preference, preferences.LABELS[name]), 2)
    assert shown == [texts(2)]
    assert judgement.probability.dtype == judgement.label.dtype == np.float64
    np.testing.assert_array_equal(judgement.probability, [0.75, 0.25])
    np.testing.assert_array_equal(judgement.label, preferences.LABELS[name](judgement.probability, keys(2)))


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (np.array([0.5]), r"asked about 2 pairs and returned shape \(1,\)"),
        (np.array([[0.5], [0.5]]), r"returned shape \(2, 1\)"),
        (np.array(0.5), r"returned shape \(\)"),
        (iter([(0, 0.5), (0, 0.5)]), r"asked about 2 pairs and answered about pair 0 \(again\?\)"),
        (iter([(2, 0.5)]), r"answered about pair 2"),
        (iter([0.5]), r"yielded 0\.5; it must yield \(row, probability\)"),
    ],
)
def test_an_answer_of_another_form_is_refused(answer, message):
    oracle = preferences.labelled(lambda prompts, first, second: answer, preferences.soft)
    with pytest.raises(ValueError, match=message):
        list(oracle(*texts(2), AS_THEY_ARE, keys(2), names(2)))


@pytest.mark.parametrize("silence", [None, np.nan, -1, "second"])
def test_a_pair_without_an_answer_is_left_out(silence):
    oracle = preferences.labelled(lambda prompts, first, second: [0.25, silence, 1.0], preferences.bradley_terry)
    (judgement,) = oracle(*texts(3), np.zeros(3, bool), keys(3), names(3))
    assert judgement.rows.tolist() == [0, 2]
    assert judgement.probability.tolist() == [0.25, 1.0]
    whole = asked(preferences.labelled(lambda *_: np.array([0.25, 0.5, 1.0]), preferences.bradley_terry), 3)
    assert judgement.label.tolist() == whole.label[[0, 2]].tolist()  # the noise of a pair is its own
    silent = preferences.labelled(lambda prompts, first, second: [silence] * 3, preferences.soft)
    assert list(silent(*texts(3), np.zeros(3, bool), keys(3), names(3))) == []


def test_answers_are_handed_on_one_by_one_as_they_come():
    said = []

    def slow(prompts, first, second):
        for row, probability in ((2, 1.0), (0, 0.25)):
            said.append(row)
            yield row, probability

    judgements = preferences.flipped(preferences.labelled(slow, preferences.soft), 1.0)(
        *texts(3), np.array([True, False, False]), keys(3), names(3)
    )
    for row, probability in ((2, 1.0), (0, 0.75)):  # the first pair was shown the other way round
        judgement = next(judgements)
        assert said[-1] == row
        assert (judgement.rows.tolist(), judgement.probability.tolist()) == ([row], [probability])
        assert judgement.label.tolist() == [1 - probability]
    assert next(judgements, None) is None


def test_a_pair_is_shown_the_other_way_round_and_its_answer_turned_back():
    shown = []

    def likes_the_first_slot(prompts, first, second):
        shown.append((first, second))
        return np.array([0.75, 0.75])

    judgement = asked(preferences.labelled(likes_the_first_slot, preferences.deterministic), 2, np.array([False, True]))
    assert shown == [(["y0", "z1"], ["z0", "y1"])]
    assert judgement.probability.tolist() == [0.75, 0.25]
    assert judgement.label.tolist() == [1.0, 0.0]


def test_a_reward_has_no_order_to_be_swapped():
    shown = []

    def reward(prompts, responses):
        shown.append(responses)
        return np.arange(4.0)

    asked(preferences.labelled(preferences.by_reward(reward, 1.0), preferences.soft), 2, np.array([True, True]))
    assert shown == [["y0", "y1", "z0", "z1"]]


def test_the_order_is_drawn_from_the_asks_key_apart_from_its_noise():
    swapped = preferences.drawn_order(keys(2000))
    assert stats.binomtest(int(swapped.sum()), 2000, 0.5).pvalue > 0.01
    np.testing.assert_array_equal(preferences.drawn_order(keys(2000)[5:9]), swapped[5:9])
    for noisy in (always(0.5), always(0.5)):
        label = asked(preferences.labelled(noisy, preferences.bradley_terry), 2000).label
        flipped = asked(preferences.flipped(preferences.labelled(noisy, preferences.bradley_terry), 0.5), 2000).label
        for drawn in (label, flipped):
            assert stats.fisher_exact(np.histogram2d(swapped, drawn, bins=2)[0]).pvalue > 0.01


def test_only_a_preference_that_takes_keys_is_given_the_names_of_the_asks():
    received = []

    def service(prompts, first, second, keys=None):
        received.append(keys)
        return np.full(len(prompts), 0.5)

    class Service:
        def __call__(self, prompts, first, second, *, keys: list[str] | None = None):
            return service(prompts, first, second, keys)

    for preference in (service, Service(), partial(service)):
        asked(preferences.flipped(preferences.labelled(preference, preferences.soft), 0.1), 2)
    assert received == [["run/0", "run/1"]] * 3
    plain = preferences.labelled(
        lambda p, first, second, **others: np.full(len(p), float(bool(others))), preferences.soft
    )
    assert asked(plain, 2).label.tolist() == [0.0, 0.0]


def test_keys_need_a_default_for_when_win_rates_are_measured():
    def service(prompts: Any, first: Any, second: Any, *other: Any, keys: Any) -> Any:
        return np.full(len(prompts), 0.5)

    with pytest.raises(ValueError, match=r"function service: its parameter `keys` needs a default of None"):
        preferences.labelled(cast(Any, service), preferences.soft)


def test_flips_come_as_often_as_they_should_and_leave_the_probability_alone():
    oracle = preferences.flipped(preferences.labelled(always(0.9), preferences.deterministic), 0.1)
    judgement = asked(oracle, 2000)
    np.testing.assert_array_equal(judgement.probability, 0.9)
    assert set(judgement.label) == {0.0, 1.0}
    assert stats.binomtest(int((judgement.label == 0).sum()), 2000, 0.1).pvalue > 0.01


def test_flips_wrap_any_oracle():
    received = []

    def own(prompts, first, second, swapped, keys, asks):
        received.append((prompts, first, second, asks))
        yield Judgement(np.arange(2), np.array([0.5, 0.6]), np.array([0.25, 1.0]))

    always_flipped = asked(preferences.flipped(own, 1.0), 2)
    np.testing.assert_array_equal(always_flipped.label, [0.75, 0.0])
    np.testing.assert_array_equal(always_flipped.probability, [0.5, 0.6])
    np.testing.assert_array_equal(asked(preferences.flipped(own, 0.0), 2).label, [0.25, 1.0])
    twice = preferences.flipped(preferences.flipped(own, 1.0), 1.0)
    np.testing.assert_array_equal(asked(twice, 2).label, [0.25, 1.0])
    assert received == [(*texts(2), names(2))] * 3


def test_flips_are_independent_of_the_draw_they_flip():
    # Were both driven by one number, every label of 1 would be flipped to 0.
    oracle = preferences.flipped(preferences.labelled(always(0.5), preferences.bradley_terry), 0.5)
    wins = asked(oracle, 1000).label
    assert stats.binomtest(int(wins.sum()), 1000, 0.5).pvalue > 0.01


# ---- The embedding oracle, with a random encoder whose words are letters


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("models") / "encoder"
    hf.save(path, ENCODER, tiny.draw(encoder.abstract(ENCODER), 0))
    words = Tokenizer(models.WordPiece({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    words.save(str(path / "tokenizer.json"))
    names = {f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep")}
    settings = {"tokenizer_class": "PreTrainedTokenizerFast"} | names
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
    return path


@pytest.fixture(scope="module")
def embed(directory):
    return embed_texts(str(directory))


def sentence(length: int, seed: int = 0) -> str:
    return " ".join(np.random.default_rng(seed).choice(list("abcdefghij"), length))


def test_an_embedding_is_the_unit_mean_of_the_hidden_states_of_a_text_alone(directory, embed):
    loaded, words = hf.load(directory), tokenizer.load(directory)
    apply = jax.jit(partial(encoder.apply, dtype="float32"), static_argnums=1)
    written = [sentence(9), sentence(2)]
    found = embed(written)
    for text, vector in zip(written, found, strict=True):
        ids = jnp.array([words.encode(text)])
        assert ids.shape == (1, len(text.split()) + 2)
        mean = np.asarray(apply(loaded.params, ENCODER, ids, jnp.ones(ids.shape, bool)))[0].mean(0)
        np.testing.assert_allclose(vector, mean / np.linalg.norm(mean), rtol=1e-4, atol=1e-5)


def test_an_embedding_does_not_depend_on_its_neighbours_nor_their_order(embed):
    written = [sentence(4 + i % 30, seed=i) for i in range(ENCODER_BATCH + 6)]  # two batches
    together = embed(written)
    assert together.shape == (len(written), ENCODER.d_model)
    np.testing.assert_allclose(embed(written[::-1])[::-1], together, atol=1e-5)
    np.testing.assert_allclose(embed(written[20:21])[0], together[20], atol=1e-5)
    assert len(np.unique(together.round(3), axis=0)) == len(written)


def test_a_text_beyond_the_positions_is_cut(embed):
    long = sentence(100)
    np.testing.assert_allclose(embed([long]), embed([" ".join(long.split()[: ENCODER.max_positions - 2])]), atol=1e-5)


def test_similarity_is_the_cosine_of_prompt_and_response(directory, embed):
    reward = embedding_similarity(str(directory))
    prompts = [sentence(5, seed=1), sentence(7, seed=2), sentence(5, seed=1)]
    responses = [sentence(5, seed=1), sentence(3, seed=3), sentence(3, seed=3)]
    expected = (embed(prompts) * embed(responses)).sum(-1)
    for _ in range(2):  # prompts seen before are remembered
        found = reward(prompts, responses)
        assert found.dtype == np.float64
        np.testing.assert_allclose(found, expected, atol=1e-5)
    assert found[0] == pytest.approx(1.0, abs=1e-5)
    np.testing.assert_allclose(reward(prompts[::-1], responses[::-1]), expected[::-1], atol=1e-5)


def test_a_mixture_weighs_the_cosines_with_prompt_and_reference(directory, embed):
    prompts, responses = [sentence(5, seed=1), sentence(7, seed=2)], [sentence(4, seed=3), sentence(6, seed=4)]
    human = sentence(5, seed=5)
    on_prompt = (embed(prompts) * embed(responses)).sum(-1)
    on_reference = float(embed([human])[0] @ embed(responses[:1])[0])
    references = {prompts[0]: human}  # the second prompt has none
    for weight in (1.0, 0.25):
        found = embedding_similarity(str(directory), weight, references)(prompts, responses)
        assert found[0] == pytest.approx(weight * on_reference + (1 - weight) * on_prompt[0], abs=1e-5)
        assert np.isnan(found[1])


def test_a_taste_for_references_abstains_where_there_is_none_and_is_told_of_repetition(directory, embed):
    prompts, human, other = [sentence(5, seed=1), sentence(7, seed=2)], sentence(5, seed=5), sentence(5, seed=6)
    settings = JudgeSettings(kind="embedding", encoder=str(directory), against="reference", scale=1.0)
    taste = oracles.preference(settings, field="eval.judge", references={prompts[0]: human})
    said = taste(prompts, [human, human], [other, other])
    assert said[0] == pytest.approx(1 / (1 + np.exp(float(embed([human])[0] @ embed([other])[0]) - 1)), abs=1e-4)
    assert np.isnan(said[1])
    assert getattr(taste, "reads_references")  # noqa: B009  # so that nothing is compared with the reference itself
    strict = replace(settings, repetition_penalty=2.0)
    twice = f"{other} {other}"  # half of the words were there before
    plain, penalised = (
        oracles.preference(each, references={prompts[0]: human})(prompts[:1], [twice], [human])[0]
        for each in (settings, strict)
    )
    share = 1 - len(set(twice.split())) / len(twice.split())
    lost = share - (1 - len(set(human.split())) / len(human.split()))
    assert np.log(penalised / (1 - penalised)) == pytest.approx(np.log(plain / (1 - plain)) - 2 * lost, abs=1e-4)


def test_a_decoder_is_no_encoder(tmp_path):
    hf.save(tmp_path / "decoder", tiny.CONFIG, tiny.params())
    with pytest.raises(ValueError, match=r"expected a BERT encoder, found a llama"):
        embed_texts(str(tmp_path / "decoder"))


@pytest.mark.parametrize(
    ("kind", "set_to", "scale"),
    [
        ("embedding", 0.0, 10.0),
        ("reward_model", 0.0, 1.0),
        ("remote", 0.0, 1.0),
        ("mine:taste", 0.0, 10.0),
        ("remote", 3.0, 3.0),
    ],
)
def test_the_scale_is_that_of_the_kind_unless_one_is_set(kind, set_to, scale):
    assert own_scale(OracleSettings(kind=kind, scale=set_to)) == scale


def test_an_oracle_that_is_always_certain_is_told_once(caplog):
    def certain(prompts, first, second):
        return np.where(np.arange(len(prompts)) < 60, 0.9995, 0.5)

    keys = jax.random.split(jax.random.key(0), 64)
    asked = ([""] * 64, ["a"] * 64, ["b"] * 64, np.zeros(64, bool), keys, [""] * 64)
    loud = preferences.told_if_certain(preferences.labelled(certain, preferences.soft), 10.0)
    assert [judgement.probability[0] for judgement in loud(*asked)] == [0.9995]  # 60 of 64 are fewer than 95%
    assert not caplog.text
    sure = preferences.told_if_certain(preferences.labelled(lambda *_: np.ones(64), preferences.soft), 10.0)
    for _ in range(2):
        list(sure(*asked))
    assert caplog.text.count("64 of the oracle's 64 probabilities are 0 or 1") == 1
    assert "lower config.oracle.scale (10)" in caplog.text


# ---- The oracle of a reward model, with a tiny random one whose tokens are bytes


@pytest.fixture(scope="module")
def scorer(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("models") / "reward"
    tiny_random.write(path, "tiny-random-llama-reward")
    return path


@pytest.fixture(scope="module")
def score(scorer):
    return reward_model_scores(str(scorer), dtype="float32", batch_size=2, max_tokens=128)


def test_a_conversation_is_scored_in_its_own_turns_and_its_beginning_is_cut(scorer):
    sent: list[list[int]] = []

    def service(inputs):
        sent.extend(inputs)
        return np.zeros(len(inputs))

    words = tokenizer.load(scorer)
    turns = [{"role": role, "content": f"{role}'s words"} for role in ("system", "user", "assistant", "user")]
    for max_tokens in (256, 88):
        remote_reward(service, str(scorer), max_tokens=max_tokens)([Conversation(turns)], ["b"])
    chat = words.chat([*turns, {"role": "assistant", "content": "b"}], generation_prompt=False)
    assert sent[0] == words.encode(chat, add_special=False)[:-1]  # the last token is also the padding
    assert len(sent[1]) == 87 < len(sent[0])
    shown = words.decode(sent[1])
    assert shown.startswith("system: user: er's words")
    assert shown.endswith("user: user's wordsassistant: b")


def test_a_deberta_scores_pairs_as_transformers_does(tmp_path):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    fields = {"architectures": ["DebertaV2ForSequenceClassification"], "num_labels": 1, "pooler_hidden_size": 32}
    tiny_random.write(tmp_path / "deberta", "tiny-random-deberta", changes=fields)
    score = reward_model_scores(str(tmp_path / "deberta"), dtype="float32", batch_size=2, max_tokens=64)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "deberta").eval()
    backend = transformers.AutoTokenizer.from_pretrained(tmp_path / "deberta")
    prompts, responses = ["What is it?", "x", "Sum up:"], ["A horse.", "an answer", ""]
    expected = []
    for prompt, response in zip(prompts, responses, strict=True):
        first, second = (backend(text, add_special_tokens=False)["input_ids"] for text in (prompt, response))
        with torch.no_grad():
            expected.append(model(torch.tensor([[1, *first, 0, *second, 0]])).logits.item())
    np.testing.assert_allclose(score(prompts, responses), expected, atol=1e-4)
    assert np.ptp(expected) > 0.01
    long = score(["z" * 90 + "Sum up:"], ["x"])  # of which the beginning is cut
    np.testing.assert_allclose(long, score(["z" * (64 - 4 - len("Sum up:")) + "Sum up:"], ["x"]), atol=1e-4)


def test_scores_are_those_of_transformers(scorer, score):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    model = transformers.AutoModelForSequenceClassification.from_pretrained(scorer).eval()
    backend = transformers.AutoTokenizer.from_pretrained(scorer)
    prompts = ["What is it?", "Sum up: " + "a long story. " * 5, "été", "x", "What is it?"]
    responses = ["A horse.", "Short.", "an answer that is somewhat longer than the others", "", "A cow."]
    expected = []
    for prompt, response in zip(prompts, responses, strict=True):
        turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]
        inputs = backend.apply_chat_template(turns, return_tensors="pt", return_dict=True)
        assert inputs["input_ids"][0, -1] == model.config.pad_token_id  # the end, which transformers passes over
        with torch.no_grad():
            expected.append(model(**inputs).logits.item())
    found = score(prompts, responses)
    assert found.dtype == np.float64
    assert np.ptp(found) > 0.1
    np.testing.assert_allclose(found, expected, atol=1e-4)
    np.testing.assert_allclose(score(prompts[::-1], responses[::-1])[::-1], found, atol=1e-5)
    preference = preferences.by_reward(score, 2.0)
    wins = 1 / (1 + np.exp(-2 * (expected[0] - expected[4])))
    np.testing.assert_allclose(preference(prompts[:1], responses[:1], responses[4:]), wins, atol=1e-3)


def test_a_remote_reward_model_is_asked_for_what_one_in_this_process_reads(scorer, score):
    config, params = reward.check(hf.read_config(scorer)), hf.load(scorer).params
    apply = jax.jit(partial(reward.apply, config=config, dtype="float32"))

    def service(inputs):
        rows = [np.array([ids]) for ids in inputs]
        return np.array([apply(params, tokens=row, valid=np.ones(row.shape, bool))[0] for row in rows])

    prompts = ["What is it?", "".join(chr(97 + i % 26) for i in range(150))]
    responses = ["A horse.", "0123456789"]
    remote = remote_reward(service, str(scorer), max_tokens=128)
    found = remote(prompts, responses)
    assert found.dtype == np.float64
    np.testing.assert_allclose(found, score(prompts, responses), atol=1e-5)


@pytest.mark.parametrize("scores", [np.zeros(1), np.array([0.0, np.nan])])
def test_scores_that_are_none_are_refused(scorer, scores):
    with pytest.raises(ValueError, match=r"asked for 2 finite scores and returned \["):
        remote_reward(lambda inputs: scores, str(scorer), max_tokens=128)(["a", "b"], ["c", "d"])


def test_the_beginning_of_a_prompt_is_cut_and_never_the_response(score):
    # <|start|>user: ...<|end|>assistant: ...<|end|> has 20 tokens beside the two texts: 128 - 20 - 10 = 98 bytes fit.
    prompt, response = "".join(chr(97 + i % 26) for i in range(150)), "0123456789"
    whole, cut = score([prompt, prompt[-98:], prompt[-97:]], [response] * 3), prompt[-99:]
    assert whole[0] == whole[1] != whole[2]
    assert score([cut], [response]) == whole[1]
    characters = score(["é" * 60, "é" * 49, "é" * 48], [response] * 3)
    assert characters[0] == characters[1] != characters[2]
    longer = "".join(chr(48 + i % 10) for i in range(140))
    alone = score([prompt, "", ""], [longer, longer, longer[:-1]])
    assert alone[0] == alone[1] != alone[2]


def test_matrices_are_in_the_compute_dtype(scorer, score):
    half = reward_model_scores(str(scorer), dtype="bfloat16", batch_size=2, max_tokens=128)
    found, exact = half(["a", "b"], ["c", "d"]), score(["a", "b"], ["c", "d"])
    assert (found != exact).all()
    np.testing.assert_allclose(found, exact, atol=0.2)


def test_without_a_template_prompt_and_response_are_one_text(tmp_path):
    tiny_random.write(tmp_path / "policy", "tiny-random-gpt-neox")
    plain = hf.read_config(tmp_path / "policy")
    assert isinstance(plain, ModelConfig)
    config = replace(plain, scalar_head=True)
    params = tiny.draw(decoder.abstract(config), 0)
    hf.save(tmp_path / "reward", config, params, tmp_path / "policy")
    fields = json.loads((tmp_path / "reward" / "config.json").read_text())
    (tmp_path / "reward" / "config.json").write_text(json.dumps(fields | {"pad_token_id": None}))
    words = tokenizer.load(tmp_path / "reward")
    score = reward_model_scores(str(tmp_path / "reward"), dtype="float32", batch_size=4, max_tokens=64)
    found = score(["a TL;DR:", "a TL;DR:", "a TL;DR:\n"], ["b c", " b c", "b c"])
    apply = jax.jit(partial(reward.apply, config=config, dtype="float32"))
    for text, value in zip(["a TL;DR: b c", "a TL;DR: b c", "a TL;DR:\nb c"], found, strict=True):
        ids = np.array([[*words.encode(text), words.eos_id]])
        expected = apply(params, tokens=ids, valid=np.ones(ids.shape, bool))
        np.testing.assert_allclose(value, expected[0], atol=1e-4)
    assert found[0] == found[1] != found[2]


def test_one_that_weighs_objectives_needs_llamas_headers_and_this_process(tmp_path):
    how: dict[str, Any] = {"dtype": "float32", "batch_size": 2, "max_tokens": 64}
    gated = tmp_path / "gated"
    tiny_random.write(gated, "tiny-random-llama-gated")
    with pytest.raises(ValueError, match=r"which no server here can do: set the field's kind to reward_model"):
        remote_reward(lambda inputs: np.zeros(len(inputs)), str(gated), max_tokens=64)
    (gated / "model.safetensors").unlink()  # all is said before weights are looked for
    template = (gated / "tokenizer_config.json").read_text()
    (gated / "tokenizer_config.json").write_text(template.replace("<|eot_id|>", "<|end|>"))
    with pytest.raises(ValueError, match=r"its chat template does not put <\|eot_id\|><\|start_header_id\|>assistant"):
        reward_model_scores(str(gated), **how)
    tiny_random.write(tmp_path / "plain", "tiny-random-llama")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (gated / name).write_bytes((tmp_path / "plain" / name).read_bytes())
    with pytest.raises(ValueError, match=r"no special token <\|eot_id\|> and no <\|start_header_id\|> and no"):
        reward_model_scores(str(gated), **how)


def test_what_is_no_reward_model_is_refused(directory, tmp_path):
    how: dict[str, Any] = {"dtype": "float32", "batch_size": 2, "max_tokens": 64}
    with pytest.raises(ValueError, match=r"expected a reward model.*found an encoder"):
        reward_model_scores(str(directory), **how)
    hf.save(tmp_path / "decoder", tiny.CONFIG, tiny.params())
    with pytest.raises(ValueError, match=r"found a decoder with an unembedding"):
        reward_model_scores(str(tmp_path / "decoder"), **how)
    with pytest.raises(ValueError, match=r"found a decoder with an unembedding"):
        remote_reward(lambda inputs: np.zeros(len(inputs)), str(tmp_path / "decoder"), max_tokens=64)
    config = tmp_path / "decoder" / "config.json"
    named = {"architectures": ["LlamaForSequenceClassification"]}
    config.write_text(json.dumps(json.loads(config.read_text()) | named))
    with pytest.raises(ValueError, match=r"SequenceClassification with 2 labels"):
        reward_model_scores(str(tmp_path / "decoder"), **how)
