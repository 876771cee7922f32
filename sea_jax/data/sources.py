"""Where prompts come from: the rows of files and data sets."""

import glob
import json
from collections.abc import Iterator
from pathlib import Path

from sea_jax.data import docstrings as docstring_miner
from sea_jax.data.records import Columns, Record, Row, digest, records

# The libraries that only one source needs are imported where it reads, so that no other source pays for them.


def docstrings() -> list[Record]:
    """Returns the docstrings of the installed packages as prompts, with their one-sentence summaries as references."""
    return [
        {"id": digest(pair.post)[:16], "prompt": pair.post, "reference": pair.summary}
        for pair in docstring_miner.mine()
    ]


def jsonl(path: str | Path, columns: Columns) -> list[Record]:
    """Reads prompts from a file of one JSON object a line, in UTF-8; empty lines are passed over.

    Args:
      path: of the file.
      columns: Columns.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: a line is no JSON object, or `records` refuses it; file and line are named.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not a file; data.path and data.heldout_path name files of JSON lines")
    return records(str(path), json_rows(path), columns)


def json_rows(path: Path) -> Iterator[Row]:
    """Yields the objects of a file of JSON lines.

    Raises:
      ValueError: a line is not a JSON object.
    """
    with path.open("rb") as stream:
        for number, line in enumerate(stream, start=1):
            if not line.strip():
                continue
            place = f"{path}, line {number}"
            try:
                fields = json.loads(line.decode("utf-8-sig"))
            except UnicodeDecodeError as error:
                raise ValueError(f"{place}: not UTF-8 text ({error})") from error
            except json.JSONDecodeError as error:
                raise ValueError(f"{place}: not JSON ({error})") from error
            if not isinstance(fields, dict):
                raise ValueError(f"{place}: a JSON object is expected, found {type(fields).__name__}")
            yield place, fields


def parquet(path: str | Path, columns: Columns) -> list[Record]:
    """Reads prompts from Parquet files.

    Args:
      path: a file, a directory of .parquet files, or a pattern such as `data/train-*.parquet`.
      columns: Columns.

    Raises:
      FileNotFoundError: there are no such files.
      ValueError: a file is not in the format, or `records` refuses a row; file and row are named.
    """
    given = Path(path).expanduser()
    if given.is_dir():
        files = sorted(given.glob("*.parquet"))
    else:
        matches = [given] if given.is_file() else map(Path, glob.glob(str(given), recursive=True))
        files = sorted(file for file in matches if file.is_file())
    if not files:
        raise FileNotFoundError(
            f"{given} is no file, no directory with .parquet files in it and no pattern that files match; data.path and "
            "data.heldout_path name Parquet files"
        )
    rows = (row for file in files for row in parquet_rows(file, columns))
    return records(str(given), rows, columns)


def parquet_rows(file: Path, columns: Columns) -> Iterator[Row]:
    """Yields the rows of a Parquet file, with the columns that a record is made of (https://parquet.apache.org).

    Raises:
      ValueError: the file is not in the format or does not have the columns.
    """
    import pyarrow
    from pyarrow import parquet as format_reader

    try:
        with format_reader.ParquetFile(file) as opened:
            names = columns.needed(str(file), opened.schema_arrow.names)
            rows = (row for batch in opened.iter_batches(columns=names) for row in batch.to_pylist())
            yield from ((f"{file}, row {number}", row) for number, row in enumerate(rows, start=1))
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{file} cannot be read as Parquet ({one_line(error)})") from error


def huggingface(path: str, columns: Columns, *, split: str, subset: str = "") -> list[Record]:
    """Reads prompts from one split of a data set in Hugging Face format (https://huggingface.co/docs/datasets/loading).

    Args:
      path: a local directory, written by `save_to_disk` or laid out as on the hub (files whose names hold the split's,
        or a README.md that assigns them), or else the data set's name on the hub, OWNER/NAME.
      columns: Columns.
      split: its name.
      subset: name of the configuration; "": the only or the default one.

    Raises:
      FileNotFoundError: there is no such directory, or the hub did not give a data set of this name.
      ValueError: there is no such split or configuration, the files are not readable, or `records` refuses a row.
    """
    import datasets

    local = Path(path).expanduser()
    if not local.is_dir() and (local.exists() or path.startswith(("/", ".", "~")) or path.count("/") > 1):
        raise FileNotFoundError(
            f"{local} is not a directory; with data.source=huggingface data.path is a directory or a name on the hub, "
            "with data.source=parquet or jsonl it can be a file"
        )
    try:
        if (local / "dataset_dict.json").is_file() or (local / "state.json").is_file():
            saved = datasets.load_from_disk(str(local))
            splits = saved if isinstance(saved, dict) else {str(saved.split or "train"): saved}
            if split not in splits:
                raise ValueError(f'Unknown split "{split}". Should be one of {list(splits)}.')
            table = splits[split]
        elif local.is_dir():
            table = datasets.load_dataset(str(local), subset or None, split=split)
        else:
            ask_hub(path)
            table = datasets.load_dataset(path, subset or None, split=split)
    except Exception as error:  # of datasets, pyarrow, the hub's client or the HTTP library behind it
        generated = isinstance(error, datasets.exceptions.DatasetGenerationError)
        reason = one_line(error.__cause__ if generated and error.__cause__ else error)
        if local.is_dir() or isinstance(error, ValueError):
            raise ValueError(f"{path} (data.path), split {split!r}: {reason}") from error
        raise FileNotFoundError(
            f"{path!r} is no directory here, and the Hugging Face hub did not give it ({reason}); data.path can also "
            "be a local copy: a directory, or with data.source=parquet or jsonl a file"
        ) from error
    place = f"{path}, split {split}"
    names = columns.needed(place, table.column_names)
    rows = ((f"{place}, row {number}", row) for number, row in enumerate(table.select_columns(names), start=1))
    return records(place, rows, columns)


def ask_hub(name: str) -> None:
    """Asks the hub once for a data set that was never fetched; `load_dataset` alone would ask for half a minute.

    Raises:
      Exception: of many kinds; the hub cannot be reached, or has no such data set for this user.
    """
    import huggingface_hub

    offline = huggingface_hub.constants.HF_HUB_OFFLINE
    if not offline and huggingface_hub.try_to_load_from_cache(name, "README.md", repo_type="dataset") is None:
        huggingface_hub.HfApi().dataset_info(name, timeout=10)


def tfds(path: str, columns: Columns, *, split: str, directory: str = "") -> list[Record]:
    """Reads prompts from one split of a prepared TFDS data set (https://www.tensorflow.org/datasets/data_source).

    Args:
      path: its name, NAME, NAME/CONFIG or NAME:VERSION.
      columns: Columns; its features.
      split: its name.
      directory: TFDS's data_dir; "": what TFDS_DATA_DIR says, or ~/tensorflow_datasets.

    Raises:
      FileNotFoundError: the data set is not prepared there; nothing is downloaded.
      ValueError: there is no such split, the files cannot be read at random, or `records` refuses a row.
    """
    import tensorflow_datasets

    where = str(Path(directory).expanduser()) if directory else None
    try:
        builder = tensorflow_datasets.builder(path, data_dir=where)
        prepared = builder.is_prepared()
    except Exception as error:  # of the name, of the files or of the data set's own code
        prepared, reason = False, str(error).strip().partition("\n")[0].rstrip(".")
    else:
        reason = "there are no files of it"
    argument = f", data_dir={where!r}" if where else ""
    advice = f"tensorflow_datasets.builder({path!r}{argument}, file_format='array_record').download_and_prepare()"
    if not prepared:
        raise FileNotFoundError(
            f"the TFDS data set {path!r} (data.path) is not prepared in {where or 'its default directory'} "
            f"(data.directory): {reason}; {advice} prepares it"
        )
    place = f"{path}, split {split}"
    try:
        source = builder.as_data_source(split)
    except ValueError as error:
        raise ValueError(f"{path} (data.path), split {split!r}: {one_line(error)}") from error
    except NotImplementedError as error:
        raise ValueError(
            f"{path} (data.path) is prepared as {builder.info.file_format.value}, which cannot be read at random; "
            f"in another directory, {advice} makes it readable"
        ) from error
    columns.needed(place, builder.info.features)
    rows = ((f"{place}, row {number}", row) for number, row in enumerate(source, start=1))
    return records(place, rows, columns)


def one_line(error: BaseException) -> str:
    """Returns what a library's error says, on one line and shortened; its type where it says nothing."""
    return " ".join(str(error).split())[:300] or type(error).__name__
