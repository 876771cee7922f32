"""Files and data sets are real ones, written here; their records are compared with those of JSON lines."""

import json
import logging
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet as pq

from sea_jax.data import docstrings, sources
from sea_jax.data.records import Columns, Record

# The fourth row repeats the first's prompt; one has no reference.
ROWS: list[dict[str, Any]] = [
    {"post": "one é", "summary": "1", "id": 7, "score": 0.5},
    {"post": "two", "summary": None, "id": 8, "score": 0.5},
    {"post": "three", "summary": "3", "id": 9, "score": 0.5},
    {"post": "one é", "summary": "4", "id": 10, "score": 0.5},
]
RECORDS: list[Record] = [
    {"id": "7", "prompt": "one é", "reference": "1"},
    {"id": "8", "prompt": "two", "reference": ""},
    {"id": "9", "prompt": "three", "reference": "3"},
]


def columns(prompt: str, reference: str = "") -> Columns:
    return Columns(prompt, reference, id="id", id_optional=True)


def lines(path: Path, *objects: object) -> Path:
    path.write_text("\n".join(json.dumps(one) for one in objects) + "\n")
    return path


def write_parquet(path: Path, rows: list[dict[str, Any]] = ROWS) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=2)
    return path


# docstrings


def test_docstrings_have_their_summaries_as_references(monkeypatch: pytest.MonkeyPatch) -> None:
    pairs = [docstrings.Pair(f"Summary {i}.", f"post{i} of thing{i}") for i in range(40)]
    monkeypatch.setattr(docstrings, "mine", lambda: pairs)
    made = sources.docstrings()
    assert [(one["reference"], one["prompt"]) for one in made] == pairs
    assert len({one["id"] for one in made}) == 40


# jsonl


def test_jsonl_reads_the_named_fields_and_gives_ids_to_those_without(tmp_path: Path) -> None:
    path = lines(
        tmp_path / "a.jsonl",
        {"post": "one", "summary": "1", "id": 7},
        {"post": "two", "summary": None},
    )
    path.write_text("\ufeff" + path.read_text() + "\n  \n")
    assert sources.jsonl(path, columns("post", "summary")) == [
        {"id": "7", "prompt": "one", "reference": "1"},
        {"id": "3fc4ccfe745870e2", "prompt": "two", "reference": ""},
    ]
    assert [one["reference"] for one in sources.jsonl(path, columns("post"))] == ["", ""]


def test_of_rows_with_the_same_prompt_the_first_counts(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = lines(tmp_path / "a.jsonl", *ROWS)
    with caplog.at_level(logging.INFO, logger="absl"):
        assert sources.jsonl(path, columns("post", "summary")) == RECORDS
    assert "a.jsonl: 3 prompts; 1 that repeat one are left out" in caplog.text


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"p": "x", ', "not JSON"),
        (b'["p"]', "found list"),
        (b'{"q": "x"}', r"no field 'p' \(data.prompt_field\); there are: 'q'"),
        (b'{"p": "x"}', r"no field 'r' \(data.reference_field\); there are: 'p'"),
        (b'{"p": 3, "r": ""}', r"'p' \(data.prompt_field\) is 3"),
        (b'{"p": " ", "r": ""}', "data.prompt_field"),
        (b'{"p": "x", "r": 5}', r"'r' \(data.reference_field\) is 5"),
        (b'{"p": "x", "r": ["y"]}', r"'r' \(data.reference_field\) holds 'y' as message 1"),
        (b'{"p": "\xff", "r": ""}', "not UTF-8"),
        (b'{"p": "\\ud800", "r": ""}', r"'p' holds half of a character, the surrogate '\\ud800', at position 0"),
        (b'{"p": "x", "r": "fun \\ud83d"}', r"'r' holds half of a character, the surrogate '\\ud83d', at position 4"),
        (b'{"p": "x", "r": "", "id": "\\ud83d"}', r"'id' holds half of a character"),
        (
            b'{"p": null, "r": ""}',
            r"'p' \(data.prompt_field\) is None; .*data\.skip_bad_rows=True leaves such rows out",
        ),
        (
            b'{"p": "another", "r": "", "id": "first"}',
            r"'first' is that of .*bad\.jsonl, line 1, whose .*data\.id_field=''",
        ),
    ],
)
def test_a_bad_line_is_named_with_its_file_and_number(tmp_path: Path, line: bytes, reason: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_bytes(b'{"p": "good", "r": "", "id": "first"}\n\n' + line + b"\n")
    with pytest.raises(ValueError, match=rf"bad\.jsonl, line 3: .*{reason}"):
        sources.jsonl(path, columns("p", "r"))


def test_a_missing_or_empty_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"none\.jsonl"):
        sources.jsonl(tmp_path / "none.jsonl", columns("p"))
    (tmp_path / "empty.jsonl").write_text("\n\n")
    with pytest.raises(ValueError, match=r"empty\.jsonl holds no prompts"):
        sources.jsonl(tmp_path / "empty.jsonl", columns("p"))


# parquet


def test_a_parquet_file_gives_the_records_of_json_lines(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="absl"):
        assert sources.parquet(write_parquet(tmp_path / "a.parquet"), columns("post", "summary")) == RECORDS
    assert "a.parquet: 3 prompts; 1 that repeat one are left out" in caplog.text


@pytest.mark.parametrize("path", ["shards", "shards/train-*.parquet", "shards/**/train-*.parquet"])
def test_shards_are_read_in_the_order_of_their_names(tmp_path: Path, path: str) -> None:
    write_parquet(tmp_path / "shards/train-1.parquet", ROWS[2:])
    write_parquet(tmp_path / "shards/train-0.parquet", ROWS[:2])
    (tmp_path / "shards/README.md").write_text("not a shard")
    assert sources.parquet(tmp_path / path, columns("post", "summary")) == RECORDS


def test_a_parquet_file_without_the_column_is_named_with_those_it_has(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"a\.parquet: no field 'prompt' .*: 'post', 'summary', 'id', 'score'$"):
        sources.parquet(path, columns("prompt"))


def test_a_bad_parquet_row_is_named_with_its_number_in_the_file(tmp_path: Path) -> None:
    rows = [{"post": f"post {i}"} for i in range(7)] + [{"post": None}]
    with pytest.raises(ValueError, match=r"a\.parquet, row 8: the field 'post' \(data.prompt_field\) is None"):
        sources.parquet(write_parquet(tmp_path / "a.parquet", rows), columns("post"))


def test_what_is_no_parquet_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    for content in (b"", b"PAR1 and something else altogether PAR1"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"a\.parquet cannot be read as Parquet \(.+\)$"):
            sources.parquet(path, columns("post"))
    pq.write_table(pa.table({"post": pa.array([], pa.string())}), path)
    with pytest.raises(ValueError, match=r"a\.parquet holds no prompts"):
        sources.parquet(path, columns("post"))


@pytest.mark.parametrize("path", ["none.parquet", "none*.parquet", "."])
def test_parquet_files_that_are_not_there(tmp_path: Path, path: str) -> None:
    with pytest.raises(FileNotFoundError, match=r"no directory with \.parquet files in it and no pattern"):
        sources.parquet(tmp_path / path, columns("post"))


# huggingface


@pytest.fixture
def on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], str]:
    """Writes a data set with the splits train and validation in one of three layouts; returns its directory."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")

    def write(layout: str) -> str:
        directory = tmp_path / layout
        if layout == "hub":
            write_parquet(directory / "data/train-00000-of-00001.parquet")
            write_parquet(directory / "data/validation-00000-of-00001.parquet", [{"post": "held", "summary": "h"}])
        elif layout == "configurations":
            write_parquet(directory / "long/train.parquet")
            write_parquet(directory / "short/train.parquet", ROWS[1:2])
            configurations = [{"config_name": name, "data_dir": name} for name in ("long", "short")]
            (directory / "README.md").write_text(f"---\n{json.dumps({'configs': configurations})}\n---\n")
        else:
            train, held = datasets.Dataset.from_list(ROWS), datasets.Dataset.from_list([{"post": "held"}])
            saved = train if layout == "split" else datasets.DatasetDict({"train": train, "validation": held})
            saved.save_to_disk(str(directory))
        return str(directory)

    return write


@pytest.mark.parametrize("layout", ["hub", "splits", "split"])
def test_a_data_set_gives_the_records_of_json_lines(on_disk: Callable[[str], str], layout: str) -> None:
    path = on_disk(layout)
    assert sources.huggingface(path, columns("post", "summary"), split="train") == RECORDS
    if layout != "split":
        assert [one["prompt"] for one in sources.huggingface(path, columns("post"), split="validation")] == ["held"]
    known = r"\['train'\]" if layout == "split" else r"\['train', 'validation'\]"
    with pytest.raises(ValueError, match=rf"\(data\.path\), split 'test': Unknown split .*{known}\.$"):
        sources.huggingface(path, columns("post"), split="test")
    with pytest.raises(ValueError, match=r"split train: no field 'text' \(data.prompt_field\); there are: 'post', "):
        sources.huggingface(path, columns("text"), split="train")


def test_a_data_set_with_several_configurations_needs_one_named(on_disk: Callable[[str], str]) -> None:
    path = on_disk("configurations")
    assert [one["prompt"] for one in sources.huggingface(path, columns("post"), subset="short", split="train")] == [
        "two"
    ]
    for subset in ("", "middle"):
        with pytest.raises(ValueError, match=r"\(data\.path\).*'long', 'short'"):
            sources.huggingface(path, columns("post"), subset=subset, split="train")


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        ({}, "any data files"),
        ({"train.parquet": "x"}, "arquet"),
        ({"train.jsonl": '{"a": 1}\n{"a"'}, "JSON parse error"),
    ],
)
def test_a_directory_that_holds_no_data_set(
    on_disk: Callable[[str], str], tmp_path: Path, files: dict[str, str], reason: str
) -> None:
    directory = tmp_path / "broken"
    directory.mkdir()
    for name, content in files.items():
        (directory / name).write_text(content)
    with pytest.raises(ValueError, match=rf"^{directory} \(data\.path\), split 'train': .*{reason}.*$"):
        sources.huggingface(str(directory), columns("post"), split="train")


def test_a_path_that_is_no_directory_is_not_looked_for_on_the_hub(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").touch()
    for path in (f"{tmp_path}/none", "./none", "a/b/c", f"{tmp_path}/a.parquet"):
        with pytest.raises(FileNotFoundError, match=r"is not a directory; .* with data\.source=parquet"):
            sources.huggingface(path, columns("post"), split="train")


def test_a_hub_that_cannot_be_reached_is_one_error_at_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    asked = []

    def unreachable(self: object, name: str, **arguments: object) -> None:
        asked.append(name)
        raise TimeoutError("no route\nto it")

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", unreachable)
    start = time.monotonic()
    message = r"^'nobody/nothing-of-this-name' is no directory here, .*\(no route to it\); .* with data\.source=parquet"
    with pytest.raises(FileNotFoundError, match=message) as error:
        sources.huggingface("nobody/nothing-of-this-name", columns("post"), split="train")
    assert len(str(error.value).splitlines()) == 1
    assert asked == ["nobody/nothing-of-this-name"]
    assert time.monotonic() - start < 20
    assert "Retrying" not in caplog.text


# tfds


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """TFDS's data_dir with the prepared data set `posts`, splits train and validation; null has no place there."""
    from tensorflow_datasets import core, features

    class Posts(core.GeneratorBasedBuilder, skip_registration=True):  # type: ignore[call-arg]  # a keyword of TFDS
        VERSION = core.Version("1.0.0")

        def _info(self) -> core.DatasetInfo:
            kinds = {"post": features.Text(), "summary": features.Text(), "id": features.Scalar(np.int64)}
            return core.DatasetInfo(builder=self, features=features.FeaturesDict(kinds), disable_shuffling=True)

        def _split_generators(self, dl_manager: object) -> dict[str, Any]:
            return {"train": self._generate_examples(ROWS), "validation": self._generate_examples(ROWS[1:2])}

        def _generate_examples(self, rows: list[dict[str, Any]]) -> Iterator[tuple[int, dict[str, Any]]]:
            for row in rows:
                yield row["id"], {name: row[name] or "" for name in ("post", "summary", "id")}

    directory = tmp_path_factory.mktemp("tfds")
    Posts(data_dir=directory, file_format="array_record").download_and_prepare()
    return directory


def test_a_prepared_tfds_data_set_gives_the_records_of_json_lines(prepared: Path) -> None:
    assert sources.tfds("posts", columns("post", "summary"), directory=str(prepared), split="train") == RECORDS
    held = sources.tfds("posts:1.0.0", columns("post"), split="validation", directory=str(prepared))
    assert held == [{"id": "8", "prompt": "two", "reference": ""}]
    assert "tensorflow" not in sys.modules


def test_a_tfds_split_or_feature_that_is_not_there(prepared: Path) -> None:
    with pytest.raises(ValueError, match=r"split 'test': Unknown split 'test'\. Should be one of \['train', 'valid"):
        sources.tfds("posts", columns("post"), split="test", directory=str(prepared))
    with pytest.raises(ValueError, match=r"^posts, split train: no field 'text' .*; there are: .*'summary'"):
        sources.tfds("posts", columns("text"), directory=str(prepared), split="train")


@pytest.mark.parametrize("name", ["reddit", "posts/long", "no_such_data_set", "no name"])
def test_a_tfds_data_set_that_is_not_prepared_is_not_fetched(prepared: Path, name: str) -> None:
    start = time.monotonic()
    message = rf"^the TFDS data set '{name}' .* is not prepared in {prepared} .*download_and_prepare\(\) prepares it$"
    with pytest.raises(FileNotFoundError, match=message):
        sources.tfds(name, columns("post"), directory=str(prepared), split="train")
    assert time.monotonic() - start < 20


def test_a_tfds_data_set_in_a_format_that_needs_tensorflow(prepared: Path, tmp_path: Path) -> None:
    shutil.copytree(prepared, tmp_path / "copy")
    description = tmp_path / "copy/posts/1.0.0/dataset_info.json"
    description.write_text(description.read_text().replace('"array_record"', '"tfrecord"'))
    with pytest.raises(ValueError, match=r"^posts .* is prepared as tfrecord, .*file_format='array_record'"):
        sources.tfds("posts", columns("post"), directory=str(tmp_path / "copy"), split="train")
