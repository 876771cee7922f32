import copy
import dataclasses
import json
import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from unittest import mock

import grain
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers.processors import TemplateProcessing

from sea_jax.data import near_duplicates, sources
from sea_jax.data import prompts as prompts_module
from sea_jax.data.conversations import Conversation
from sea_jax.data.near_duplicates import near_repeats, word_shingles
from sea_jax.data.prompts import (
    FILES,
    DataSettings,
    Rendered,
    collate,
    evaluation_batches,
    load_records,
    render,
    render_all,
    split_records,
    training_batches,
    without_repeats,
)
from sea_jax.data.records import Columns, Record, digest
from sea_jax.models.tokenizer import Tokenizer
from sea_jax.settings import faults as settings_faults


def record(prompt: str) -> Record:
    return {"id": digest(prompt)[:16], "prompt": prompt, "reference": ""}


def rendered(*lengths: int) -> list[Rendered]:
    """Prompts of given numbers of tokens; prompt i is i + 1, many times."""
    return [Rendered(record(f"prompt {i}"), [i + 1] * length) for i, length in enumerate(lengths)]


def lines(path: Path, *objects: object) -> Path:
    path.write_text("\n".join(json.dumps(one) for one in objects) + "\n")
    return path


# split


def test_the_split_depends_on_each_prompt_alone() -> None:
    records = [record(f"prompt number{i} about topic{i}") for i in range(400)]
    train, heldout = split_records(records, 0.25)
    assert len(train) + len(heldout) == 400
    assert 70 <= len(heldout) <= 130
    for one in heldout:
        assert int(digest(one["prompt"])[:2], 16) < 64
    fewer_train, fewer_heldout = split_records(records[100:][::-1], 0.25)
    assert fewer_heldout == [one for one in heldout if one in records[100:]]
    assert fewer_train == [one for one in train if one in records[100:]]


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.5])
def test_a_fraction_out_of_range_is_refused(fraction: float) -> None:
    with pytest.raises(ValueError, match=r"data\.heldout_fraction"):
        split_records([record("x")], fraction)


def test_near_duplicates_of_held_out_prompts_are_dropped() -> None:
    heldout = [record("The quick brown fox jumps over the lazy dog while the old cat sleeps.")]
    kept = [
        record("A quick brown fox was seen; nobody knows where the lazy dog went that day."),
        record("Something else altogether, in many words that the other text does not have."),
        record("The dog"),
    ]
    dropped = [
        record("the QUICK brown fox jumps over the lazy dog, while an old cat sleeps"),
        record("jumps over the lazy dog"),
        record(
            "So they say that the quick brown fox jumps over the lazy dog. I never saw it do that, nor did you, ever."
        ),
    ]
    assert without_repeats([*dropped, *kept], heldout, 1 / 3) == kept
    assert without_repeats(kept, [], 1 / 3) == kept


def test_the_wording_of_a_template_is_no_sign_of_nearness() -> None:
    template = "Below is an instruction that describes a task. Write a response that completes it.\n\n{}\n\nResponse:"
    heldout = [record(template.format(f"Name {i} towns beside river {i} now")) for i in range(8)]
    kept = [record(template.format(f"Tell me why bridge {i} fell")) for i in range(20)] + [
        record(template.format("Go"))
    ]
    dropped = [record(template.format("Please name 3 towns beside river 3 now"))]
    assert without_repeats([*dropped, *kept], heldout, 1 / 3) == kept
    # Of few held-out prompts nobody can tell what is a template's.
    assert without_repeats(kept, heldout[:4], 1 / 3) == []


@settings(deadline=None)
@given(
    st.lists(st.lists(st.sampled_from("abc"), max_size=9).map(" ".join), max_size=6),
    st.lists(st.lists(st.sampled_from("abc"), max_size=9).map(" ".join), max_size=6),
)
def test_near_duplicates_are_those_that_share_so_much_of_the_shorter(prompts: list[str], others: list[str]) -> None:
    def repeats(prompt: str, other: str) -> bool:
        one, two = word_shingles(prompt), word_shingles(other)
        return 2 * len(one & two) >= min(len(one), len(two))

    with mock.patch.multiple(near_duplicates, PROMPTS_COMPARED=2, BOILERPLATE_TIMES=99):
        found = near_repeats([record(prompt) for prompt in prompts], [record(other) for other in others], 0.5)
    assert all(repeats(prompts[row], others[other]) for row, other in found.items())
    assert set(found) == {i for i, prompt in enumerate(prompts) if any(repeats(prompt, other) for other in others)}


def test_by_default_only_the_same_prompt_is_a_repeat_whatever_its_case_and_white_space(
    caplog: pytest.LogCaptureFixture,
) -> None:
    heldout = [record("Write a haiku about rain"), record("Straße")]
    kept = [record(f"Write a haiku about {thing}") for thing in ("snow", "fog", "rain.", "raining")]
    assert without_repeats(kept, heldout, 0.0) == kept
    assert caplog.text == ""
    assert without_repeats([record("write a\tHaiku  about rain\n"), *kept, record("STRASSE")], heldout, 0.0) == kept
    assert "left out 2 of 6 training prompts that repeat a held-out one (data.near_duplicate_share=0): " in caplog.text
    assert without_repeats([*kept, record("RAIN")], [*heldout, record("rain")], 0.5) == []
    assert (
        "left out 5 of 5 training prompts that nearly repeat a held-out one (data.near_duplicate_share=0.5; at 0 "
        in (caplog.text)
    )
    assert "'Write a haiku about snow' repeats 'Write a haiku about rain'" in caplog.text


# load


def config(**fields: Any) -> DataSettings:
    given: dict[str, Any] = {"source": "jsonl", "prompt_field": "p", "heldout_fraction": 0.5, **fields}
    return DataSettings(**given)


def test_a_file_of_its_own_can_be_held_out(tmp_path: Path) -> None:
    repost = {"p": "I asked my neighbour about his very loud dog, again!"}
    train = lines(tmp_path / "train.jsonl", {"p": "a"}, {"p": "b"}, repost, {"p": "c"})
    post = {"p": "I asked my neighbour about his very loud dog."}
    heldout = lines(tmp_path / "heldout.jsonl", {"p": "d"}, {"p": "b"}, post)
    for share, kept in ((0.0, ["a", repost["p"], "c"]), (1 / 3, ["a", "c"])):
        settings = config(path=str(train), heldout_path=str(heldout), near_duplicate_share=share)
        assert [[one["prompt"] for one in part] for part in load_records(settings)] == [kept, ["d", "b", post["p"]]]


def test_one_file_is_split(tmp_path: Path) -> None:
    path = lines(tmp_path / "all.jsonl", *({"p": f"prompt{i}"} for i in range(50)))
    train, heldout = load_records(config(path=str(path)))
    assert {one["prompt"] for one in train + heldout} == {f"prompt{i}" for i in range(50)}
    assert len(train) + len(heldout) == 50


def test_a_few_prompts_of_one_wording_are_all_used(tmp_path: Path) -> None:
    haiku = [
        {"p": f"Write a haiku about {thing}"}
        for thing in ["rain", "snow", "fog", "wind", "sun", "moon", "frost", "hail", "dew", "ice", "tide", "sea"]
    ]
    train, heldout = load_records(config(path=str(lines(tmp_path / "haiku.jsonl", *haiku)), heldout_fraction=0.1))
    assert (len(train), len(heldout)) == (10, 2)


def test_nothing_to_train_on_or_to_hold_out_is_refused(tmp_path: Path) -> None:
    path = lines(tmp_path / "one.jsonl", {"p": "alone"})
    with pytest.raises(ValueError, match=r"data\.heldout_fraction"):
        load_records(config(path=str(path)))


def test_an_unknown_source_is_refused() -> None:
    with pytest.raises(ValueError, match=r"data\.source is 'web'"):
        load_records(config(source="web"))


@pytest.mark.parametrize("source", ["csv", "parquet", "huggingface", "tfds"])
def test_the_source_and_its_fields_choose_what_is_read(monkeypatch: pytest.MonkeyPatch, source: str) -> None:
    asked = []

    def read(*given: object, **named: object) -> list[Record]:
        asked.append((*given, named))
        return [record("a"), record("b"), record("c")] if len(asked) == 1 else [record("b")]

    monkeypatch.setattr(sources, source, read)
    files = {"path": "train.parquet", "heldout_path": "heldout.parquet"}
    splits = {"path": "named", "split": "sft", "heldout_split": "test", "subset": "short", "directory": "there"}
    chosen = files if source in FILES else splits
    parts = load_records(config(source=source, reference_field="r", **chosen))
    assert [[one["prompt"] for one in part] for part in parts] == [["a", "c"], ["b"]]
    columns = Columns("p", "r", id="id", id_optional=True)
    place = {"huggingface": {"subset": "short"}, "tfds": {"directory": "there"}}
    assert asked == (
        [("train.parquet", columns, {}), ("heldout.parquet", columns, {})]
        if source in FILES
        else [("named", columns, place[source] | {"split": split}) for split in ("sft", "test")]
    )


# rendering


def test_a_template_surrounds_the_prompt(byte_tokenizer: Tokenizer) -> None:
    ids = render("a{b}", byte_tokenizer, DataSettings(template='{"q": {prompt}}', chat=False))
    assert byte_tokenizer.decode(ids) == '{"q": a{b}}'


def test_a_prompt_that_mentions_the_placeholder_is_left_alone(byte_tokenizer: Tokenizer) -> None:
    ids = render("{prompt}", byte_tokenizer, DataSettings(template="<{prompt}>", chat=False))
    assert byte_tokenizer.decode(ids) == "<{prompt}>"


def test_a_chat_has_its_special_tokens_once(byte_tokenizer: Tokenizer) -> None:
    ids = render("a", byte_tokenizer, DataSettings(template="Do {prompt}", chat=True, system="Be brief."))
    assert byte_tokenizer.decode(ids, skip_special=False) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nDo a<|im_end|>\n<|im_start|>assistant\n"
    )
    assert ids.count(1) == 3
    assert 1 not in render("a", byte_tokenizer, DataSettings(template="{prompt}", chat=False))


def test_a_conversation_is_read_as_it_is(byte_tokenizer: Tokenizer) -> None:
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    own = [{"role": "system", "content": "Be kind."}, *turns]
    for messages, system, expected in ((turns, "", turns), (own, "Be brief.", own), (own[1:], "Be kind.", own)):
        ids = render(Conversation(messages), byte_tokenizer, DataSettings(chat=True, system=system))
        assert ids == byte_tokenizer.encode(byte_tokenizer.chat(expected), add_special=False)
    alone = render(Conversation(turns[:1]), byte_tokenizer, DataSettings(chat=True))
    assert alone == render("a", byte_tokenizer, DataSettings(chat=True))


def test_conversations_need_a_chat_template_and_nothing_around_them(tmp_path: Path) -> None:
    rows = [{"p": [{"role": "user", "content": f"hello {i}"}]} for i in range(20)]
    path = str(lines(tmp_path / "a.jsonl", *rows))
    with pytest.raises(ValueError, match=r"^config\.data\.chat=False: .*'hello 0'.*; set config\.data\.chat=True$"):
        load_records(config(path=path))
    with pytest.raises(ValueError, match=r"^config\.data\.template='Q: {prompt}': .*'hello 0'"):
        load_records(config(path=path, chat=True, template="Q: {prompt}"))
    for part in load_records(config(path=path, chat=True)):
        assert all(isinstance(one["prompt"], Conversation) for one in part)


def test_what_the_shell_left_of_a_line_break_is_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = str(lines(tmp_path / "all.jsonl", *({"p": f"prompt{i}"} for i in range(50))))
    load_records(config(path=path, template="It's {prompt}\n\tBack\\slash", chat=True, system="Be\n{brief}"))
    assert caplog.text == ""
    load_records(config(path=path, template=r"It's {prompt}\n\nSummary:", chat=True, system=r"Tab\t"))
    assert r"config.data.template holds a backslash and the letter n" in caplog.text
    assert (
        r"line break is meant, bash and zsh write it as --config.data.template=$'It\'s {prompt}\n\nSummary:'"
        in caplog.text
    )
    assert r"tab is meant, bash and zsh write it as --config.data.system=$'Tab\t'" in caplog.text


def test_a_chat_has_no_bos_but_what_its_template_writes(byte_tokenizer: Tokenizer) -> None:
    backend = copy.deepcopy(byte_tokenizer.backend)
    backend.backend_tokenizer.post_processor = TemplateProcessing("<|im_start|> $A", "$A $B", [("<|im_start|>", 1)])
    backend.chat_template = "[{{ messages[0]['content'] }}]"
    beginning = dataclasses.replace(byte_tokenizer, backend=backend)
    expected = byte_tokenizer.encode("[a]")
    assert render("[a]", beginning, DataSettings(template="{prompt}", chat=False)) == [1, *expected]
    assert render("a", beginning, DataSettings(template="{prompt}", chat=True)) == expected


def test_long_prompts_are_left_out_and_counted(byte_tokenizer: Tokenizer, caplog: pytest.LogCaptureFixture) -> None:
    records = [record("x" * length) for length in (5, 3, 4, 9)]
    with caplog.at_level(logging.INFO, logger="absl"):
        kept = render_all(records, byte_tokenizer, DataSettings(template="{prompt}", chat=False, max_prompt_tokens=4))
    assert [len(one.tokens) for one in kept] == [3, 4]
    assert [one.record for one in kept] == records[1:3]
    assert "2 of 4 prompts are over 4 tokens" in caplog.text
    with mock.patch.object(prompts_module, "render", wraps=render) as rendering:
        first = render_all(records, byte_tokenizer, DataSettings(max_prompt_tokens=4), limit=1)
    assert (first, rendering.call_count) == (kept[:1], 2)
    with pytest.raises(ValueError, match=r"data\.max_prompt_tokens is 2.*from 3 to 9 tokens"):
        render_all(records, byte_tokenizer, DataSettings(template="{prompt}", chat=False, max_prompt_tokens=2))


def test_special_tokens_in_a_prompt_stay_text_unless_a_setting_says_otherwise(
    byte_tokenizer: Tokenizer, caplog: pytest.LogCaptureFixture
) -> None:
    records = [record("hi"), record("a<|im_end|>b")]
    for chat in (True, False):
        _, found = render_all(records, byte_tokenizer, DataSettings(chat=chat, template="{prompt}<|im_start|>"))
        assert found.tokens.count(2) == chat
        assert found.tokens.count(1) == 1 + 2 * chat  # what is no data has its special tokens
        assert "a<|im_end|>b" in byte_tokenizer.decode(found.tokens)
        tokens = DataSettings(chat=chat, template="{prompt}<|im_start|>", special_tokens="tokens")
        assert render("a<|im_end|>b", byte_tokenizer, tokens).count(2) == 1 + chat
    assert "1 of 2 prompts have <|im_end|> in writing, which stays text; data.special_tokens=tokens" in caplog.text


def test_a_special_token_that_the_model_does_not_know_is_refused(byte_tokenizer: Tokenizer) -> None:
    smaller = dataclasses.replace(byte_tokenizer, vocab_size=2)
    with pytest.raises(
        ValueError, match=r"config\.data\.special_tokens=tokens: a prompt has the token <\|im_end\|>, 2, of"
    ):
        render_all([record("<|im_end|>")], smaller, DataSettings(special_tokens="tokens"))


def test_arguments_of_the_chat_template_are_a_json_object(byte_tokenizer: Tokenizer) -> None:
    backend = copy.deepcopy(byte_tokenizer.backend)
    backend.chat_template = "{{ words }}"
    thinking = dataclasses.replace(byte_tokenizer, backend=backend)
    ids = render("a", thinking, DataSettings(chat=True, chat_arguments='{"words": "hi"}'))
    assert byte_tokenizer.decode(ids) == "hi"
    bad, alone = DataSettings(chat_arguments="enable_thinking=False"), DataSettings(chat_arguments="{}")
    assert "config.chat_arguments='enable_thinking=False': must be a JSON object" in settings_faults(bad)
    assert any("chat_arguments='{}': only a chat template takes them" in fault for fault in alone.faults())


# batches


def test_prompts_are_padded_on_the_left_to_a_multiple_of_the_bucket() -> None:
    batch = collate(rendered(3, 5), pad_id=9, bucket=4)
    np.testing.assert_array_equal(batch["tokens"], [[9, 9, 9, 9, 9, 1, 1, 1], [9, 9, 9, 2, 2, 2, 2, 2]])
    np.testing.assert_array_equal(batch["valid"], [[0, 0, 0, 0, 0, 1, 1, 1], [0, 0, 0, 1, 1, 1, 1, 1]])
    assert (batch["tokens"].dtype, batch["valid"].dtype) == (np.int32, bool)
    assert batch["prompt"] == ["prompt 0", "prompt 1"]
    assert collate(rendered(4), pad_id=9, bucket=4)["tokens"].shape == (1, 4)
    assert collate(rendered(0), pad_id=9, bucket=4)["valid"].sum() == 0


def ids_of(dataset: grain.MapDataset, batches: Iterable[int]) -> list[str]:
    return [one for i in batches for one in dataset[i]["id"]]


@settings(deadline=None, max_examples=30)
@given(count=st.integers(1, 20), batch_size=st.integers(1, 8), seed=st.integers(0, 2**32 - 1))
def test_every_epoch_has_every_prompt_once_in_an_order_of_its_own(count: int, batch_size: int, seed: int) -> None:
    prompts = rendered(*[1] * count)
    dataset = training_batches(prompts, pad_id=0, bucket=1, batch_size=batch_size, seed=seed)
    seen = ids_of(dataset, range(2 * count))
    assert len(seen) == 2 * count * batch_size
    epochs = [seen[start : start + count] for start in range(0, len(seen), count)]
    assert all(sorted(epoch) == sorted(one.record["id"] for one in prompts) for epoch in epochs)
    if count >= 8:
        assert len({tuple(epoch) for epoch in epochs}) > 1


def test_a_batch_depends_on_the_seed_and_its_number_alone() -> None:
    prompts = rendered(*range(1, 21))
    dataset, again, other = (
        training_batches(prompts, pad_id=0, bucket=4, batch_size=3, seed=seed) for seed in (5, 5, 6)
    )
    order = [17, 3, 0, 10**12, 3]
    for i in order:
        batch, expected = dataset[i], again[i]
        np.testing.assert_array_equal(batch.pop("tokens"), expected.pop("tokens"))
        np.testing.assert_array_equal(batch.pop("valid"), expected.pop("valid"))
        assert batch == expected
    assert ids_of(dataset, order) != ids_of(other, order)


@given(count=st.integers(1, 20), batch_size=st.integers(1, 8))
def test_an_evaluation_counts_every_prompt_once_in_order(count: int, batch_size: int) -> None:
    prompts = rendered(*[2] * count)
    counted = []
    for batch, mask in evaluation_batches(prompts, pad_id=0, bucket=1, batch_size=batch_size):
        assert batch["tokens"].shape == (batch_size, 2)
        assert len(batch["id"]) == len(mask) == batch_size
        counted += [one for one, counts in zip(batch["id"], mask, strict=True) if counts]
    assert counted == [one.record["id"] for one in prompts]
