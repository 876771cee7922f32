"""The labels of a run with their texts: read back, exported, encoded for another run. No run is made here."""

import csv
import json
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from configs import tiny_random
from sea_jax import config as configuration
from sea_jax import export_labels, labels
from sea_jax.data.fingerprint import Fingerprint
from sea_jax.data.prompts import load_records
from sea_jax.labels import Label
from sea_jax.oracles.labelling import Question
from sea_jax.oracles.ledger import Ledger
from sea_jax.workdir import claim

# What is said of two responses: by whom, before noise, as it is learnt from.
SAID = [("oracle", 0.25, 1.0), ("erm", 0.3, 0.3), ("cut", 0.0, 0.0), ("oracle", 0.5, 0.5)]
FIRST, SECOND = 'a "first"\none, é', "a second"


def make(workdir: Path, **fields: Any) -> list[str]:
    """A work directory with a ledger; returns the prompts that were asked about."""
    config = tiny_random.get_config()
    config.update_from_flattened_dict({name.replace("__", "."): value for name, value in fields.items()})
    settings = configuration.resolve(config)
    claim(workdir, settings, "0" * 16, Fingerprint(0, "", "", [], [], ""), datetime.now())
    records = load_records(settings.data)[0][: len(SAID)]
    with Ledger(workdir / "queries.jsonl") as ledger:
        for step, (record, (labeller, probability, label)) in enumerate(zip(records, SAID, strict=True)):
            given = None if labeller == "oracle" else label
            about = record["id"], record["prompt"], FIRST, SECOND, given
            entry = Question(f"{step}-0", step, *about, cut=labeller == "cut").entry()
            if labeller == "oracle":
                ledger.ask([entry])
            told = {"probability": probability, "label": label, "counted": labeller == "oracle"}
            ledger.record([entry | told])
    return [record["prompt"] for record in records]


ROWS = [  # chosen, rejected, probability, labeller, counted
    (FIRST, SECOND, 1.0, "oracle", True),
    (SECOND, FIRST, 0.7, "erm", False),
    (SECOND, FIRST, 1.0, "cut", False),
    (FIRST, SECOND, 0.5, "oracle", True),
]


def test_a_ledger_is_read_back_with_its_prompts(tmp_path: Path) -> None:
    prompts = make(tmp_path / "run")
    found = labels.read_labels(tmp_path / "run")
    assert [label.prompt for label in found] == prompts
    assert [(label.labeller, label.probability, label.label) for label in found] == SAID
    assert [label.counted for label in found] == [True, False, False, True]


def without_data(workdir: Path) -> str:
    config = json.loads((workdir / "config.json").read_text())
    other = workdir / "others.jsonl"
    other.write_text("".join(json.dumps({"prompt": f"Other {i}?", "reference": "x"}) + "\n" for i in range(40)))
    config["data"]["path"] = str(other)
    (workdir / "config.json").write_text(json.dumps(config))
    return r"the prompt .* of the label 0-0 is not in data.source=jsonl, data.path=.*others.jsonl"


def without_ledger(workdir: Path) -> str:
    (workdir / "queries.jsonl").unlink()
    return r"run holds no queries.jsonl"


@pytest.mark.parametrize("damage", [without_data, without_ledger])
def test_labels_without_their_texts_are_refused(damage: Callable[[Path], str], tmp_path: Path) -> None:
    make(tmp_path / "run")
    with pytest.raises(ValueError, match=damage(tmp_path / "run")):
        labels.read_labels(tmp_path / "run")


def test_trl_and_datasets_read_what_is_exported_for_them(tmp_path: Path) -> None:
    datasets, trl = pytest.importorskip("datasets"), pytest.importorskip("trl")
    prompts = make(tmp_path / "run")
    path = export_labels.export(tmp_path / "run", "trl")
    read = datasets.load_dataset("json", data_files=str(path), split="train", cache_dir=str(tmp_path / "cache"))
    found = [tuple(row[name] for name in ("chosen", "rejected", "probability", "labeller", "counted")) for row in read]
    assert found == ROWS
    assert read["prompt"][:] == [f"Q: {prompt} A:" for prompt in prompts]
    assert read["key"][:] == ["0-0", "1-0", "2-0", "3-0"]
    assert not trl.is_conversational(read[0])
    make(tmp_path / "chat", data__chat=True, data__system="Be kind.")
    path = export_labels.export(tmp_path / "chat", "trl", tmp_path / "chat.jsonl")
    (row, *_) = datasets.load_dataset("json", data_files=str(path), split="train", cache_dir=str(tmp_path / "cache"))
    assert trl.is_conversational(row)
    assert row["prompt"] == [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": f"Q: {prompts[0]} A:"},
    ]
    assert row["chosen"] == [{"role": "assistant", "content": FIRST}]
    assert row["rejected"] == [{"role": "assistant", "content": SECOND}]


def test_what_is_exported_as_a_table_and_for_argilla(tmp_path: Path) -> None:
    prompts = make(tmp_path / "run")
    with export_labels.export(tmp_path / "run", "csv").open(newline="", encoding="utf-8") as file:
        table = list(csv.DictReader(file))
    assert [row["prompt"] for row in table] == prompts
    columns = ("chosen", "rejected", "probability", "labeller", "counted")
    assert [tuple(row[name] for name in columns) for row in table] == [
        (*texts, str(p), who, str(counted)) for *texts, p, who, counted in ROWS
    ]
    records = json.loads(export_labels.export(tmp_path / "run", "argilla").read_text())
    assert records[1] == {
        "id": "1-0",
        "fields": {"prompt": prompts[1], "chosen": SECOND, "rejected": FIRST},
        "metadata": {"probability": 0.7, "labeller": "erm", "key": "1-0", "counted": "false"},
        "suggestions": {"preference": {"value": "chosen", "score": 0.7, "agent": "erm"}},
        "responses": {},
        "vectors": {},
    }


def test_the_command_line_exports_or_says_why_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    make(tmp_path / "run")
    argv = ["export_labels", "--format=csv", f"--output={tmp_path / 'x.csv'}", f"--workdir={tmp_path}/"]
    monkeypatch.setattr("sys.argv", [*argv[:-1], f"{argv[-1]}run"])
    export_labels.main()
    assert "x.csv: 4 labels, 2 of them paid for" in capsys.readouterr().out
    monkeypatch.setattr("sys.argv", [*argv[:-1], f"{argv[-1]}none"])
    with pytest.raises(SystemExit) as ended:
        export_labels.main()
    assert ended.value.code == 1
    assert "none is no directory" in capsys.readouterr().err


def test_pairs_are_encoded_as_they_would_have_been_sampled(byte_tokenizer: Any) -> None:
    settings = configuration.resolve(tiny_random.get_config())
    pairs = [Label(str(i), "id", f"p{i}", "ab", "abcdefgh", i / 4, 0.5, "oracle", True, False) for i in range(5)]
    batches = list(labels.batches(pairs, byte_tokenizer, settings.data, max_new_tokens=6))
    assert [counts.tolist() for *_, counts in batches] == [[True] * 4, [True, False, False, False]]
    batch, candidates, texts, values, _ = batches[0]
    short, long = byte_tokenizer.encode("ab"), byte_tokenizer.encode("abcdefgh")
    assert candidates.lengths.tolist() == [[3, 6]] * 4
    assert candidates.tokens[0, 0, :3].tolist() == [*short, byte_tokenizer.eos_id]
    assert candidates.tokens[0, 1].tolist() == long[:6]
    assert texts == [["ab", "abcdefgh"]] * 4
    assert values.tolist() == [0.0, 0.25, 0.5, 0.75]
    assert np.asarray(batch["tokens"])[2][np.asarray(batch["valid"])[2]].tolist() == byte_tokenizer.encode("Q: p2 A:")
