"""A run's work directory: whose it is, what it holds."""

import json
from collections.abc import Mapping
from pathlib import Path

import jax
import ml_collections

from sea_jax import config as configuration
from sea_jax.oracles.ledger import Ledger
from sea_jax.policy import FINGERPRINT_FILE
from sea_jax.runtime import files, processes


def saved_configuration(workdir: Path) -> ml_collections.ConfigDict:
    """Returns the configuration that a run left in its work directory.

    Args:
      workdir: where `train` wrote.

    Returns:
      A locked ConfigDict.

    Raises:
      ValueError: there is none, or it is not one of this version.
    """
    path = workdir / "config.json"
    if not path.is_file():
        found = "holds no config.json" if workdir.is_dir() else "is no directory"
        raise ValueError(f"--workdir={workdir} {found}; name one that `python -m sea_jax.train` wrote to")
    try:
        saved = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON ({error})") from error
    config = configuration.default()
    if not isinstance(saved, Mapping):
        raise ValueError(f"{path} holds a {type(saved).__name__}; a JSON object is needed")
    known, found_fields = configuration.flatten(config.to_dict()), configuration.flatten(saved)
    faults = [f"config.{name}: not a field of this version" for name in found_fields if name not in known]
    faults += [
        f"config.{name}: missing there; the default is {json.dumps(known[name])}"
        for name in known
        if name not in found_fields
    ]
    if faults:
        raise ValueError(
            f"{path} was written by another version of sea_jax; change it, or use that version:\n" + "\n".join(faults)
        )
    for name, value in found_fields.items():
        try:
            config.update_from_flattened_dict({name: value})
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path}: config.{name}={value!r}: {error}") from error
    return config


def check_workdir(workdir: Path, config: ml_collections.ConfigDict) -> None:
    """Refuses a work directory that another configuration made.

    Args:
      workdir: where everything is written.
      config: this run's configuration.

    Raises:
      ValueError: the work directory is another configuration's, or nobody can tell whose, or is a file.
    """
    saved = workdir / "config.json"
    if workdir.exists() and not workdir.is_dir():
        raise ValueError(f"--workdir={workdir} is a file; name a directory")
    if not saved.exists() and any((workdir / name).exists() for name in ("checkpoints", "queries.jsonl")):
        raise ValueError(
            f"--workdir={workdir} holds a run but no config.json to compare with; name another directory, or put it back"
        )
    differing = configuration.differences(config, saved.read_text()) if saved.exists() else []
    if differing:
        raise ValueError(
            f"--workdir={workdir} belongs to another configuration; name another directory, or set:\n"
            + "\n".join(differing)
        )


def claim(workdir: Path, config: ml_collections.ConfigDict, fingerprint: str) -> None:
    """Makes the work directory and leaves the configuration in it, and what tells the policy from others.

    Args:
      workdir: where everything is written.
      config: this run's configuration.
      fingerprint: of the policy.
    """
    workdir.mkdir(parents=True, exist_ok=True)
    files.write_whole(workdir / FINGERPRINT_FILE, fingerprint + "\n")
    files.write_whole(workdir / "config.json", json.dumps(json.loads(config.to_json()), indent=2) + "\n")


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
