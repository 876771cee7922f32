"""Files of rows as people have them: one, a directory, a pattern, compressed, CSV."""

import gzip
import json
from pathlib import Path

import pyarrow
import pytest

from sea_jax.data import sources
from sea_jax.data.records import Columns

ROWS = [{"p": "one é", "r": "1"}, {"p": "two\nlines, with a comma", "r": ""}, {"p": "three", "r": "3"}]
COLUMNS = Columns("p", "r")
JSON = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
CSV = '\ufeffp,other,r\none é,,1\n"two\nlines, with a comma",x,\n\nthree,,3\n'.encode()


def write(path: Path, content: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".zst":
        with pyarrow.output_stream(str(path), compression="zstd") as stream:
            stream.write(content)
    else:
        path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


@pytest.mark.parametrize("ending", ["", ".gz", ".zst"])
@pytest.mark.parametrize(("kind", "content"), [("jsonl", JSON), ("csv", CSV)])
def test_plain_and_compressed_files_hold_the_same(tmp_path: Path, kind: str, content: bytes, ending: str) -> None:
    found = getattr(sources, kind)(write(tmp_path / f"a.{kind}{ending}", content), COLUMNS)
    assert [(one["prompt"], one["reference"]) for one in found] == [(row["p"], row["r"]) for row in ROWS]


@pytest.mark.parametrize("path", ["shards", "shards/train-*", "shards/**/train-*.jsonl*"])
def test_shards_are_read_in_the_order_of_their_names(tmp_path: Path, path: str) -> None:
    first, second, third = JSON.splitlines(keepends=True)
    write(tmp_path / "shards/train-2.jsonl", third)
    write(tmp_path / "shards/train-0.jsonl", first)
    write(tmp_path / "shards/train-1.jsonl.gz", second)
    write(tmp_path / "shards/README.md", b"no shard")
    write(tmp_path / "shards/._train-0.jsonl", b"\0")
    assert [one["prompt"] for one in sources.jsonl(tmp_path / path, COLUMNS)] == [row["p"] for row in ROWS]


def test_a_compressed_file_that_is_none_or_torn_is_named(tmp_path: Path) -> None:
    for ending in ("gz", "zst"):
        path = write(tmp_path / f"a.jsonl.{ending}", JSON)
        whole = path.read_bytes()
        for content in (JSON, whole[: len(whole) // 2]):
            path.write_bytes(content)
            with pytest.raises(ValueError, match=rf"a\.jsonl\.{ending} cannot be read as (gzip|zstd) \(.+\)$"):
                sources.jsonl(path, COLUMNS)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"p,r\na,1\n\nb,1,2\n", r"a\.csv, line 4: 3 fields; the first line names 2"),
        (b'p,r\n"a\nb",1\n" ",2\n', r"a\.csv, line 4: the field 'p' \(data\.prompt_field\) is ' '"),
        (b'p,r\na,1\n"b,2\n', r"a\.csv, line 3: not CSV \(unexpected end of data\)"),
        (b"p,r\na,1\n\xff,2\n", r"a\.csv, behind line .: not UTF-8 text"),
        (b"q,r\na,1\n", r"a\.csv: no field 'p' \(data\.prompt_field\); there are: 'q', 'r'"),
        (b"p,r\n", r"a\.csv holds no prompts"),
    ],
)
def test_a_bad_csv_file_is_named_with_the_line(tmp_path: Path, content: bytes, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        sources.csv(write(tmp_path / "a.csv", content), COLUMNS)
