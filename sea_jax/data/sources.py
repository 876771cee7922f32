"""Where prompts come from: the rows of files and data sets, all made into records by the same rules."""

import glob
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypedDict

from absl import logging

from sea_jax.data import docstrings as docstring_miner

# The libraries that only one source needs are imported where it reads, so that no other source pays for them.


class Record(TypedDict):
    """One prompt: a name that is unique in its source, the text, and a human answer ("" where there is none)."""

    id: str
    prompt: str
    reference: str


Row = tuple[str, Mapping[str, Any]]  # where it stands, for errors; its fields by name


def docstrings() -> list[Record]:
    """Returns the docstrings of the installed packages as prompts, with their one-sentence summaries as references."""
    return [
        {"id": digest(pair.post)[:16], "prompt": pair.post, "reference": pair.summary}
        for pair in docstring_miner.mine()
    ]


def jsonl(path: str | Path, prompt_field: str, reference_field: str = "") -> list[Record]:
    """Reads prompts from a file of one JSON object a line, in UTF-8; empty lines are passed over.

    Args:
      path: of the file.
      prompt_field, reference_field: as in `records`.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: a line is no JSON object, or `records` refuses it; file and line are named.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not a file; data.path and data.heldout_path name files of JSON lines")
    return records(str(path), json_rows(path), prompt_field, reference_field)


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


def parquet(path: str | Path, prompt_field: str, reference_field: str = "") -> list[Record]:
    """Reads prompts from Parquet files.

    Args:
      path: a file, a directory of .parquet files, or a pattern such as `data/train-*.parquet`.
      prompt_field, reference_field: names of columns, as in `records`.

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
    rows = (row for file in files for row in parquet_rows(file, prompt_field, reference_field))
    return records(str(given), rows, prompt_field, reference_field)


def parquet_rows(file: Path, prompt_field: str, reference_field: str) -> Iterator[Row]:
    """Yields the rows of a Parquet file, with the columns that a record is made of (https://parquet.apache.org).

    Raises:
      ValueError: the file is not in the format or does not have the columns.
    """
    import pyarrow
    from pyarrow import parquet as format_reader

    try:
        with format_reader.ParquetFile(file) as opened:
            names = needed(str(file), opened.schema_arrow.names, prompt_field, reference_field)
            rows = (row for batch in opened.iter_batches(columns=names) for row in batch.to_pylist())
            yield from ((f"{file}, row {number}", row) for number, row in enumerate(rows, start=1))
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{file} cannot be read as Parquet ({one_line(error)})") from error


def huggingface(
    path: str, prompt_field: str, reference_field: str = "", *, split: str, subset: str = ""
) -> list[Record]:
    """Reads prompts from one split of a data set in Hugging Face format (https://huggingface.co/docs/datasets/loading).

    Args:
      path: a local directory, written by `save_to_disk` or laid out as on the hub (files whose names hold the split's,
        or a README.md that assigns them), or else the data set's name on the hub, OWNER/NAME.
      prompt_field, reference_field: names of columns, as in `records`.
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
    names = needed(place, table.column_names, prompt_field, reference_field)
    rows = ((f"{place}, row {number}", row) for number, row in enumerate(table.select_columns(names), start=1))
    return records(place, rows, prompt_field, reference_field)


def ask_hub(name: str) -> None:
    """Asks the hub once for a data set that was never fetched; `load_dataset` alone would ask for half a minute.

    Raises:
      Exception: of many kinds; the hub cannot be reached, or has no such data set for this user.
    """
    import huggingface_hub

    offline = huggingface_hub.constants.HF_HUB_OFFLINE
    if not offline and huggingface_hub.try_to_load_from_cache(name, "README.md", repo_type="dataset") is None:
        huggingface_hub.HfApi().dataset_info(name, timeout=10)


def tfds(path: str, prompt_field: str, reference_field: str = "", *, split: str, directory: str = "") -> list[Record]:
    """Reads prompts from one split of a prepared TFDS data set (https://www.tensorflow.org/datasets/data_source).

    Args:
      path: its name, NAME, NAME/CONFIG or NAME:VERSION.
      prompt_field, reference_field: names of its features, as in `records`.
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
    needed(place, builder.info.features, prompt_field, reference_field)
    rows = ((f"{place}, row {number}", row) for number, row in enumerate(source, start=1))
    return records(place, rows, prompt_field, reference_field)


def records(origin: str, rows: Iterable[Row], prompt_field: str, reference_field: str) -> list[Record]:
    """Makes records of rows; of rows with the same prompt the first counts.

    Args:
      origin: what the rows are of, for the log and for errors.
      rows: may carry an "id"; the default is a hash of the prompt.
      prompt_field: name of the field with the prompt, a text that is not empty.
      reference_field: name of the field with the human answer, a text or null; "": there are none.

    Raises:
      ValueError: a row is not as described or repeats another prompt's id (its place is named), or there is none.
    """
    by_prompt: dict[str, Record] = {}
    place_of_id: dict[str, str] = {}
    repeated = 0
    for place, fields in rows:
        try:
            record = record_of(fields, prompt_field, reference_field)
        except ValueError as error:
            raise ValueError(f"{place}: {error}") from error
        if record["prompt"] in by_prompt:
            repeated += 1
            continue
        if record["id"] in place_of_id:
            raise ValueError(
                f"{place}: the id {record['id']!r} is that of {place_of_id[record['id']]}, whose prompt is another"
            )
        place_of_id[record["id"]] = place
        by_prompt[record["prompt"]] = record
    if not by_prompt:
        raise ValueError(f"{origin} holds no prompts")
    logging.info("%s: %d prompts; %d that repeat one are left out", origin, len(by_prompt), repeated)
    return list(by_prompt.values())


def record_of(row: Mapping[str, Any], prompt_field: str, reference_field: str) -> Record:
    """Returns the record of one row, in which bytes stand for text in UTF-8; the fields' names are as in `records`.

    Raises:
      ValueError: the row does not hold such a record; says why.
    """
    names = fields_of_record(row, prompt_field, reference_field)
    fields = {name: row[name].decode() if isinstance(row[name], bytes) else row[name] for name in names}
    prompt = fields[prompt_field]
    if not isinstance(prompt, str) or not prompt.strip():
        raise ValueError(f"the field {prompt_field!r} (data.prompt_field) is {prompt!r:.60}; a text is expected")
    reference = fields[reference_field] if reference_field else ""
    if not isinstance(reference, str | None):
        raise ValueError(
            f"the field {reference_field!r} (data.reference_field) is {reference!r:.60}; a text is expected"
        )
    given_id, default_id = fields.get("id"), digest(prompt)[:16]
    return {
        "id": default_id if given_id is None else str(given_id),
        "prompt": prompt,
        "reference": reference or "",
    }


def fields_of_record(names: Iterable[str], prompt_field: str, reference_field: str) -> list[str]:
    """Returns which of the named fields a record is made of; `prompt_field` and `reference_field` are as in `records`.

    Raises:
      ValueError: one is not there.
    """
    names = list(names)
    for name, field in (("data.prompt_field", prompt_field), ("data.reference_field", reference_field)):
        if field and field not in names:
            raise ValueError(f"no field {field!r} ({name}); there are: {', '.join(map(repr, names)) or 'none'}")
    return [name for name in names if name in (prompt_field, reference_field, "id")]


def needed(origin: str, names: Iterable[str], prompt_field: str, reference_field: str) -> list[str]:
    """Returns what `fields_of_record` returns; its error names the origin.

    Raises:
      ValueError: a field is not there.
    """
    try:
        return fields_of_record(names, prompt_field, reference_field)
    except ValueError as error:
        raise ValueError(f"{origin}: {error}") from error


def one_line(error: BaseException) -> str:
    """Returns what a library's error says, on one line and shortened; its type where it says nothing."""
    return " ".join(str(error).split())[:300] or type(error).__name__


def digest(text: str) -> str:
    """Returns the hexadecimal sha256 of a text."""
    return hashlib.sha256(text.encode()).hexdigest()
