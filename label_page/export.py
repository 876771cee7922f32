"""Writes what people said for other programs: `python -m label_page.export --workdir=DIR --format=argilla --output=FILE`.

- jsonl: an object a line and answer: "name" of the ask, "prompt", "left", "right", "person", "verdict", "label" that left wins
  (null: skipped), "reason", "seconds".
- argilla: JSON, records with the fields prompt, left and right, and a response to the question "preference" by each person.
- label_studio: JSON, tasks with the same data, and an annotation by each person of the choices "verdict" about "prompt".

--without=anna,ben leaves these people's answers out. Checks are not written.
"""

import argparse
import json
import os
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from label_page.records import Record, read_records
from label_page.store import SKIP

PEOPLE = uuid.UUID(
    "6f1b6a3e-5b0e-4f5e-9d53-0d3a2f0f9a11"
)  # a name within it gives the same person the same id everywhere


def jsonl(records: Sequence[Record]) -> str:
    """Returns every answer as an object of its own."""
    lines = [
        {"name": record.name, **_texts(record), "person": person, **vars(said)}
        for record in records
        for person, said in record.said.items()
    ]
    return "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)


def argilla(records: Sequence[Record]) -> str:
    """Returns records of Argilla (https://docs.argilla.io/latest/how_to_guides/import_export/)."""

    def one(record: Record) -> dict[str, Any]:
        responses = [
            {"value": said.verdict, "user_id": str(uuid.uuid5(PEOPLE, person))}
            for person, said in record.said.items()
            if said.verdict != SKIP
        ]
        return {
            "id": record.name,
            "fields": _texts(record),
            "metadata": {"people": ", ".join(record.said)},
            "suggestions": {},
            "responses": {"preference": responses},
            "vectors": {},
        }

    return _json([one(record) for record in records])


def label_studio(records: Sequence[Record]) -> str:
    """Returns tasks of Label Studio (https://labelstud.io/guide/tasks#Basic-Label-Studio-JSON-format)."""

    def one(record: Record) -> dict[str, Any]:
        annotations = [
            {
                "lead_time": said.seconds,
                "was_cancelled": said.verdict == SKIP,
                "result": [
                    {
                        "from_name": "verdict",
                        "to_name": "prompt",
                        "type": "choices",
                        "value": {"choices": [said.verdict]},
                    }
                ],
            }
            for said in record.said.values()
        ]
        data = {"name": record.name, **_texts(record), "people": ", ".join(record.said)}
        return {"data": data, "annotations": annotations}

    return _json([one(record) for record in records])


def _texts(record: Record) -> dict[str, str]:
    return {"prompt": record.prompt, "left": record.left, "right": record.right}


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, indent=1) + "\n"


FORMATS: Mapping[str, Callable[[Sequence[Record]], str]] = {
    "jsonl": jsonl,
    "argilla": argilla,
    "label_studio": label_studio,
}


def export(workdir: Path, form: str, output: Path, without: Sequence[str] = ()) -> int:
    """Writes the pairs that somebody said something of, what was asked first first; returns how many there are.

    Args:
      workdir: of the run.
      form: one of FORMATS.
      output: the file.
      without: people whose answers are left out.

    Raises:
      ValueError: people were asked nothing there, or nobody of such a name was.
      OSError: the file cannot be written.
    """
    records = [record for record in read_records(workdir, without) if record.said and record.known is None]
    unfinished = output.with_name(f"{output.name}.unfinished")
    unfinished.write_text(FORMATS[form](records), encoding="utf-8")
    os.replace(unfinished, output)
    return len(records)


def main() -> None:
    """Reads the command line and exports."""
    parser = argparse.ArgumentParser(
        prog="python -m label_page.export", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workdir", type=Path, required=True, help="of the run")
    parser.add_argument("--format", choices=FORMATS, required=True, help="who is to read it")
    parser.add_argument("--output", type=Path, required=True, help="the file")
    parser.add_argument("--without", default="", help="names of people, separated by commas")
    arguments = parser.parse_args()
    try:
        without = [name for name in arguments.without.split(",") if name]
        pairs = export(arguments.workdir, arguments.format, arguments.output, without)
    except (OSError, ValueError) as error:
        parser.exit(1, f"error: {error}\n")
    print(f"{arguments.output}: {pairs} pairs")


if __name__ == "__main__":
    main()
