"""Where prompts come from: the rows of files and data sets."""

from collections.abc import Callable, Iterator
from pathlib import Path

from sea_jax.data import docstrings as docstring_miner
from sea_jax.data.files import csv_rows, find_files, json_rows, one_line, parquet_rows
from sea_jax.data.records import Columns, Record, Row, digest, records

# The libraries that only one source needs are imported where it reads, so that no other source pays for them.


def docstrings() -> list[Record]:
    """Returns the docstrings of the installed packages as prompts, with their one-sentence summaries as references."""
    return [
        {"id": digest(pair.post)[:16], "prompt": pair.post, "reference": pair.summary}
        for pair in docstring_miner.mine()
    ]


def jsonl(path: str | Path, columns: Columns) -> list[Record]:
    """Reads prompts from files of one JSON object a line, in UTF-8; empty lines are passed over. Raises as `of_files`."""
    return of_files(path, ".jsonl", json_rows, columns)


def csv(path: str | Path, columns: Columns) -> list[Record]:
    """Reads prompts from CSV files in UTF-8 whose first line names the columns. Raises as `of_files`."""
    return of_files(path, ".csv", csv_rows, columns)


def parquet(path: str | Path, columns: Columns) -> list[Record]:
    """Reads prompts from Parquet files. Raises as `of_files`."""
    return of_files(path, ".parquet", parquet_rows, columns)


def of_files(
    path: str | Path, suffix: str, rows_of: Callable[[Path, Columns], Iterator[Row]], columns: Columns
) -> list[Record]:
    """Reads prompts from files of one kind.

    Args:
      path: as of `find_files`.
      suffix: as there.
      rows_of: reads a file.
      columns: Columns.

    Raises:
      FileNotFoundError: there are no such files.
      ValueError: a file is not in the format, or `records` refuses a row; file and line or row are named.
    """
    files = find_files(path, suffix)
    return records(str(Path(path).expanduser()), (row for file in files for row in rows_of(file, columns)), columns)


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
            "with data.source=parquet, csv or jsonl it can be a file"
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
            "be a local copy: a directory, or with data.source=parquet, csv or jsonl a file"
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
