"""Evaluates a trained run alone, and exports its policy: `python -m sea_jax.evaluate --workdir=runs/quickstart-seed0`."""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from sea_jax import ensemble, wiring
from sea_jax.alpaca_eval import AlpacaEval, outputs, read_instructions, rendered
from sea_jax.config import RunSettings, checked
from sea_jax.data.fingerprint import fingerprint
from sea_jax.evaluation import ORACLE, Evaluation, EvaluationSettings, Responses, best_by, text_metrics
from sea_jax.heldout import heldout_evaluation
from sea_jax.judging import compare_judges
from sea_jax.models.checkpoints import hf
from sea_jax.models.mesh import make_mesh, mesh_sizes
from sea_jax.oracles.asked_once import COMMAND_LEDGER, EVALUATION_LEDGER
from sea_jax.oracles.ledger import Ledger
from sea_jax.policy import check_fingerprint, export_policy
from sea_jax.runtime import cache, checkpoint, console, files, processes
from sea_jax.runtime.console import WORKDIR, join_processes
from sea_jax.runtime.progress import Progress
from sea_jax.statistics import AtEqualLength, Interval, at_equal_length
from sea_jax.types import Array, Candidates, Generate, Params, Prompts
from sea_jax.workdir import beginning, check_prompts, open_ledger, saved_settings

for shared in ("workdir", "coordinator", "num_processes", "process_id", "deterministic"):
    flags.declare_key_flag(shared)  # so that --help shows them
CHECKPOINT = flags.DEFINE_string(
    "checkpoint",
    None,
    "Step of the checkpoint, or best: by the judge, or the oracle if there is none; default: the newest.",
)
BEST_OF = flags.DEFINE_integer(
    "best_of", None, "Also the best of so many responses under the run's ensemble.", lower_bound=1
)
EXPORT = flags.DEFINE_string("export", None, "Also write the policy there, as a Hugging Face directory.")
EXPORT_DTYPE = flags.DEFINE_enum(
    "export_dtype", None, hf.EXPORTED, "Of the exported weights; default: that of the policy that training began with."
)
MESH = flags.DEFINE_string(
    "mesh",
    None,
    "Devices along data, fsdp and tensor, such as 1,-1,1; default: the run's own mesh if it fits, else 1,N,1.",
)
JUDGES = flags.DEFINE_multi_string(
    "judges",
    None,
    "Instead of an evaluation: show the pairs that the run's oracle labelled to several judges and print how far they agree. "
    "recorded (the labels as given), oracle, judge, or NAME:FIELD=VALUE,FIELD=VALUE with fields of eval.judge; repeatable.",
)
NUM_PAIRS = flags.DEFINE_integer("num_pairs", None, "With --judges: the oldest so many; default: all.", lower_bound=1)
ALPACA_EVAL = flags.DEFINE_string(
    "alpaca_eval",
    None,
    "Also answer the instructions of this file, such as alpaca_eval.json, for the alpaca-eval package.",
)
ALPACA_TEMPERATURE = flags.DEFINE_float(
    "alpaca_temperature", 0.9, "At which these responses are sampled (paper, App. F.2); 0: greedily.", lower_bound=0
)
ALPACA_MAX_NEW_TOKENS = flags.DEFINE_integer(
    "alpaca_max_new_tokens", None, "Of each of them; default: the run's eval.max_new_tokens.", lower_bound=1
)
NUM_PROMPTS = flags.DEFINE_integer("num_prompts", None, "Held-out prompts; default: the run's own.", lower_bound=1)


def evaluate(
    workdir: Path,
    *,
    step: int | str | None = None,
    best_of: int = 0,
    export: Path | None = None,
    export_dtype: str = "",
    mesh: Sequence[int] | None = None,
    num_prompts: int | None = None,
    alpaca: AlpacaEval | None = None,
) -> None:
    """Measures a checkpoint's policy on held-out prompts, writes numbers and responses into the work directory, and exports.

    Args:
      workdir: where `train` wrote; its checkpoints are only read, a run may be writing there.
      step: of the checkpoint; "best": that of the evaluation with the best win rate, by the judge, or by the oracle if there
        is none; None: the newest one that can be read.
      best_of: N of best of N under the ensemble; 0: not.
      export: where the policy goes as a Hugging Face directory; None: nowhere.
      export_dtype: of its weights; "": as of `export_policy`.
      mesh: devices along "data", "fsdp" and "tensor"; None: see `fitting_mesh`.
      num_prompts: held-out prompts; None: as many as the run's own evaluations.
      alpaca: instructions that the policy also answers, for AlpacaEval's own package; None: there are none.

    Raises:
      ValueError: a flag, the work directory or a checkpoint does not fit.
      OSError: a file cannot be read or written.
    """
    settings = saved_settings(workdir)
    step = found_checkpoint(workdir / "checkpoints", step, settings.eval)
    if export is not None:
        check_export(export)
    settings = replace(
        settings,
        # Servers may be gone, or hold newer weights for the run itself.
        actor=replace(settings.actor, kind="in_process", lag=0),
        eval=replace(settings.eval, num_prompts=num_prompts or settings.eval.num_prompts),
    )
    data, fsdp, tensor = mesh or fitting_mesh(settings)
    made = make_mesh(checked(replace(settings, mesh=(data, fsdp, tensor))).mesh)
    settings = replace(settings, mesh=mesh_sizes(made))
    with jax.set_mesh(made):
        evaluate_on(
            made, settings, workdir, step=step, best_of=best_of, export=export, export_dtype=export_dtype, alpaca=alpaca
        )


LEARNT_FROM = "replay/added"  # labels, in a run's state


def evaluate_on(
    mesh: Mesh,
    config: RunSettings,
    workdir: Path,
    *,
    step: int | None,
    best_of: int,
    export: Path | None,
    export_dtype: str,
    alpaca: AlpacaEval | None,
) -> None:
    """Evaluates on a mesh that is set; everything else as in `evaluate`.

    Args:
      mesh: the mesh.
      config: the run's configuration.
      workdir: where `train` wrote.
      step: of the checkpoint, or None.
      best_of: N, or 0.
      export: where to, or None.
      export_dtype: of the weights there.
      alpaca: AlpacaEval, or None.
    """
    # --------------------------------------------------------------------------------------------------------- What is there
    parts = wiring.parts(config, mesh, training=False, began=beginning(workdir), workdir=workdir)
    check_fingerprint(parts.policy, workdir)
    check_prompts(workdir, fingerprint((), parts.heldout_prompts, parts.policy.tokenizer), training=False)
    asked_besides = rendered(alpaca, config, parts) if alpaca else []
    step, state = checkpoint.read(workdir / "checkpoints", wanted(config, parts, mesh, bool(best_of)), step)
    trained, version = state["learner/trained"], int(state["learner/step"])
    if best_of and not int(state[LEARNT_FROM]):
        raise ValueError(
            f"--best_of={best_of}: the ensemble in the checkpoint of step {step} has learnt from no label (method="
            f"{config.method}), so its best is any of them; leave --best_of out"
        )

    # -------------------------------------------------------------------------------------------------------------- Responses
    few = min(config.eval.best_of_n_prompts, len(parts.heldout_prompts)) if best_of else 0
    batches = 2 * math.ceil(len(parts.heldout_prompts) / config.eval.batch_size) + math.ceil(
        few / config.data.batch_size
    )
    with (
        open_ledger(workdir / COMMAND_LEDGER) as asked,
        Ledger(workdir / EVALUATION_LEDGER, writes=False) as asked_by_run,
    ):
        with watching(batches) as watched:
            heldout = heldout_evaluation(config, parts, best_of, (asked, asked_by_run), watched)
            written = {"initial": heldout.initial, "response": heldout.greedy(trained, version)}
            if best_of:
                written["best_of_n"] = heldout.best_of_n(trained, state["ensemble"], version)
        comparisons = compared(heldout, written)

    answered = (
        outputs(alpaca, asked_besides, config, parts, trained, version, f"{config.name}-{step}") if alpaca else []
    )

    # ------------------------------------------------------------------------------------------------------ Numbers, export
    lengths = {name: float(responses.lengths.mean()) for name, responses in written.items()}
    weights = {"initial": parts.policy.reference, "response": trained, "best_of_n": trained}
    texts = {name: text_metrics(heldout, weights[name], responses) for name, responses in written.items()}
    settings = {
        "mesh": list(config.mesh),
        "num_prompts": len(heldout.records),
        "max_new_tokens": config.eval.max_new_tokens,
        "best_of_n": best_of,
        "best_of_n_prompts": few,
        "temperature": config.sampling.temperature,  # of what the best is chosen from; the others are greedy
        "seed": config.seed,
    }
    numbers = {
        "step": step,
        "queries": state["queries"],
        "policy_steps": version,
        "win_rates": {comparison.name: comparison.row() for comparison in comparisons},
        "response_tokens": lengths,
        "texts": {name: {key.removeprefix("eval/"): v for key, v in row.items()} for name, row in texts.items()},
        "settings": settings,
    }
    if processes.is_first():
        lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows(heldout, written, comparisons))
        files.write_whole(workdir / f"responses-{step}.jsonl", "".join(lines))
        files.write_whole(workdir / f"evaluation-{step}.json", json.dumps(numbers, indent=2) + "\n")
        print(f"step {step}: {state['queries']} queries, {version} policy steps\n")
        titles = {
            "response": "policy",
            "best_of_n": f"best of {best_of}",
            "initial": "initial policy",
            "reference": "references",
        }
        print(table(comparisons, lengths, titles))
        print(f"\n{text_table(texts, titles)}")
        print(
            f"\nThe numbers are in {workdir / f'evaluation-{step}.json'}, the responses in responses-{step}.jsonl beside it."
        )
        if alpaca:
            answers = workdir / f"alpaca_eval-{step}.json"
            files.write_whole(answers, json.dumps(answered, indent=2, ensure_ascii=False) + "\n")
            print(
                f"{len(alpaca.instructions)} outputs at temperature {alpaca.temperature:g} are in {answers}: "
                f"alpaca_eval --model_outputs={answers}"
            )
    if export is not None:
        export_policy(parts.policy, trained, export, export_dtype)
        if processes.is_first():
            print(f"The policy is in {export}, as Hugging Face's libraries read it.")


def found_checkpoint(directory: Path, step: int | str | None, measured: EvaluationSettings) -> int | None:
    """Returns the step of which a checkpoint is wanted; None: any. Refuses one that is not there.

    Args:
      directory: the run's checkpoints.
      step: from the command line: a number, "best", or None.
      measured: how the run was evaluated.

    Raises:
      ValueError: there is none.
    """
    found = checkpoint.steps(directory)
    if not found:
        raise ValueError(f"{directory} holds no checkpoint; the run writes the first one before its first step")
    if step is None:
        return None
    if step == "best":
        by = best_by(measured)
        best = checkpoint.best(directory, by)
        if best is None:
            raise ValueError(
                f"--checkpoint=best: no checkpoint in {directory} was saved with a win rate by the {by or 'judge'}; "
                f"there are those of the steps {_listed(found)}"
            )
        return best
    if not str(step).isdecimal() or int(step) not in found:
        raise ValueError(
            f"--checkpoint={step}: there is no such checkpoint; there are those of the steps {_listed(found)}"
        )
    return int(step)


def _listed(numbers: Sequence[int]) -> str:
    return ", ".join(str(number) for number in numbers)


def check_export(directory: Path) -> None:
    """Refuses a place that holds something.

    Args:
      directory: from the command line.

    Raises:
      ValueError: it does.
    """
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise ValueError(
            f"--export={directory} {'is not empty' if directory.is_dir() else 'is a file'}; name a new directory"
        )


def fitting_mesh(config: RunSettings) -> tuple[int, ...]:
    """Returns the run's own mesh if the devices here can make it, else one that divides the parameters over as many as can be.

    Args:
      config: the run's configuration.

    Returns:
      Devices along "data", "fsdp" and "tensor"; with several processes, all of them.
    """
    used, here, alone = math.prod(config.mesh), len(jax.devices()), jax.process_count() == 1
    if used == here or (used < here and alone):
        return tuple(config.mesh)
    batches = [config.data.batch_size, config.eval.batch_size, config.sampling.batch_size]
    batches += [config.erm.trunk_batch_size] if config.erm.trunk else []
    batches += [taste.batch_size for taste in (config.oracle, config.eval.judge) if taste.kind == "reward_model"]
    return (1, math.gcd(here, *batches) if alone else -1, 1)


def wanted(config: RunSettings, parts: wiring.Parts, mesh: Mesh, ensemble_too: bool) -> dict[str, Any]:
    """Returns which parts of a run's state an evaluation reads, and where they lie: no moments of Adam's, no pairs.

    Args:
      config: the run's configuration.
      parts: Parts.
      mesh: the one that is set.
      ensemble_too: the ensemble is needed.

    Returns:
      Path in the state -> shapes with shardings.
    """
    whole = NamedSharding(mesh, PartitionSpec())

    def placed(x: Any, sharding: Any = whole, dtype: Any = None) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(x.shape, dtype or x.dtype, sharding=sharding)

    heads = jax.eval_shape(lambda key: ensemble.init(config.erm, parts.num_features, key), jax.random.key(0))
    count = jax.ShapeDtypeStruct((), jnp.int32, sharding=whole)
    return {
        "learner/trained": jax.tree.map(lambda x: placed(x, x.sharding, jnp.float32), parts.policy.reference),
        "learner/step": count,
        "queries": 0,
    } | ({"ensemble": jax.tree.map(placed, heads), LEARNT_FROM: count} if ensemble_too else {})


@contextmanager
def watching(total: int) -> Iterator[Any]:
    """Shows how many batches of responses are written.

    Args:
      total: how many there will be.

    Yields:
      What is put around whoever writes them.
    """
    done = 0
    with Progress(total, "batch") as progress:

        def watched(generate: Generate) -> Generate:
            def generate_and_show(trained: Params, prompts: Prompts, key: Array, version: int) -> Candidates:
                nonlocal done
                candidates = jax.block_until_ready(generate(trained, prompts, key, version))
                done += 1
                progress.update(done, {})
                return candidates

            return generate_and_show

        yield watched


# ------------------------------------------------------------------------------------------------------------------ Comparisons


@dataclass(frozen=True)
class Comparison:
    """How often one kind of responses wins against another.

    Attributes:
      responses: "response" (the policy's, greedily), "best_of_n" or "initial" (the initial policy's, greedily).
      against: "initial" or "reference".
      by: who compares, "oracle" or "judge".
      interval: the win rate.
      probability: P(response wins), one for each prompt; NaN where there is nothing to win against.
      freed: the win rate without differences in length.
    """

    responses: str
    against: str
    by: str
    interval: Interval
    probability: np.ndarray
    freed: AtEqualLength

    @property
    def name(self) -> str:
        """Such as response_over_initial, or response_over_initial_by_judge."""
        return f"{self.responses}_over_{self.against}" + ("" if self.by == ORACLE else f"_by_{self.by}")

    def row(self) -> dict[str, Any]:
        """Returns it as evaluation-STEP.json holds it."""
        return (
            _row(self.interval)
            | {"length_controlled": _row(self.freed.controlled)}
            | ({"similar_length": _row(self.freed.similar)} if self.freed.similar else {})
        )


def _row(interval: Interval) -> dict[str, Any]:
    return {"win_rate": interval.mean, "low": interval.low, "high": interval.high, "prompts": interval.count}


def compared(heldout: Evaluation, written: Mapping[str, Responses]) -> list[Comparison]:
    """Compares every kind of responses with the initial policy's and with the data set's references, where there are any.

    Args:
      heldout: Evaluation.
      written: name -> responses to the first of the held-out prompts.

    Returns:
      Comparisons, those of the oracle before those of the judge.
    """
    ways = {"initial": heldout.against_initial, "reference": heldout.against_references}
    opponents = {
        "initial": heldout.initial.texts,
        "reference": [record["reference"].strip() for record in heldout.records],
    }
    kinds = [name for name in ("response", "best_of_n", "initial") if name in written]
    groups = [(who, against) for who in heldout.preferences for against in ways]
    comparisons = []
    with Progress(len(groups), "comparison") as progress:
        for done, (who, against) in enumerate(groups, start=1):
            found = {name: ways[against](written[name].texts, who) for name in kinds if name != against}
            known = {name: one for name, one in found.items() if one is not None}
            pairs = [(probability, written[name].texts) for name, (_, probability) in known.items()]
            controlled = at_equal_length(pairs, opponents[against]) if pairs else []
            comparisons += [
                Comparison(name, against, who, interval, probability, lengths)
                for (name, (interval, probability)), lengths in zip(known.items(), controlled, strict=True)
            ]
            progress.update(done, {})
    return comparisons


def rows(
    heldout: Evaluation, written: Mapping[str, Responses], comparisons: Sequence[Comparison]
) -> Iterator[dict[str, Any]]:
    """Yields what responses-STEP.jsonl holds.

    Args:
      heldout: Evaluation.
      written: name -> responses to the first of the held-out prompts.
      comparisons: of these.

    Yields:
      One record per prompt, with P(response wins) for each comparison that it is part of.
    """
    for i, record in enumerate(heldout.records):
        yield {
            "prompt_id": record["id"],
            "prompt": record["prompt"],
            "reference": record["reference"],
            **{name: responses.texts[i] for name, responses in written.items() if i < len(responses.texts)},
            **{
                one.name: float(one.probability[i])
                for one in comparisons
                if i < len(one.probability) and not np.isnan(one.probability[i])
            },
        }


def table(comparisons: Sequence[Comparison], lengths: Mapping[str, float], titles: Mapping[str, str]) -> str:
    """Returns the win rates as a Markdown table.

    Args:
      comparisons: its rows.
      lengths: mean tokens of each kind of responses.
      titles: what each kind is called.
    """
    lines = [
        "| responses of | tokens | by | against | prompts | win rate [95% interval] | at equal length | at similar (pairs) |",
        "| --- | ---: | --- | --- | ---: | ---: | ---: | ---: |",
    ]
    for one in comparisons:
        similar = one.freed.similar
        cells = [
            titles[one.responses],
            f"{lengths[one.responses]:.1f}",
            one.by,
            titles[one.against],
            str(one.interval.count),
            one.interval.shown(),
            one.freed.controlled.shown(),
            f"{similar.shown()} ({similar.count})" if similar else "",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def text_table(texts: Mapping[str, Mapping[str, float]], titles: Mapping[str, str]) -> str:
    """Returns what is told of each kind of responses without anybody's taste, as a Markdown table.

    Args:
      texts: kind -> `evaluation.text_metrics`.
      titles: what each kind is called.
    """
    names = {
        "eval/finished_ratio": "ended by themselves",
        "eval/distinct_words": "distinct words",
        "eval/repeated_trigrams": "with a repeated 3-gram",
        "eval/fluency": "log-prob per token under the initial policy",
        "eval/reference_loss": "loss per token on references",
    }
    shown = [name for name in names if any(name in row for row in texts.values())]
    lines = [f"| responses of | {' | '.join(names[name] for name in shown)} |", f"| --- |{' ---: |' * len(shown)}"]
    for kind, row in texts.items():
        lines.append(f"| {titles[kind]} | {' | '.join(f'{row[name]:.3f}' for name in shown)} |")
    return "\n".join(lines)


def judged(workdir: Path, specs: Sequence[str], num_pairs: int | None) -> str:
    """Returns how far judges agree on a run's pairs, see `compare_judges`; reward models lie on a mesh that fits."""
    settings = saved_settings(workdir)
    with jax.set_mesh(make_mesh(fitting_mesh(settings))):
        return compare_judges(workdir, settings, specs, num_pairs)


def mesh_shape(text: str) -> tuple[int, ...]:
    """Returns the numbers of --mesh.

    Args:
      text: such as 1,-1,1.

    Raises:
      ValueError: they are no numbers.
    """
    try:
        return tuple(int(size) for size in text.split(","))
    except ValueError as error:
        raise ValueError(f"--mesh={text}: give the devices along data, fsdp and tensor, such as 1,-1,1") from error


def main() -> None:
    """Reads the flags and evaluates."""
    if console.CONFIG.value is not None:
        raise ValueError("--config: the configuration is the work directory's config.json; leave it out")
    workdir = Path(str(WORKDIR.value))
    alpaca = None
    if ALPACA_EVAL.value is not None:
        alpaca = AlpacaEval(
            read_instructions(Path(ALPACA_EVAL.value).expanduser()),
            ALPACA_TEMPERATURE.value,
            ALPACA_MAX_NEW_TOKENS.value or saved_settings(workdir).eval.max_new_tokens,
        )
    cache.keep_compiled_programs()
    console.prepare_devices()
    join_processes()
    if JUDGES.value:
        print(judged(Path(str(WORKDIR.value)), JUDGES.value, NUM_PAIRS.value))
        return
    evaluate(
        workdir,
        step=CHECKPOINT.value,
        best_of=BEST_OF.value or 0,
        export=None if EXPORT.value is None else Path(EXPORT.value).expanduser(),
        export_dtype=EXPORT_DTYPE.value or "",
        mesh=None if MESH.value is None else mesh_shape(MESH.value),
        num_prompts=NUM_PROMPTS.value,
        alpaca=alpaca,
    )


if __name__ == "__main__":
    console.run(main, required="workdir")
