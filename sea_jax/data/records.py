"""What a prompt is, whatever source it comes from: rows made into records by the same rules."""

import hashlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypedDict, TypeVar

from absl import logging

from sea_jax.data.conversations import parse_answer, parse_prompt
from sea_jax.data.pairs import parse_pair


class Record(TypedDict):
    """One prompt: a name of its own in its source, a text or `Conversation`, a human answer ("" where there is none)."""

    id: str
    prompt: str
    reference: str


Parsed = TypeVar("Parsed")

Row = tuple[str, Mapping[str, Any]]  # where it stands, for errors; its fields by name


@dataclass(frozen=True)
class Columns:
    """Which fields of a row a record is made of, and what becomes of a row that makes none.

    Attributes:
      prompt: holds the prompt, as of `parse_prompt`; "": it is the beginning of chosen and rejected answers.
      reference: holds the human answer, as of `parse_answer`; "": there are none.
      rejected: holds the answer that was rejected, the reference being the chosen one, as of `parse_pair`; "": there are none.
      id: holds the prompt's name; "": it is a hash of the prompt.
      id_optional: a row without the name takes that hash.
      skip_bad_rows: rows that make no record are left out and counted, rather than refused.
    """

    prompt: str
    reference: str = ""
    rejected: str = ""
    id: str = ""
    id_optional: bool = False
    skip_bad_rows: bool = False

    def among(self, names: Iterable[str]) -> list[str]:
        """Returns which of the named fields a record is made of.

        Raises:
          ValueError: one is not there.
        """
        names = list(names)
        asked = {
            "data.prompt_field": self.prompt,
            "data.reference_field": self.reference,
            "data.rejected_field": self.rejected,
        }
        if not self.id_optional:
            asked["data.id_field"] = self.id
        for name, field in asked.items():
            if field and field not in names:
                raise ValueError(f"no field {field!r} ({name}); there are: {', '.join(map(repr, names)) or 'none'}")
        return [name for name in names if name and name in (self.prompt, self.reference, self.rejected, self.id)]

    def needed(self, origin: str, names: Iterable[str]) -> list[str]:
        """Returns what `among` returns; its error names the origin.

        Raises:
          ValueError: a field is not there.
        """
        return parsed(self.among, names, f"{origin}:")


def records(origin: str, rows: Iterable[Row], columns: Columns) -> list[Record]:
    """Makes records of rows; of rows with the same prompt the first counts.

    Args:
      origin: what the rows are of, for the log and for errors.
      rows: with the fields that the columns name.
      columns: Columns.

    Raises:
      ValueError: a row is not as described or repeats another prompt's id (its place is named), or there is none.
    """
    by_prompt: dict[str, Record] = {}
    place_of_id: dict[str, str] = {}
    first_fault, bad, repeated = "", 0, 0
    for place, fields in rows:
        try:
            record = record_of(fields, columns)
        except ValueError as error:
            first_fault, bad = first_fault or f"{place}: {error}", bad + 1
            continue
        if record["prompt"] in by_prompt:
            repeated += 1
            continue
        if record["id"] in place_of_id:
            raise ValueError(
                f"{place}: the id {record['id']!r} is that of {place_of_id[record['id']]}, whose prompt is another; "
                "data.id_field names the field with an id for each prompt, data.id_field='' makes ids from the prompts"
            )
        place_of_id[record["id"]] = place
        by_prompt[record["prompt"]] = record
    if bad and not columns.skip_bad_rows:
        others = f"; so it is with {bad - 1} more of its rows" if bad > 1 else ""
        raise ValueError(f"{first_fault}{others}. data.skip_bad_rows=True leaves such rows out")
    if bad:
        logging.warning("%s: left out %d rows that hold no usable prompt, the first being %s", origin, bad, first_fault)
    if not by_prompt:
        raise ValueError(
            f"{origin} holds no prompts" + (f" but {bad} bad rows, the first being {first_fault}" * bool(bad))
        )
    logging.info("%s: %d prompts; %d that repeat one are left out", origin, len(by_prompt), repeated)
    return list(by_prompt.values())


def record_of(row: Mapping[str, Any], columns: Columns) -> Record:
    """Returns the record of one row, in which bytes stand for text in UTF-8.

    Raises:
      ValueError: the row does not hold such a record; says why.
    """
    names = columns.among(row)
    fields = {name: row[name].decode() if isinstance(row[name], bytes) else row[name] for name in names}
    if columns.rejected:
        answers = f"the fields {columns.reference!r} and {columns.rejected!r} (data.rejected_field):"
        given = (fields.get(columns.prompt), fields[columns.reference], fields[columns.rejected])
        prompt, reference, _ = parsed(lambda pair: parse_pair(*pair), given, answers)
    else:
        prompt = parsed(parse_prompt, fields[columns.prompt], f"the field {columns.prompt!r} (data.prompt_field)")
        named = f"the field {columns.reference!r} (data.reference_field)"
        reference = parsed(parse_answer, fields.get(columns.reference), named)
    given_id = fields.get(columns.id)
    name = "" if given_id is None else str(given_id)
    for field, text in ((columns.prompt, prompt), (columns.reference, reference), (columns.id, name)):
        parsed(check_characters, text, f"the field {field!r}")
    return {"id": name or digest(prompt)[:16], "prompt": prompt, "reference": reference}


def parsed(parse: Callable[[Any], Parsed], value: Any, what: str) -> Parsed:
    """Returns what a function makes of a value; its ValueError begins with what the value is."""
    try:
        return parse(value)
    except ValueError as error:
        raise ValueError(f"{what} {error}") from error


def check_characters(text: str) -> None:
    """Refuses a text that nothing can write since it holds half of a character.

    Raises:
      ValueError: it does.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"holds half of a character, the surrogate {text[error.start]!r}, at position {error.start}; give the whole "
            "character or none"
        ) from error


def digest(text: str) -> str:
    """Returns the hexadecimal sha256 of a text."""
    return hashlib.sha256(text.encode()).hexdigest()
