"""Aligns a language model with as few preference labels as it can: `python -m sea_jax.train --config=configs/quickstart.py`."""

import functools
import math
import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import jax
import ml_collections
from absl import flags, logging
from jax.sharding import Mesh

from sea_jax import agent as sea
from sea_jax import config as configuration
from sea_jax import ensemble, evaluation, learner, losses, report, sampling, wiring
from sea_jax.actors.responder import resumable
from sea_jax.config import RunSettings
from sea_jax.data.fingerprint import fingerprint
from sea_jax.data.prompts import training_batches
from sea_jax.models.mesh import make_mesh, mesh_sizes
from sea_jax.oracles import oracle
from sea_jax.policy import check_fingerprint
from sea_jax.policy_logprobs import under_policy_and_reference
from sea_jax.runtime import cache, checkpoint, console, metrics, processes
from sea_jax.runtime.interrupts import Interrupts
from sea_jax.runtime.progress import Progress
from sea_jax.workdir import as_begun, beginning, check_prompts, check_workdir, claim, open_ledger, own_directory

flags.adopt_module_key_flags(console)  # so that --help shows --config


def train(config: ml_collections.ConfigDict, workdir: Path) -> None:
    """Runs SEA until the budget of queries is spent, or goes on where the work directory stopped.

    Args:
      config: what a configuration file returns.
      workdir: where everything is written.

    Raises:
      ValueError: a field, a file or the work directory does not fit; nothing has been spent then.
      NotFiniteError: a metric is not finite.
    """
    settings = configuration.resolve(config)
    mesh = make_mesh(settings.mesh)
    settings = replace(settings, mesh=mesh_sizes(mesh))  # what -1 stood for, so that a run goes on where it fits
    settings = replace(settings, oracle=replace(settings.oracle, scale=oracle.own_scale(settings.oracle)))
    settings = as_begun(settings, workdir)
    with jax.set_mesh(mesh):
        train_on(mesh, settings, workdir)


def train_on(mesh: Mesh, config: RunSettings, workdir: Path) -> None:
    """Runs SEA on a mesh that is set; everything else as in `train`.

    Args:
      mesh: the mesh.
      config: this run's settings.
      workdir: where everything is written.
    """
    # ----------------------------------------------------------------------------------------- Work directory, rule and loss
    fill, loss = wiring.method(config), losses.build(config.loss)
    check_workdir(workdir, config)
    begin = time.perf_counter()
    root = jax.random.key(config.seed)

    # ------------------------------------------------------------------------------- Policy, prompts, oracle, learner and ERM
    began = beginning(workdir)
    parts = wiring.parts(config, mesh, began=began)
    policy = parts.policy
    total_steps = policy_steps(config)
    learner_config = learner.configured(config.learner, total_steps=total_steps, dtype=config.policy.dtype)
    batch_size = config.data.batch_size
    batches = training_batches(
        parts.train_prompts, batch_size=batch_size, seed=config.seed, **parts.padding(config.data.bucket)
    )
    initial = functools.partial(wiring.initial_state, config, parts, total_steps)

    check_fingerprint(policy, workdir)
    prompts_id = fingerprint(parts.train_prompts, parts.heldout_prompts, policy.tokenizer)
    check_prompts(workdir, prompts_id, training=True)
    processes.by_first(
        lambda: claim(workdir, config, policy.fingerprint, prompts_id, began), None, "the work directory"
    )
    with (
        open_ledger(workdir / "queries.jsonl") as ledger,  # first, since it keeps other runs out
        checkpoint.open_directory(workdir / "checkpoints", config.checkpoint.keep) as checkpoints,
        wiring.responder(config, parts, batches.__getitem__, workdir / "responses") as responder,
        Interrupts() as interrupts,
    ):
        passive = sea.Agent(
            prompts=batches.__getitem__,
            respond=responder.respond,
            texts=parts.texts,
            features=parts.features,
            logprobs=under_policy_and_reference(policy, config.policy.dtype, config.sampling.batch_size),
            rule=sampling.passive,
            assign=sea.all_to_oracle,
            oracle=oracle.oracle(config.oracle, parts.preference),
            ledger=ledger,
            learn_rewards=jax.jit(functools.partial(ensemble.update, config=config.erm)),
            lessons=sea.labelled_duels,
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
            standardise=config.erm.standardise,
        )
        agent = fill(passive, policy)

        # ---------------------------------------------------------------------------------------------------------- Resume
        restored = None
        if checkpoints.latest is not None:  # two states are never there at once: the devices may not have room
            restored = checkpoint.restore(checkpoints, checkpoint.abstract(initial()))
        state = initial() if restored is None else restored[1]
        if restored is not None:
            logging.info("going on from the checkpoint of step %d, %d queries paid for", state.step, state.queries)

        # ------------------------------------------------------------------------------------------------------ Evaluation
        heldout = wiring.heldout_evaluation(config, parts, config.eval.best_of_n)

        def evaluated(state: sea.State, writer: metrics.Writer) -> dict[str, float]:
            chooser = state.ensemble if state.queries >= config.max_queries else None
            row, samples = evaluation.evaluate(
                heldout, config.eval, state.learner.trained, int(state.learner.step), state.step, chooser
            )
            for sample in samples:
                writer.sample(sample)
            return row

        def save(state: sea.State) -> None:
            responder.settle()
            checkpoint.save(checkpoints, state.step, state)
            responder.checkpointed(state.batches)

        # ------------------------------------------------------------------------------------------------------ Training
        with (
            processes.together(
                lambda: metrics.Writer(own_directory(workdir), start_step=state.step), "the metrics"
            ) as writer,
            Progress(config.max_queries, "query", state.queries) as progress,
        ):
            if state.step == 0:
                row = counters(state) | evaluated(state, writer)
                writer.write(0, row)
                save(state)
            idle_steps, stopping, save_due = 0, False, False
            while state.queries < config.max_queries and not stopping:
                queries_before, start = state.queries, time.perf_counter()
                state, row = sea.step(agent, state, sea.step_key(root, state.step))
                row |= {"misc/step_time": time.perf_counter() - start} | counters(state)
                metrics.check_finite(row, state.step, last_checkpoint(checkpoints))
                done = state.queries >= config.max_queries
                if crossed(queries_before, state.queries, config.eval.every_queries) or done:
                    row |= evaluated(state, writer)
                writer.write(state.step, row)
                progress.update(state.queries, progress_values(row), important="eval/rm_win_rate" in row)
                can_resume = resumable(int(state.learner.step), config.actor.sync_every)
                stopping = processes.any_of(interrupts.requested) and can_resume
                save_due = save_due or state.step % config.checkpoint.every_steps == 0
                if (save_due and can_resume) or done or stopping:
                    save(state)
                    save_due = False
                idle_steps = 0 if row["explorer/pairs"] else idle_steps + 1
                check_idle(idle_steps, row, state.step)

    if stopping:
        logging.warning("stopped at step %d and saved; the same command goes on from there", state.step)
        sys.exit(130)
    if processes.is_first():
        path = report.write(workdir)
        print(path.read_text())
        print(
            f"{time.perf_counter() - begin:.0f} s in all. Everything is in {workdir.absolute()}; the report is {path}"
        )


MAX_IDLE_STEPS = 20  # steps without a pair after which a run gives up


def check_idle(idle_steps: int, row: Mapping[str, float], step: int) -> None:
    """Ends a run that cannot go on by itself.

    Args:
      idle_steps: steps in a row without a labelled pair.
      row: metrics of the last of them.
      step: its number.

    Raises:
      ValueError: there were MAX_IDLE_STEPS.
    """
    if idle_steps < MAX_IDLE_STEPS:
        return
    if row["explorer/unanswered"]:
        raise ValueError(
            f"no answer in {MAX_IDLE_STEPS} steps up to step {step}: the oracle was asked and said nothing. Nothing was "
            "counted; see what keeps it, and start the same command again"
        )
    raise ValueError(
        f"no pair in {MAX_IDLE_STEPS} steps up to step {step}: the candidates of every prompt are the same text. The policy "
        "has collapsed: lower config.learner.learning_rate, or raise config.sampling.temperature or config.loss.beta, and "
        "start anew"
    )


def policy_steps(config: RunSettings) -> int:
    """Returns how many policy steps the budget will take if every prompt has two different candidates, for the schedule."""
    burnt, batch = min(config.exploration.burn_in_queries, config.max_queries), config.data.batch_size
    oracle_steps = burnt / batch + (config.max_queries - burnt) / (batch * config.exploration.gamma)
    planned = max(config.max_queries - config.exploration.planning_after_queries, 0) / config.max_queries
    return math.ceil(oracle_steps * (1 + config.exploration.planning_steps * planned))


def counters(state: sea.State) -> dict[str, float]:
    """Returns a run's two clocks: queries paid for and policy steps taken."""
    return {"misc/query_step": state.queries, "misc/gradient_steps": int(state.learner.step)}


def crossed(before: int, after: int, every: int) -> bool:
    """Whether a multiple of `every` lies in (before, after]."""
    return before // every < after // every


def last_checkpoint(checkpoints: checkpoint.Checkpointer) -> str | None:
    """Names the newest checkpoint for an error message."""
    return None if checkpoints.latest is None else f"step {checkpoints.latest.step}"


def progress_values(row: dict[str, float]) -> dict[str, float]:
    """Picks what the progress bar shows."""
    shown = {"eval/rm_win_rate": "win rate", "explorer/erm_accuracy": "ERM accuracy", "train/loss": "loss"}
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
    train(config, Path(console.WORKDIR.value or f"runs/{config.name}-seed{config.seed}"))


if __name__ == "__main__":
    console.run(main)
