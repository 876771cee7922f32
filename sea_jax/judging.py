"""Several judges on the pairs that a run's oracle was asked about: `python -m sea_jax.evaluate --judges=...`."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sea_jax import agreement
from sea_jax.agreement import Opinion, Pairs
from sea_jax.config import RunSettings, editable, unchecked
from sea_jax.data.prompts import load_records
from sea_jax.labels import Label, read_labels
from sea_jax.oracles import oracle
from sea_jax.oracles.oracle import BY_REWARD, JudgeSettings, PreferenceSettings
from sea_jax.preflight import check_judge, check_reward_model
from sea_jax.settings import faults
from sea_jax.types import Preference
from sea_jax.workdir import beginning

RECORDED, ORACLE, JUDGE = "recorded", "oracle", "judge"  # the labels as they were given; whom the run's settings name
NEXT = re.compile(r",(?=[a-z_.]+=)")  # between two fields of a judge, whose values may have commas
WANTED = f"{RECORDED}, {ORACLE}, {JUDGE}, or NAME:FIELD=VALUE,FIELD=VALUE with fields of eval.judge"


def read_judges(specs: Sequence[str], run: RunSettings) -> dict[str, PreferenceSettings | None]:
    """Returns the settings of judges by their names; None: nobody is asked, the labels stand in the ledger.

    Args:
      specs: of the command line, each one as WANTED says.
      run: settings of the run whose pairs they are shown.

    Raises:
      ValueError: one of them is no judge.
    """
    known: dict[str, PreferenceSettings | None] = {RECORDED: None, ORACLE: run.oracle, JUDGE: run.eval.judge}
    found: dict[str, PreferenceSettings | None] = {}
    for spec in specs:
        name, colon, fields = spec.partition(":")
        if name in found:
            raise ValueError(f"--judges={spec}: there is another judge {name}; give each a name of its own")
        if not colon and name not in known:
            raise ValueError(f"--judges={spec}: must be {WANTED}")
        if name == JUDGE and not colon and not run.eval.judge.kind:
            raise ValueError(
                f"--judges={spec}: the run has no judge, its eval.judge.kind is empty; name one with its fields"
            )
        found[name] = _with_fields(spec, fields) if colon else known[name]
    return found


def _with_fields(spec: str, fields: str) -> JudgeSettings:
    """The settings of a judge of the command line."""
    config = editable(RunSettings())
    for field in NEXT.split(fields):
        name, _, value = field.partition("=")
        try:
            default = _value(config.eval.judge, name)
        except KeyError:
            raise ValueError(f"--judges={spec}: {name!r} is no field of eval.judge; give {WANTED}") from None
        try:
            config.update_from_flattened_dict({f"eval.judge.{name}": _as(type(default), value)})
        except (TypeError, ValueError) as error:
            raise ValueError(f"--judges={spec}: {name}={value!r}: {error}") from error
    judge: JudgeSettings = unchecked(config).eval.judge  # type: ignore[union-attr, assignment]
    if not judge.kind:
        raise ValueError(f"--judges={spec}: kind is missing; give {WANTED}")
    return judge


def _value(part: Any, name: str) -> Any:
    for field in name.split("."):
        if field not in part:
            raise KeyError(name)
        part = part[field]
    return part


def _as(kind: type, text: str) -> Any:
    """A value of a field's kind."""
    if kind is not bool:
        return kind(text)
    if text.lower() not in ("true", "false"):
        raise ValueError("must be True or False")
    return text.lower() == "true"


def compare_judges(workdir: Path, run: RunSettings, specs: Sequence[str], num_pairs: int | None) -> str:
    """Asks judges about the pairs whose labels a run has paid for, and returns how far they agree, as Markdown tables.

    Args:
      workdir: where `train` wrote; what chat models answer and cost is kept there.
      run: its settings.
      specs: of the judges.
      num_pairs: the oldest so many; None: all.

    Raises:
      ValueError: a judge cannot be asked, or there are no pairs; nobody has been asked then.
      OSError: a judge does not answer.
    """
    judges = read_judges(specs, run)
    for name, settings in judges.items():
        if settings is not None:
            _check(name, settings)
    labels = [label for label in read_labels(workdir) if label.counted][:num_pairs]
    if not labels:
        raise ValueError(
            f"{workdir / 'queries.jsonl'} holds no label of an oracle: there are no pairs to show to judges"
        )
    pairs = Pairs(
        prompts=[label.prompt for label in labels],
        first=[label.first for label in labels],
        second=[label.second for label in labels],
        swapped=np.array([label.swapped for label in labels], bool),
    )
    tastes = {name: _taste(name, settings, run, workdir) for name, settings in judges.items() if settings is not None}
    opinions = {
        name: agreement.opinion(tastes[name], pairs) if name in tastes else _recorded(labels, run) for name in judges
    }
    return agreement.table(opinions, pairs.swapped)


def _check(name: str, settings: PreferenceSettings) -> None:
    """Refuses a judge that cannot be asked, by its name."""
    if found := [*faults(settings, f"{_field(name)}."), *settings.faults_of(_field(name))]:
        raise ValueError("\n".join(found))
    check_judge(settings, _field(name))
    check_reward_model(settings, _field(name))


def _field(name: str) -> str:
    return {ORACLE: "oracle", JUDGE: "eval.judge"}.get(name, f"judges.{name}")


def _taste(name: str, settings: PreferenceSettings, run: RunSettings, workdir: Path) -> Preference:
    references: Mapping[str, str] = {}
    if settings.reads_references:
        records = (record for some in load_records(run.data) for record in some)
        references = {record["prompt"]: text for record in records if (text := record["reference"].strip())}
    return oracle.preference(
        settings,
        run.bridge_token_file,
        beginning(workdir),
        field=_field(name),
        references=references,
        workdir=workdir,
    )


def _recorded(labels: Sequence[Label], run: RunSettings) -> Opinion:
    """What the run was told."""
    return Opinion(np.array([label.label for label in labels]), by_place=run.oracle.kind not in BY_REWARD)
