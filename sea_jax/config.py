"""The settings of a run, composed of those of its parts, and the way between them, configuration files and the command line."""

import dataclasses
import json
import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar, get_args

import ml_collections
from absl import logging
from ml_collections import config_dict

from sea_jax import settings
from sea_jax.actors.bridge import ActorSettings
from sea_jax.actors.generation import SamplingSettings
from sea_jax.agent import ExplorationSettings
from sea_jax.data.prompts import FILES, DataSettings
from sea_jax.ensemble import EnsembleSettings
from sea_jax.evaluation import EvaluationSettings
from sea_jax.features import FeatureSettings
from sea_jax.group_learner import GroupSettings
from sea_jax.learner import LearnerSettings
from sea_jax.losses import LossSettings
from sea_jax.models.checkpoints.hf import EXPORTED
from sea_jax.oracles.oracle import OracleSettings, PreferenceSettings, own_scale
from sea_jax.oracles.people import KIND as PEOPLE
from sea_jax.oracles.people import PeopleSettings
from sea_jax.policy import PolicySettings
from sea_jax.replay import ReplaySettings
from sea_jax.runtime.cache import PREFIX
from sea_jax.runtime.checkpoint import CheckpointSettings
from sea_jax.runtime.metrics import MetricsSettings
from sea_jax.settings import AT_LEAST_1, GIVEN, Check, one_of, section, setting

SEED: Check = (lambda v: 0 <= v < 2**32, "a whole number from 0 to 2**32 - 1")
MESH: Check = (
    lambda v: len(v) == 3 and all(n == -1 or n >= 1 for n in v) and v.count(-1) <= 1,
    'three numbers of 1 or more, devices along "data", "fsdp" and "tensor"; one of them may be -1',
)


@dataclass(frozen=True)
class RewardModelSettings(FeatureSettings, EnsembleSettings, ReplaySettings):
    """The epistemic reward model: what it sees, its heads, and what they remember."""


@dataclass(frozen=True)
class RunSettings:
    """Everything that a run can be told; the defaults are the paper's where it gives one."""

    name: str = setting("sea", "labels the run in tables and plots")
    seed: int = setting(0, "every random choice flows from it", SEED)
    mesh: tuple[int, int, int] = setting(
        (1, 1, 1), 'devices along "data", "fsdp", "tensor"; one may be -1: all that are left', MESH
    )
    bridge_token_file: str = setting(
        "", 'holds the servers\' token; "": the environment variable SEA_JAX_BRIDGE_TOKEN does'
    )
    method: str = setting(
        "sea", "fills the slots of the agent: a name of docs/methods.md, or my_module:my_method", GIVEN
    )
    max_queries: int = setting(
        50_000,
        "budget: pairs labelled by the oracle, exact",
        AT_LEAST_1,
        unit="queries",
        source="paper, App. F",
    )
    policy: PolicySettings = section(PolicySettings)
    data: DataSettings = section(DataSettings)
    sampling: SamplingSettings = section(SamplingSettings)
    actor: ActorSettings = section(ActorSettings)
    exploration: ExplorationSettings = section(ExplorationSettings)
    erm: RewardModelSettings = section(RewardModelSettings)
    loss: LossSettings = section(LossSettings)
    group: GroupSettings = section(GroupSettings)
    learner: LearnerSettings = section(LearnerSettings)
    oracle: OracleSettings = section(OracleSettings)
    people: PeopleSettings = section(PeopleSettings)
    eval: EvaluationSettings = section(EvaluationSettings)
    checkpoint: CheckpointSettings = section(CheckpointSettings)
    metrics: MetricsSettings = section(MetricsSettings)

    @property
    def policy_steps(self) -> int:
        """How many policy steps the budget takes if every prompt has two different candidates, for the schedule."""
        exploration = self.exploration
        burnt = min(exploration.burn_in_queries, self.max_queries)
        batch = exploration.asked_prompts or self.data.batch_size
        oracle_steps = burnt / batch + (self.max_queries - burnt) / (batch * exploration.gamma)
        planned = max(self.max_queries - exploration.planning_after_queries, 0) / self.max_queries
        return math.ceil(oracle_steps * (1 + exploration.planning_steps * planned))

    def faults(self) -> Iterator[str]:
        """Yields a line for everything in different parts that does not go together."""
        batch_size, planning = self.data.batch_size, self.exploration.planning_steps
        sampling, actor = self.sampling, self.actor
        yield from indivisible(self.data, self.learner)
        if sampling.batch_size and batch_size % sampling.batch_size:
            yield (
                f"config.sampling.batch_size={sampling.batch_size}: must divide config.data.batch_size={batch_size}, or be 0"
            )
        if self.eval.against_references and self.data.source != "docstrings" and not self.data.reference_field:
            yield (
                "config.eval.against_references=True: data.reference_field must name the field that holds the references"
            )
        for field, taste in (("oracle", self.oracle), ("eval.judge", self.eval.judge)):
            if taste.reads_references and self.data.source != "docstrings" and not self.data.reference_field:
                yield (
                    f"config.{field}.against={taste.against!r}: data.reference_field must name the field that holds the "
                    "references"
                )
        if actor.lag == 1 and planning:
            yield "config.actor.lag=1: exploration.planning_steps must be 0, planning asks the newest policy"
        if actor.kind == "bridge" and not 0.01 <= sampling.temperature <= 2:
            yield (
                f"config.sampling.temperature={sampling.temperature}: engines draw at 0.01 to 2; actor.kind=bridge needs such "
                "a one"
            )
        if actor.sync_every > 1 and planning:
            yield (
                f"config.actor.sync_every={actor.sync_every}: exploration.planning_steps must be 0, a step is then a policy "
                "step"
            )


@dataclass(frozen=True)
class FineTunedEvaluationSettings:
    """On what the loss is measured before and after fine-tuning."""

    num_prompts: int = setting(128, "held-out pairs", AT_LEAST_1)


@dataclass(frozen=True)
class SftSettings:
    """Everything that a supervised fine-tuning can be told."""

    name: str = setting("sft", "labels the run")
    seed: int = setting(0, "every random choice flows from it", SEED)
    output: str = setting("", "directory for the fine-tuned model, or cache:NAME", GIVEN)
    output_dtype: str = setting("", 'of the weights there; "": that of policy.source', one_of("", *EXPORTED))
    steps: int = setting(48, "gradient steps", AT_LEAST_1)
    max_response_tokens: int = setting(
        53,
        "longer references are left out and counted; the end-of-sequence token included",
        (lambda v: v >= 2, "2 or more (one token and the end of the sequence)"),
        unit="tokens",
    )
    policy: PolicySettings = section(PolicySettings)
    data: DataSettings = section(DataSettings)
    learner: LearnerSettings = section(LearnerSettings)
    eval: FineTunedEvaluationSettings = section(FineTunedEvaluationSettings)

    def faults(self) -> Iterator[str]:
        """Yields a line for everything in different parts that does not go together."""
        yield from indivisible(self.data, self.learner)
        if self.learner.anchor_decay:
            yield f"config.learner.anchor_decay={self.learner.anchor_decay}: must be 0, fine-tuning has no reference"


def indivisible(data: DataSettings, learner: LearnerSettings) -> Iterator[str]:
    """Yields a line if a batch cannot be cut into microbatches."""
    batch_size, size = data.batch_size, learner.microbatch_size
    if size >= 1 and batch_size % size:
        yield f"config.learner.microbatch_size={size}: must divide config.data.batch_size={batch_size}"


Settings = TypeVar("Settings", RunSettings, SftSettings)
Taste = TypeVar("Taste", bound=PreferenceSettings)


# ------------------------------------------------------------------------------------------------- The way to ml_collections


def default() -> ml_collections.ConfigDict:
    """Returns what every configuration file starts from: a locked ConfigDict, in which no other field can be set."""
    return editable(RunSettings())


def default_sft() -> ml_collections.ConfigDict:
    """Returns what every configuration file of supervised fine-tuning starts from."""
    return editable(SftSettings())


def editable(whole: RunSettings | SftSettings) -> ml_collections.ConfigDict:
    """Returns settings as a locked ConfigDict that files and flags can change."""

    def part(own: Any) -> ml_collections.ConfigDict:
        config = ml_collections.ConfigDict()
        for field in dataclasses.fields(own):
            value = getattr(own, field.name)
            if dataclasses.is_dataclass(value):
                config[field.name] = part(value)
            elif value is None:  # typed all the same, so that a flag knows what it reads
                config[field.name] = config_dict.placeholder(get_args(field.type)[0])
            else:
                config[field.name] = value
        return config

    return part(whole).lock()


def changed(whole: RunSettings, changes: Mapping[str, Any]) -> RunSettings:
    """Returns settings with other values.

    Args:
      whole: settings.
      changes: values by dotted names.
    """
    config = editable(whole)
    config.update_from_flattened_dict(changes)
    read: RunSettings = _read(RunSettings, config)
    return read


def unchecked(config: ml_collections.ConfigDict) -> RunSettings | SftSettings:
    """Returns the settings that a configuration of either kind holds, whatever they are."""
    return _read(SftSettings if "output" in config else RunSettings, config)


def resolve(config: ml_collections.ConfigDict) -> RunSettings:
    """Returns the settings that a configuration holds.

    Args:
      config: what `default` returned, with fields set.

    Raises:
      ValueError: one line per value that cannot work: its name, what was found, what would do.
    """
    whole: RunSettings = checked(_read(RunSettings, config))
    evaluation = whole.eval
    if whole.oracle.kind == PEOPLE:  # who are there for labels
        evaluation = replace(evaluation, oracle=False)
    return replace(whole, oracle=replace(whole.oracle, scale=own_scale(whole.oracle)), eval=evaluation)


def resolve_sft(config: ml_collections.ConfigDict) -> SftSettings:
    """Returns the settings that a configuration of supervised fine-tuning holds; raises as `resolve` does."""
    return checked(_read(SftSettings, config))


def checked(whole: Settings) -> Settings:
    """Returns settings that can work, or raises a ValueError with a line for each that cannot."""
    if found := [*settings.faults(whole), *whole.faults()]:
        raise ValueError("\n".join(found))
    return whole


def _read(kind: Any, config: ml_collections.ConfigDict) -> Any:
    """The dataclass of settings that a configuration's values stand for."""

    def part(own: Any, values: Mapping[str, Any]) -> Any:
        kinds = {field.name: field.type for field in dataclasses.fields(own)}
        nested = {name: dataclasses.is_dataclass(kinds[name]) for name in values}
        return own(**{name: part(kinds[name], value) if nested[name] else value for name, value in values.items()})

    return part(kind, config.copy_and_resolve_references().to_dict())


# --------------------------------------------------------------------------------------------------------- The way to files


def to_json(whole: RunSettings | SftSettings) -> str:
    """Returns settings as they stand in a file."""
    return json.dumps(dataclasses.asdict(whole), indent=2) + "\n"


def from_json(saved: Mapping[str, Any], where: str) -> RunSettings:
    """Returns the settings that a run left, also those of an older version; whether they can work here is not looked at.

    Args:
      saved: from its config.json; a field that is newer than that takes the value that there was then.
      where: the file, for messages.

    Raises:
      ValueError: a field is not one of this version, or its value is of another kind.
    """
    return _from_json(RunSettings, saved, where)


def sft_from_json(saved: Mapping[str, Any], where: str) -> SftSettings:
    """Returns the settings that a supervised fine-tuning left; everything else as in `from_json`."""
    return _from_json(SftSettings, saved, where)


def _from_json(kind: Any, saved: Mapping[str, Any], where: str) -> Any:
    """Settings of a kind that were saved, perhaps by an older version."""
    fresh = kind()
    known = {name: field for name, field, _ in settings.walk(fresh)}
    found = flatten(saved)
    if gone := [name for name in found if name not in known]:
        raise ValueError(
            f"{where} was written by another version of sea_jax; change it, or use that version:\n"
            + "\n".join(f"config.{name}: not a field of this version" for name in gone)
        )
    if newer := [name for name in known if name not in found]:
        logging.info("%s is older than %s: they are taken as they were then", where, ", ".join(newer))
    config = editable(fresh)
    for name, field in known.items():
        value = found.get(name, field.metadata["before"])
        try:
            config.update_from_flattened_dict({name: tuple(value) if isinstance(value, list) else value})
        except (TypeError, ValueError) as error:
            raise ValueError(f"{where}: config.{name}={value!r}: {error}") from error
    return _read(kind, config)


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Returns a nested mapping with dotted names.

    Args:
      tree: nested mapping.
      prefix: put before every name.
    """
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        flat |= flatten(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return flat


# What a run may go on with otherwise: where the servers are and how long they are waited for, when it is saved, its name, and
# in how many parts the same sums are taken, which tells them apart by rounding alone.
MAY_DIFFER = {"bridge_token_file", "actor.urls", "actor.timeout_s", "actor.retries", "actor.transport"} | {
    *("actor.weights_directory", "actor.weights_host", "actor.weights_port"),
    *("oracle.urls", "oracle.timeout_s", "oracle.retries", "oracle.concurrency", "oracle.max_abstentions"),
    *("name", "checkpoint.keep", "checkpoint.every_steps", "metrics.writers"),
    *(
        "mesh",
        "learner.microbatch_size",
        "learner.remat",
        "eval.batch_size",
        "oracle.batch_size",
        "erm.trunk_batch_size",
    ),
    *(
        f"eval.judge.{name}"
        for name in ("urls", "timeout_s", "retries", "concurrency", "max_abstentions", "batch_size")
    ),
    *("eval.oracle", "eval.likelihood_prompts"),  # what is measured besides changes nothing that is learnt
}
MAY_DIFFER |= {
    f"{taste}.judge.{name}"
    for taste in ("oracle", "eval.judge")
    for name in ("url", "key_environment", "max_cost", "input_price", "output_price", "cache")
}
# Who is asked, and how: what they said is on record. For how long decides how much room a state has for open pairs.
MAY_DIFFER |= {f"people.{field.name}" for field in dataclasses.fields(PeopleSettings)} - {"people.max_staleness"}
MAY_GROW = {"max_queries"}

# Where things lie that decide a run's numbers; a run goes on with others if what lies there is the same.
MODEL_PLACES = ("policy.source", "erm.trunk", "oracle.reward_model", "oracle.encoder", "oracle.judge.template")
DATA_PLACES = ("data.path", "data.heldout_path", "data.directory")


def located(run: RunSettings) -> RunSettings:
    """Returns settings whose relative paths are absolute, so that they mean the same from another directory."""

    def whole(path: str) -> str:
        return str(Path(path).expanduser().absolute()) if path and "://" not in path else path

    def if_there(source: str) -> str:  # else it is a name: of the hub, of a built-in model or in the cache
        return whole(source) if source and Path(source).expanduser().exists() else source

    def of_taste(taste: Taste) -> Taste:
        asked = taste.judge
        in_cache = asked.cache.startswith(PREFIX)
        return replace(
            taste,
            encoder=if_there(taste.encoder),
            reward_model=if_there(taste.reward_model),
            judge=replace(asked, template=whole(asked.template), cache=asked.cache if in_cache else whole(asked.cache)),
        )

    is_file = run.data.source in FILES
    data = replace(
        run.data,
        path=whole(run.data.path) if is_file else if_there(run.data.path),
        heldout_path=whole(run.data.heldout_path),
        directory=whole(run.data.directory),
    )
    return replace(
        run,
        bridge_token_file=whole(run.bridge_token_file),
        data=data,
        policy=replace(run.policy, source=if_there(run.policy.source)),
        erm=replace(run.erm, trunk=if_there(run.erm.trunk)),
        oracle=of_taste(run.oracle),
        people=replace(
            run.people,
            guidelines=whole(run.people.guidelines),
            checks=whole(run.people.checks),
            tls_certificate=whole(run.people.tls_certificate),
            tls_key=whole(run.people.tls_key),
        ),
        eval=replace(run.eval, judge=of_taste(run.eval.judge)),
    )


def changes(now: RunSettings, then: RunSettings) -> dict[str, tuple[Any, Any]]:
    """Returns what of the settings that decide a run's numbers is other than it was: name -> (then, now).

    A run that had no judge may go on with any.
    """
    values = {name: value for name, _, value in settings.walk(then)}
    had_judge = bool(then.eval.judge.kind)
    return {
        name: (values[name], value)
        for name, _, value in settings.walk(now)
        if name not in MAY_DIFFER and value != values[name] and (had_judge or not name.startswith("eval.judge."))
    }


def differences(now: RunSettings, then: RunSettings, allowed: Collection[str] = ()) -> list[str]:
    """Compares settings with those that a work directory was made with; what may differ or grow is left out.

    Args:
      now: this run's.
      then: the work directory's.
      allowed: names of settings that may differ as well.

    Returns:
      One line per setting that differs and must not; empty if none does.

    Raises:
      ValueError: a name is no setting's.
    """
    names = [name for name, _, _ in settings.walk(now)]
    if strangers := [name for name in allowed if name not in names]:
        raise ValueError(
            f"--allow_changed={','.join(strangers)}: no such setting; name them as in learner.learning_rate,loss.beta"
        )
    return sorted(
        f"config.{name}: {before!r} in the work directory, {after!r} now"
        for name, (before, after) in changes(now, then).items()
        if name not in allowed and not (name in MAY_GROW and after > before)
    )


# -------------------------------------------------------------------------------------------------------------- What there is


def table(whole: RunSettings | SftSettings) -> str:
    """Returns every setting as a Markdown table: name, default, what it is, range, unit and source.

    A value that differs from its default stands behind that.
    """
    lines = [
        "| setting | type | default | what it is | must be | unit | source |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, field, value in settings.walk(whole):
        told = field.metadata
        kind = field.type.__name__ if isinstance(field.type, type) else str(field.type).replace(" | ", " or ")
        default = f"`{field.default!r}`" + (f", here `{value!r}`" if value != field.default else "")
        columns = (f"`{name}`", kind, default, told["says"], told["must"][1], told["unit"], told["source"])
        lines.append("| " + " | ".join(column.replace("|", r"\|") for column in columns) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    print("# Settings\n")
    print("Every field of a configuration, set in a file's `get_config()` or as `--config.NAME=VALUE`.")
    print("Written by `python -m sea_jax.config > docs/settings.md`.")
    print(f"\n## Of a run\n\n{table(RunSettings())}")
    print(f"\n## Of a supervised fine-tuning\n\n{table(SftSettings())}")
