"""A run's work directory: whose it is, what it holds."""

import dataclasses
import json
from collections.abc import Collection, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

import jax
from absl import logging

from sea_jax import config as configuration
from sea_jax.config import RunSettings
from sea_jax.data.fingerprint import PROMPTS_FILE, Fingerprint, other_heldout, other_training, otherwise_read
from sea_jax.models.checkpoints import hf
from sea_jax.oracles import judge
from sea_jax.oracles.ledger import Ledger
from sea_jax.policy import FINGERPRINT_FILE
from sea_jax.runtime import files, processes
from sea_jax.settings import walk

MODELS_FILE = "models_id"


def saved_settings(workdir: Path) -> RunSettings:
    """Returns the settings that a run left in its work directory.

    Args:
      workdir: where `train` wrote.

    Raises:
      ValueError: there are none, or they are not those of this version or an older one.
    """
    return configuration.from_json(_saved(workdir), str(workdir / "config.json"))


def _saved(workdir: Path) -> Mapping[str, Any]:
    """What a run's config.json holds."""
    path = workdir / "config.json"
    if not path.is_file():
        found = "holds no config.json" if workdir.is_dir() else "is no directory"
        raise ValueError(f"--workdir={workdir} {found}; name one that `python -m sea_jax.train` wrote to")
    try:
        saved = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON ({error})") from error
    if not isinstance(saved, Mapping):
        raise ValueError(f"{path} holds a {type(saved).__name__}; a JSON object is needed")
    return saved


def as_begun(settings: RunSettings, workdir: Path) -> RunSettings:
    """Returns settings with which a run that an older version began goes on as it was.

    What there was no setting for then, and is left at its default now, is what that version did.

    Args:
      settings: this run's.
      workdir: where everything is written.
    """
    if not (workdir / "config.json").exists():
        return settings
    there = configuration.flatten(_saved(workdir))
    then = {name: value for name, _, value in walk(saved_settings(workdir)) if name not in there}
    changes = {
        name: then[name]
        for name, field, value in walk(settings)
        if name in then and value == field.default != then[name]
    }
    for name, value in changes.items():
        logging.info("config.%s=%r, as when this run was begun", name, value)
    return configuration.changed(settings, changes)


def check_workdir(workdir: Path, settings: RunSettings, allowed: Collection[str] = ()) -> None:
    """Refuses a work directory that other settings made.

    Args:
      workdir: where everything is written.
      settings: this run's.
      allowed: names of settings that may be other ones.

    Raises:
      ValueError: the work directory is another configuration's, or nobody can tell whose, or is a file.
    """
    there = (workdir / "config.json").exists()
    if workdir.exists() and not workdir.is_dir():
        raise ValueError(f"--workdir={workdir} is a file; name a directory")
    if not there and any((workdir / name).exists() for name in ("checkpoints", "queries.jsonl")):
        raise ValueError(
            f"--workdir={workdir} holds a run but no config.json to compare with; name another directory, or put it back"
        )
    then = configuration.located(saved_settings(workdir)) if there else settings
    if differing := configuration.differences(settings, then, [*allowed, *_fingerprints(workdir)]):
        raise ValueError(
            f"--workdir={workdir} belongs to another configuration; name another directory, or what may change in "
            "--allow_changed=NAME,NAME, or set:\n" + "\n".join(differing)
        )


def _fingerprints(workdir: Path) -> dict[str, str]:
    """By the name of a place, what tells that which a run found there from others; what is not on record is left out.

    What lies in those of "" is looked at by somebody else.
    """
    path = workdir / MODELS_FILE
    found = json.loads(path.read_text()) if path.exists() else {}
    prompts = dict.fromkeys(configuration.DATA_PLACES, "") if (workdir / PROMPTS_FILE).exists() else {}
    return found | prompts | ({"policy.source": ""} if (workdir / FINGERPRINT_FILE).exists() else {})


def _others(workdir: Path, found: Mapping[str, str]) -> list[str]:
    """The places in which something else was found than there was when the run began."""
    known = _fingerprints(workdir)
    return [name for name in found if known.get(name, found[name]) != found[name]]


def model_fingerprints(settings: RunSettings) -> dict[str, str]:
    """Returns what tells the models of a run from others, by the setting that names them; the policy's stands by itself."""
    found: dict[str, str] = {}
    if settings.erm.trunk:
        found["erm.trunk"] = hf.fingerprint(settings.erm.trunk)
    if settings.oracle.kind == "embedding":
        found["oracle.encoder"] = hf.fingerprint(settings.oracle.encoder)
    if settings.oracle.kind in ("reward_model", "remote"):
        served = settings.oracle.kind == "remote"
        found["oracle.reward_model"] = hf.fingerprint(settings.oracle.reward_model, weights=not served)
    if settings.oracle.kind == "judge" and settings.oracle.judge.template:
        found["oracle.judge.template"] = judge.template_fingerprint(settings.oracle.judge, "oracle.judge")
    return found


def check_models(workdir: Path, settings: RunSettings, found: Mapping[str, str], allowed: Collection[str] = ()) -> None:
    """Refuses other models in other places than a run began with.

    Args:
      workdir: where everything is written.
      settings: this run's.
      found: from `model_fingerprints`.
      allowed: names of settings that may be other ones.

    Raises:
      ValueError: something else lies there.
    """
    if not (workdir / "config.json").exists():
        return
    moved = configuration.changes(settings, configuration.located(saved_settings(workdir)))
    others = _others(workdir, found)
    told = [
        f"config.{name}: what lies in {moved[name][1]} is not what lay in {moved[name][0]}"
        for name in moved
        if name in others and name not in allowed
    ]
    if (name := "oracle.judge.template") in {*others} - {*moved} - {*allowed}:  # which people edit where it lies
        told.append(f"config.{name}: {settings.oracle.judge.template} is not what it was")
    if told:
        raise ValueError(
            f"--workdir={workdir} began with other models; put them back, or start anew with another --workdir:\n"
            + "\n".join(told)
        )


def claim(workdir: Path, settings: RunSettings, fingerprint: str, prompts: Fingerprint, began: datetime) -> None:
    """Makes the work directory and leaves what tells the policy and the prompts from others in it, and the settings if new.

    Args:
      workdir: where everything is written.
      settings: this run's.
      fingerprint: of the policy.
      prompts: of the prompts.
      began: when the run did.
    """
    workdir.mkdir(parents=True, exist_ok=True)
    content = {"began": began.isoformat(), **dataclasses.asdict(prompts)}
    files.write_whole(workdir / PROMPTS_FILE, json.dumps(content) + "\n")
    files.write_whole(workdir / FINGERPRINT_FILE, fingerprint + "\n")
    if not (workdir / "config.json").exists():
        files.write_whole(workdir / "config.json", configuration.to_json(settings))


def renew(workdir: Path, settings: RunSettings, found: Mapping[str, str], ledger: Ledger) -> None:
    """Leaves the settings that a run goes on with; what of them changes its numbers is on record in the ledger before.

    Args:
      workdir: where everything is written.
      settings: this run's, which `check_workdir` lets through.
      found: from `model_fingerprints`, which `check_models` lets through.
      ledger: of the work directory, open, so that no other run writes there.
    """
    then, others = configuration.located(saved_settings(workdir)), _others(workdir, found)
    same = {*configuration.MODEL_PLACES, *configuration.DATA_PLACES} - {*others}
    changed = {name: list(values) for name, values in configuration.changes(settings, then).items() if name not in same}
    for name, (before, after) in changed.items():
        logging.warning("goes on with config.%s=%r, which was %r", name, after, before)
    if changed:
        ledger.note("settings", {"changed": changed})
    files.write_whole(workdir / MODELS_FILE, json.dumps(found) + "\n")
    files.write_whole(workdir / "config.json", configuration.to_json(settings))


def beginning(workdir: Path) -> datetime:
    """Returns when the run of a work directory began, by the first process's clock; now where nothing says so."""
    own = prompts_then(workdir)
    told = processes.bytes_of_first((datetime.now().astimezone() if own is None else own[0]).isoformat().encode())
    return datetime.fromisoformat(told.decode())


def check_prompts(workdir: Path, now: Fingerprint, training: bool) -> None:
    """Refuses prompts, a tokenizer or a chat template that a work directory's run did not begin with; no file tells nothing.

    Args:
      workdir: where `train` wrote.
      now: of what was read.
      training: False: other held-out prompts are only warned of, and those to train on are not looked at.

    Raises:
      ValueError: they are others.
    """
    known = prompts_then(workdir)
    if known is None:
        return
    then, remedy = known[1], "put back what there was, or start anew with another --workdir"
    heldout = other_heldout(then, now)
    if training and (faults := [fault for fault in (other_training(then, now), heldout) if fault]):
        raise ValueError(
            f"config.data: the prompts are not those that the run in {workdir} began with: {'; '.join(faults)}; {remedy}"
        )
    if otherwise_read(then, now):
        raise ValueError(
            "config.policy.source: its tokenizer or chat template reads the same prompts as other tokens than when the run "
            f"in {workdir} began; {remedy}"
        )
    if heldout:
        logging.warning(
            "%s: %s than when the run began; do not compare these win rates with those that it logged", workdir, heldout
        )


def prompts_then(workdir: Path) -> tuple[datetime, Fingerprint] | None:
    """Returns when a work directory's run began, and the fingerprint of its prompts; None where nothing tells of them.

    Raises:
      ValueError: the file is damaged.
    """
    path = workdir / PROMPTS_FILE
    if not path.exists():
        return None
    try:
        content = json.loads(path.read_text())
        return datetime.fromisoformat(content.pop("began")), Fingerprint(**content)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(
            f"{path} is damaged ({error}); restore it, or delete it if the prompts are the same"
        ) from error


def open_ledger(path: Path) -> Ledger:
    """Opens the ledger in every process, the first to write; returns when all have read what it holds.

    Args:
      path: the file, or where it will be.

    Returns:
      Ledger.

    Raises:
      ValueError: the processes see different files, or another process cannot open its own.
    """
    ledger = processes.together(lambda: Ledger(path, writes=processes.is_first()), "the ledger")
    lines = len(ledger.lines())
    if processes.any_of(lines != processes.of_first(lines)):
        raise ValueError(
            f"--workdir={path.parent} must be a directory that all processes share: {path.name} holds {lines} labels for "
            f"process {jax.process_index()} and another number for others"
        )
    return ledger


def own_directory(workdir: Path) -> Path:
    """Returns where this process writes its numbers: the work directory for the first, one of its own inside it for others."""
    return workdir if processes.is_first() else workdir / f"process-{jax.process_index()}"
