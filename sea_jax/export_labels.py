"""Writes a run's labels as other programs read them: `python -m sea_jax.export_labels --workdir=DIR --format=trl`.

A record per label: "prompt", "chosen", "rejected", "probability" that the chosen one is preferred (as it was learnt from: 1 if
the label is hard), "labeller" ("oracle", "erm" or "cut"), "counted" (was it paid for?), "key" (its name in the ledger).

- trl: JSON Lines, a preference data set of TRL with explicit prompts, which are what the policy reads; conversations where
  data.chat is set.
- argilla: JSON, records of Argilla with the fields prompt, chosen and rejected; the label is a suggestion to the question
  "preference".
- csv: a table with a head.
"""

import argparse
import csv
import io
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from sea_jax.data.conversations import Conversation, messages_of
from sea_jax.data.prompts import DataSettings
from sea_jax.labels import Label, read_labels
from sea_jax.runtime import files
from sea_jax.workdir import saved_settings


def preference(label: Label) -> dict[str, Any]:
    """Returns a label with its responses as chosen and rejected; of a tie, the first one is the chosen."""
    first_wins = label.label >= 0.5
    return {
        "prompt": label.prompt,
        "chosen": label.first if first_wins else label.second,
        "rejected": label.second if first_wins else label.first,
        "probability": label.label if first_wins else 1 - label.label,
        "labeller": label.labeller,
        "counted": label.counted,
        "key": label.key,
    }


def trl(labels: Sequence[Label], data: DataSettings) -> str:
    """Returns labels as TRL's trainers read them (https://huggingface.co/docs/trl/dataset_formats#preference)."""

    def row(label: Label) -> dict[str, Any]:
        plain = preference(label)
        plain["prompt"] = data.template.replace("{prompt}", label.prompt)
        if not data.chat:
            return plain
        asked = messages_of(label.prompt if isinstance(label.prompt, Conversation) else plain["prompt"])
        system = [{"role": "system", "content": data.system}] if data.system and asked[0]["role"] != "system" else []
        turns: dict[str, Any] = {"prompt": [*system, *asked]}
        for name in ("chosen", "rejected"):
            turns[name] = [{"role": "assistant", "content": plain[name]}]
        return plain | turns

    return "".join(json.dumps(row(label), ensure_ascii=False) + "\n" for label in labels)


def argilla(labels: Sequence[Label], data: DataSettings) -> str:
    """Returns labels as records of Argilla (https://docs.argilla.io/latest/how_to_guides/import_export/)."""

    def record(label: Label) -> dict[str, Any]:
        plain = preference(label)
        suggestion = {"value": "chosen", "score": plain["probability"], "agent": plain["labeller"]}
        return {
            "id": plain["key"],
            "fields": {name: plain[name] for name in ("prompt", "chosen", "rejected")},
            "metadata": {name: plain[name] for name in ("probability", "labeller", "key")}
            | {"counted": str(plain["counted"]).lower()},  # metadata are texts and numbers
            "suggestions": {"preference": suggestion},
            "responses": {},
            "vectors": {},
        }

    return json.dumps([record(label) for label in labels], ensure_ascii=False, indent=1) + "\n"


def table(labels: Sequence[Label], data: DataSettings) -> str:
    """Returns labels as comma-separated values (https://www.rfc-editor.org/rfc/rfc4180)."""
    text = io.StringIO()
    names = ["prompt", "chosen", "rejected", "probability", "labeller", "counted", "key"]
    writer = csv.DictWriter(text, names)
    writer.writeheader()
    writer.writerows(preference(label) for label in labels)
    return text.getvalue()


FORMATS: Mapping[str, tuple[Callable[[Sequence[Label], DataSettings], str], str]] = {
    "trl": (trl, "jsonl"),
    "argilla": (argilla, "json"),
    "csv": (table, "csv"),
}


def export(workdir: Path, form: str, output: Path | None = None) -> Path:
    """Writes a run's labels, the oldest first.

    Args:
      workdir: where `train` wrote.
      form: one of FORMATS.
      output: the file; None: labels.jsonl, .json or .csv in the work directory.

    Returns:
      The file.

    Raises:
      ValueError: there is no run, or its prompts are not there any more.
      OSError: the file cannot be written.
    """
    write, ending = FORMATS[form]
    labels, data = read_labels(workdir), saved_settings(workdir).data
    path = output or workdir / f"labels.{ending}"
    files.write_whole(path, write(labels, data))
    paid = sum(label.counted for label in labels)
    print(f"{path}: {len(labels)} labels, {paid} of them paid for")
    return path


def main() -> None:
    """Reads the command line and exports."""
    parser = argparse.ArgumentParser(
        prog="python -m sea_jax.export_labels",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--workdir", type=Path, required=True, help="where the run wrote")
    parser.add_argument("--format", choices=FORMATS, required=True, help="who is to read them")
    parser.add_argument(
        "--output", type=Path, help="the file; default: labels.jsonl, .json or .csv in the work directory"
    )
    arguments = parser.parse_args()
    try:
        export(arguments.workdir, arguments.format, arguments.output)
    except (OSError, ValueError) as error:
        parser.exit(1, f"error: {error}\n")


if __name__ == "__main__":
    main()
