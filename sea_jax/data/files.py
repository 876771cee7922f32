"""Files of rows: JSON lines, CSV or Parquet; one of them, a directory or a pattern, plain or compressed."""

import csv
import glob
import gzip
import io
import json
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, cast

from sea_jax.data.records import Columns, Row

# pyarrow is imported where it reads, so that nobody else pays for it.

COMPRESSED = {".gz": "gzip", ".zst": "zstd"}


def find_files(path: str | Path, suffix: str) -> list[Path]:
    """Returns files in the order of their names.

    Args:
      path: a file, a directory of files with the suffix, or a pattern such as `data/train-*.parquet`.
      suffix: of the files in a directory; of a compressed one, before what says so.

    Raises:
      FileNotFoundError: there is none.
    """
    given = Path(path).expanduser()
    if given.is_dir():
        endings = tuple(f"{suffix}{ending}" for ending in ("", *COMPRESSED))
        matches = [file for file in given.iterdir() if file.name.endswith(endings) and not file.name.startswith(".")]
    else:
        matches = [given] if given.is_file() else [Path(match) for match in glob.glob(str(given), recursive=True)]
    files = sorted(file for file in matches if file.is_file())
    if not files:
        raise FileNotFoundError(
            f"{given} is no file, no directory with {suffix} files in it and no pattern that files match; data.path and "
            f"data.heldout_path name {suffix} files"
        )
    return files


@contextmanager
def opened(file: Path) -> Iterator[IO[bytes]]:
    """Opens a file to be read, decompressed where its name ends in one of COMPRESSED.

    Raises:
      ValueError: it is not compressed in that way, or not whole; also while it is read inside.
    """
    kind = COMPRESSED.get(file.suffix)
    if kind is None:
        with file.open("rb") as plain:
            yield plain
        return
    try:
        if kind == "gzip":
            with gzip.open(file, "rb") as unzipped:
                yield cast(IO[bytes], unzipped)
        else:
            import pyarrow

            with pyarrow.input_stream(str(file), compression=kind) as native, io.BufferedReader(native) as stream:
                yield stream
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{file} cannot be read as {kind} ({one_line(error)})") from error


def json_rows(file: Path, columns: Columns) -> Iterator[Row]:
    """Yields the objects of a file of JSON lines.

    Raises:
      ValueError: a line is not a JSON object.
    """
    with opened(file) as stream:
        for number, line in enumerate(stream, start=1):
            if not line.strip():
                continue
            place = f"{file}, line {number}"
            try:
                fields = json.loads(line.decode("utf-8-sig"))
            except UnicodeDecodeError as error:
                raise ValueError(f"{place}: not UTF-8 text ({error})") from error
            except json.JSONDecodeError as error:
                raise ValueError(f"{place}: not JSON ({error})") from error
            if not isinstance(fields, dict):
                raise ValueError(f"{place}: a JSON object is expected, found {type(fields).__name__}")
            yield place, fields


def csv_rows(file: Path, columns: Columns) -> Iterator[Row]:
    """Yields the rows of a CSV file in UTF-8, whose first line names the columns (https://www.rfc-editor.org/rfc/rfc4180).

    Raises:
      ValueError: the file is not in the format or does not have the columns.
    """
    line = 0  # the last one that was read
    with opened(file) as stream, io.TextIOWrapper(stream, "utf-8-sig", newline="") as text:
        reader = csv.reader(text, strict=True)
        try:
            header = next(reader, [])
            columns.needed(str(file), header)
            line = reader.line_num
            for values in reader:
                place, line = f"{file}, line {line + 1}", reader.line_num  # a row can be several lines long
                if len(values) not in (0, len(header)):
                    raise ValueError(f"{place}: {len(values)} fields; the first line names {len(header)}")
                if values:
                    yield place, dict(zip(header, values, strict=True))
        except UnicodeDecodeError as error:
            raise ValueError(f"{file}, behind line {line}: not UTF-8 text ({error})") from error
        except csv.Error as error:
            raise ValueError(f"{file}, line {line + 1}: not CSV ({error})") from error


def parquet_rows(file: Path, columns: Columns) -> Iterator[Row]:
    """Yields the rows of a Parquet file, with the columns that a record is made of (https://parquet.apache.org).

    Raises:
      ValueError: the file is not in the format or does not have the columns.
    """
    import pyarrow
    from pyarrow import parquet as format_reader

    try:
        with format_reader.ParquetFile(file) as opened_file:
            names = columns.needed(str(file), opened_file.schema_arrow.names)
            rows = (row for batch in opened_file.iter_batches(columns=names) for row in batch.to_pylist())
            yield from ((f"{file}, row {number}", row) for number, row in enumerate(rows, start=1))
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{file} cannot be read as Parquet ({one_line(error)})") from error


def one_line(error: BaseException) -> str:
    """Returns what a library's error says, on one line and shortened; its type where it says nothing."""
    return " ".join(str(error).split())[:300] or type(error).__name__
