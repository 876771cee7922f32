"""Aligns a language model with as few preference labels as it can: `python -m sea_jax.train --config=configs/quickstart.py`."""

import functools
import sys
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import jax
import ml_collections
from absl import flags, logging
from jax.sharding import Mesh

from sea_jax import agent as sea
from sea_jax import config as configuration
from sea_jax import ensemble, evaluation, history, labels, learner, losses, replay, report, sampling, wiring
from sea_jax.actors.responder import resumable
from sea_jax.config import RunSettings
from sea_jax.data.fingerprint import fingerprint
from sea_jax.data.prompts import training_batches
from sea_jax.heldout import heldout_evaluation
from sea_jax.initial_state import initial_state, replay_capacity
from sea_jax.models.mesh import make_mesh, mesh_sizes
from sea_jax.oracles import oracle
from sea_jax.oracles.asked_once import COMMAND_LEDGER, EVALUATION_LEDGER
from sea_jax.oracles.ledger import Ledger
from sea_jax.policy import check_fingerprint
from sea_jax.policy_logprobs import under_policy_and_reference
from sea_jax.runtime import cache, checkpoint, console, metrics, processes
from sea_jax.runtime.interrupts import Interrupts
from sea_jax.runtime.progress import Progress
from sea_jax.settings import walk
from sea_jax.workdir import (
    as_begun,
    beginning,
    check_models,
    check_prompts,
    check_workdir,
    claim,
    model_fingerprints,
    open_ledger,
    own_directory,
    renew,
)

flags.adopt_module_key_flags(console)  # so that --help shows --config
ALLOW_CHANGED = flags.DEFINE_list(
    "allow_changed", [], "Settings with which a run may go on otherwise than it began, such as learner.learning_rate."
)
LABELS = flags.DEFINE_string(
    "labels", None, "Work directory of another run, whose oracle's labels the ensemble begins with."
)


def train(
    config: ml_collections.ConfigDict,
    workdir: Path,
    allow_changed: Collection[str] = (),
    labels_of: Path | None = None,
) -> None:
    """Runs SEA until the budget of queries is spent, or goes on where the work directory stopped.

    Args:
      config: what a configuration file returns.
      workdir: where everything is written.
      allow_changed: names of settings with which a run may go on otherwise than it began.
      labels_of: work directory of another run, whose oracle's labels the ensemble begins with; None: with none.

    Raises:
      ValueError: a field, a file or the work directory does not fit; nothing has been spent then.
      NotFiniteError: a metric is not finite.
    """
    settings = configuration.located(configuration.resolve(config))
    mesh = make_mesh(settings.mesh)
    settings = replace(settings, mesh=mesh_sizes(mesh))  # what -1 stood for, so that a run goes on where it fits
    settings = as_begun(settings, workdir)
    with jax.set_mesh(mesh):
        train_on(mesh, settings, workdir, allow_changed, labels_of)


def train_on(
    mesh: Mesh, config: RunSettings, workdir: Path, allow_changed: Collection[str], labels_of: Path | None
) -> None:
    """Runs SEA on a mesh that is set; everything else as in `train`.

    Args:
      mesh: the mesh.
      config: this run's settings.
      workdir: where everything is written.
      allow_changed: names of settings.
      labels_of: a work directory, or None.
    """
    # ----------------------------------------------------------------------------------------- Work directory, rule and loss
    fill, loss, own_writers = wiring.method(config), losses.build(config.loss), metrics.user_functions(config.metrics)
    check_workdir(workdir, config, allow_changed)
    carried = (
        labels_to_begin_with(labels_of, workdir) if labels_of and not checkpoint.steps(workdir / "checkpoints") else []
    )
    begin = time.perf_counter()
    root = jax.random.key(config.seed)

    # ------------------------------------------------------------------------------- Policy, prompts, oracle, learner and ERM
    began = beginning(workdir)
    parts = wiring.parts(config, mesh, began=began, workdir=workdir)
    policy = parts.policy
    total_steps = config.policy_steps
    learner_config = learner.configured(config.learner, total_steps=total_steps, dtype=config.policy.dtype)
    batch_size = config.data.batch_size
    batches = training_batches(
        parts.train_prompts, batch_size=batch_size, seed=config.seed, **parts.padding(config.data.bucket)
    )
    labeller = oracle.oracle(config.oracle, parts.preference, config.people)
    initial = functools.partial(initial_state, config, parts, total_steps, len(carried), labeller)

    check_fingerprint(policy, workdir)
    prompts_id = fingerprint(parts.train_prompts, parts.heldout_prompts, policy.tokenizer)
    check_prompts(workdir, prompts_id, training=True)
    models_id = model_fingerprints(config)
    check_models(workdir, config, models_id, allow_changed)
    processes.by_first(
        lambda: claim(workdir, config, policy.fingerprint, prompts_id, began), None, "the work directory"
    )
    with (
        open_ledger(workdir / "queries.jsonl") as ledger,  # first, since it keeps other runs out
        open_ledger(workdir / EVALUATION_LEDGER) as asked,
        Ledger(workdir / COMMAND_LEDGER, writes=False) as asked_by_command,
        checkpoint.open_directory(
            workdir / "checkpoints", config.checkpoint.keep, evaluation.best_by(config.eval)
        ) as checkpoints,
        wiring.responder(config, parts, batches.__getitem__, workdir / "responses") as responder,
        Interrupts() as interrupts,
        oracle.opened(labeller, workdir, config.max_queries, lambda: interrupts.requested),
    ):
        passive = sea.Agent(
            prompts=batches.__getitem__,
            respond=responder.respond,
            texts=parts.texts,
            finished=parts.finished,
            unfinished=config.exploration.unfinished,
            features=parts.features,
            logprobs=under_policy_and_reference(policy, config.policy.dtype, config.sampling.batch_size),
            rule=sampling.passive,
            assign=sea.all_to_oracle,
            oracle=labeller,
            ledger=ledger,
            learn_rewards=jax.jit(functools.partial(ensemble.update, config=config.erm)),
            lessons=sea.labelled_duels,
            policy_learns_late=True,
            learn_policy=lambda state, pairs: learner.update(
                state,
                policy.frozen,
                policy.reference,
                pairs,
                loss=loss,
                config=policy.config,
                learner_config=learner_config,
                rows=learner.count_rows(pairs.prompts, pairs.tokens, pairs.lengths, learner_config.microbatch_size),
            ),
            max_queries=config.max_queries,
            batch_size=batch_size,
            standardise=config.erm.standardise,
        )
        agent = fill(passive, policy)
        processes.by_first(lambda: renew(workdir, config, models_id, ledger), None, "the work directory")

        # ---------------------------------------------------------------------------------------------------------- Resume
        restored = None
        if checkpoints.latest is not None:  # two states are never there at once: the devices may not have room
            restored = checkpoint.restore(checkpoints, checkpoint.abstract(initial()), replay.RESIZABLE)
        state = initial() if restored is None else restored[1]
        num_carried = len(carried) or max(int(state.replay.added) - state.queries, 0)
        if len(state.replay.labels) != (capacity := replay_capacity(config, num_carried)):
            state = replace(state, replay=replay.resized(state.replay, capacity))
        if restored is None and carried:
            if agent.learn_rewards is None:
                raise ValueError(
                    f"--labels={labels_of}: method={config.method} has no reward model that learns from them"
                )
            processes.by_first(
                lambda: ledger.note("labels", {"of": str(labels_of), "pairs": len(carried)}), None, "the ledger"
            )
            state = labels.carry_over(
                state,
                agent,
                wiring.features_of_any(config, parts),
                labels.batches(carried, policy.tokenizer, config.data, max_new_tokens=config.sampling.max_new_tokens),
                jax.random.fold_in(root, CARRIED),
            )
        if restored is not None:
            logging.info("going on from the checkpoint of step %d, %d queries paid for", state.step, state.queries)

        # ------------------------------------------------------------------------------------------------------ Evaluation
        heldout = heldout_evaluation(config, parts, config.eval.best_of_n, (asked, asked_by_command))

        def evaluated(state: sea.State, writer: metrics.Writer) -> dict[str, float]:
            chooses = config.eval.best_of_n_always or state.queries >= config.max_queries
            chooser = state.ensemble if chooses else None
            row, samples = evaluation.evaluate(
                heldout, config.eval, state.learner.trained, int(state.learner.step), state.step, chooser
            )
            for sample in samples:
                writer.sample(sample)
            return row

        def save(state: sea.State, row: Mapping[str, float]) -> None:
            responder.settle()
            checkpoint.save(checkpoints, state.step, state, win_rates(row))
            responder.checkpointed(state.batches)

        # ------------------------------------------------------------------------------------------------------ Training
        with (
            processes.together(
                lambda: metrics.Writer(
                    own_directory(workdir),
                    start_step=state.step,
                    tensorboard=metrics.TENSORBOARD in config.metrics.writers,
                    others=other_writers(config, workdir, ledger.run_id, own_writers),
                ),
                "the metrics",
            ) as writer,
            Progress(config.max_queries, "query", state.queries) as progress,
        ):
            evaluation_s = 0.0
            if state.step == 0:
                row = counters(state) | evaluated(state, writer) | parts.spent()
                writer.write(0, row)
                save(state, row)
                evaluation_s = row["eval/elapsed_time"]
            measured = history.read_evaluations(own_directory(workdir))
            if state.queries < config.max_queries:
                named = {"first step": "compiles its programs"}
                progress.update(state.queries, named, important=True, aside_s=evaluation_s)
            idle_steps, stopping, save_due, evaluation_due = 0, False, False, False
            while state.queries < config.max_queries and not stopping:
                queries_before, start = state.queries, time.perf_counter()
                state, row = sea.step(agent, state, sea.step_key(root, state.step))
                row |= {"misc/step_time": time.perf_counter() - start} | counters(state)
                metrics.check_finite(row, state.step, last_checkpoint(checkpoints))
                done = state.queries >= config.max_queries
                can_resume = resumable(int(state.learner.step), config.actor.sync_every)
                evaluation_due |= crossed(queries_before, state.queries, config.eval.every_queries)
                if (evaluation_due and can_resume) or done:  # where a checkpoint of what is measured can be kept
                    row |= evaluated(state, writer)
                    measured.append({"step": state.step, **row})
                    warn_if_exploited(measured)
                    evaluation_due, save_due = False, True
                row |= parts.spent()
                writer.write(state.step, row)
                evaluation_s = row.get("eval/elapsed_time", evaluation_s)
                progress.update(
                    state.queries,
                    progress_values(row),
                    important="eval/elapsed_time" in row,
                    aside_s=row.get("eval/elapsed_time", 0.0),
                    aside_left_s=evaluation_s * evaluations_left(config, state.queries),
                )
                stopping = processes.any_of(interrupts.requested) and can_resume
                save_due = save_due or state.step % config.checkpoint.every_steps == 0
                if (save_due and can_resume) or done or stopping:
                    save(state, row)
                    save_due = False
                idle_steps = 0 if row["explorer/pairs"] or row["explorer/unanswered"] else idle_steps + 1
                check_idle(idle_steps, state.step)
                check_answers(ledger.unanswered_in_a_row(), config.oracle.max_abstentions, state.step)

    if stopping:
        logging.warning("stopped at step %d and saved; the same command goes on from there", state.step)
        sys.exit(130)
    if processes.is_first():
        path = report.write(workdir)
        print(path.read_text())
        print(
            f"{time.perf_counter() - begin:.0f} s in all. Everything is in {workdir.absolute()}; the report is {path}"
        )


CARRIED = 0x6C61626C  # folded into the run's key for what is learnt before the first step


def labels_to_begin_with(labels_of: Path, workdir: Path) -> list[labels.Label]:
    """Returns the labels of another run's oracle.

    Args:
      labels_of: its work directory.
      workdir: this run's.

    Raises:
      ValueError: it has none, or is this run.
    """
    if labels_of.resolve() == workdir.resolve():
        raise ValueError(f"--labels={labels_of} is this run's own --workdir; name that of another run")
    try:
        found = [label for label in labels.read_labels(labels_of) if label.counted]
    except (OSError, ValueError) as error:
        raise ValueError(f"--labels={labels_of}: {error}") from error
    if not found:
        raise ValueError(f"--labels={labels_of} holds no label of an oracle")
    return found


MAX_IDLE_STEPS = 20  # steps without a pair after which a run gives up


def check_idle(idle_steps: int, step: int) -> None:
    """Ends a run that cannot go on by itself.

    Args:
      idle_steps: steps in a row without a pair that anybody could be asked about.
      step: number of the last of them.

    Raises:
      ValueError: there were MAX_IDLE_STEPS.
    """
    if idle_steps >= MAX_IDLE_STEPS:
        raise ValueError(
            f"no pair in {MAX_IDLE_STEPS} steps up to step {step}: the candidates of every prompt are the same text, or, with "
            "config.exploration.unfinished=left_out, cut. The policy has collapsed: lower config.learner.learning_rate, or "
            "raise config.sampling.temperature, config.sampling.max_new_tokens or config.loss.beta, and start anew"
        )


def check_answers(unanswered: int, most: int, step: int) -> None:
    """Ends a run whose oracle no longer answers; what the ensemble labels would keep it going for ever.

    Args:
      unanswered: pairs in a row that the oracle was asked about in vain.
      most: so many end the run; 0: none do.
      step: number of the last step.

    Raises:
      ValueError: there were so many.
    """
    if most and unanswered >= most:
        raise ValueError(
            f"the oracle has not answered {unanswered} pairs in a row up to step {step}, config.oracle.max_abstentions={most}: "
            "it said None, NaN or what is no probability in [0, 1]. None of them was counted; see what keeps it, and start the "
            "same command again"
        )


def other_writers(config: RunSettings, workdir: Path, run_id: str, own: Sequence[metrics.Sink]) -> list[metrics.Sink]:
    """Returns who else is given the numbers; the first process alone hands them on."""
    if not processes.is_first():
        return []
    if metrics.WANDB not in config.metrics.writers:
        return [*own]
    about = {name: value for name, _, value in walk(config)}
    return [*own, metrics.WeightsAndBiases(workdir, f"{config.name}-seed{config.seed}", run_id, about)]


def win_rates(row: Mapping[str, float]) -> dict[str, float]:
    """Picks an evaluation's win rates, by which checkpoints are compared, out of a step's metrics."""
    names = {evaluation.ORACLE: history.WIN_RATE, evaluation.JUDGE: history.JUDGE_WIN_RATE}
    return {who: row[name] for who, name in names.items() if name in row}


def warn_if_exploited(measured: Sequence[history.Line]) -> None:
    """Says, at the first evaluation that shows it, that the policy seems to please the oracle alone.

    Args:
      measured: the metrics of the evaluations so far.
    """
    found = history.exploited(measured)
    if found is not None and found["step"] == measured[-1]["step"] and processes.is_first():
        logging.warning("%s", history.exploitation(found))


def counters(state: sea.State) -> dict[str, float]:
    """Returns a run's two clocks: queries paid for and policy steps taken."""
    return {"misc/query_step": state.queries, "misc/gradient_steps": int(state.learner.step)}


def crossed(before: int, after: int, every: int) -> bool:
    """Whether a multiple of `every` lies in (before, after]."""
    return before // every < after // every


def evaluations_left(config: RunSettings, queries: int) -> int:
    """Returns how many evaluations come after so many queries, the one at the end of the budget included."""
    every, total = config.eval.every_queries, config.max_queries
    return (total - 1) // every - queries // every + 1 if queries < total else 0


def last_checkpoint(checkpoints: checkpoint.Checkpointer) -> str | None:
    """Names the newest checkpoint for an error message."""
    return None if checkpoints.latest is None else f"step {checkpoints.latest.step}"


def progress_values(row: dict[str, float]) -> dict[str, float]:
    """Picks what the progress bar shows."""
    shown = {"eval/rm_win_rate": "win rate", "eval/judge_win_rate": "judge's win rate"}
    shown |= {"explorer/erm_accuracy": "ERM accuracy", "train/loss": "loss"}
    return {shown[name]: row[name] for name in shown if name in row}


def main() -> None:
    """Reads the flags and trains."""
    if console.HELP_CONFIG.value:
        print(configuration.table(configuration.unchecked(console.CONFIG.value)))
        return
    config = console.CONFIG.value
    cache.keep_compiled_programs()
    console.prepare_devices()
    console.join_processes()
    workdir = Path(console.WORKDIR.value or f"runs/{config.name}-seed{config.seed}")
    train(config, workdir, ALLOW_CHANGED.value, Path(LABELS.value) if LABELS.value else None)


if __name__ == "__main__":
    console.run(main)
