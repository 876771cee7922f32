"""Aligns a language model with as few preference labels as it can: `python -m sea_jax.train --config=configs/quickstart.py`."""

import functools
import json
import math
import sys
import time
from pathlib import Path
from typing import Any

import jax
import ml_collections
from absl import flags, logging

from sea_jax import (
    actors,
    cache,
    checkpoint,
    console,
    data,
    ensemble,
    evaluate,
    experience,
    learner,
    metrics,
    report,
    wiring,
)
from sea_jax import agent as sea
from sea_jax import config as configuration
from sea_jax.ensemble import EnsembleConfig
from sea_jax.interrupts import Interrupts

flags.adopt_module_key_flags(console)  # so that --help shows --config
WORKDIR = flags.DEFINE_string("workdir", None, "Directory for everything the run writes; default runs/NAME-seedSEED.")


def train(config: ml_collections.ConfigDict, workdir: Path) -> None:
    """Runs SEA until the budget of queries is spent, or goes on where the work directory stopped.

    Args:
      config: a configuration that `config.validate` accepts.
      workdir: where everything is written.

    Raises:
      ValueError: a field, a file or the work directory does not fit; nothing has been spent then.
      NotFiniteError: a metric is not finite.
    """
    # ------------------------------------------------------------------------------------------------- Checks, work directory
    configuration.validate(config)
    rule, loss = wiring.rule(config.exploration.rule), wiring.loss(config.loss)
    check_workdir(workdir, config)
    begin = time.perf_counter()
    root = jax.random.key(config.seed)

    # -------------------------------------------------------------------------------------------------- Policy, prompts, oracle
    policy = wiring.policy(config.policy.source, config.policy.train_last_layers, config.erm.feature_layer)
    train_prompts, heldout_prompts = wiring.prompts(config.data, policy.tokenizer, config.eval.num_prompts)
    padding = {"pad_id": policy.tokenizer.pad_id, "bucket": config.data.bucket}
    batch_size = config.data.batch_size
    batches = data.prompts(train_prompts, batch_size=batch_size, seed=config.seed, **padding)
    heldout = list(data.once(heldout_prompts, batch_size=config.eval.batch_size, **padding))
    preference = wiring.preference(config.oracle)

    # ------------------------------------------------------------------------------------------------------- Actors, features
    how = functools.partial(wiring.sampling_config, config, policy)
    sampler = how(
        num_samples=config.sampling.num_samples,
        max_new_tokens=config.sampling.max_new_tokens,
        temperature=config.sampling.temperature,
    )
    features = wiring.featurize(config.erm, policy, sampler)
    texts = wiring.texts(policy.tokenizer)
    actor = functools.partial(actors.in_process, policy.frozen, policy.config)
    greedy = actor(how(num_samples=1, max_new_tokens=config.eval.max_new_tokens, temperature=0.0))
    many = actor(
        how(
            num_samples=max(config.eval.best_of_n, 1),
            max_new_tokens=config.eval.max_new_tokens,
            temperature=config.sampling.temperature,
        )
    )

    # -------------------------------------------------------------------------------------------------------- Learner, ERM
    total_steps = policy_steps(config)
    learner_config = wiring.learner_config(config.learner, config.policy.dtype, total_steps)
    erm = config.erm.to_dict()
    capacity = max(min(erm.pop("replay_capacity"), config.max_queries), batch_size)
    ensemble_config = EnsembleConfig(**{name: erm[name] for name in EnsembleConfig.__dataclass_fields__})
    num_features = wiring.num_features(config.erm, policy)
    state = sea.State(
        learner=learner.init(policy.reference, learner_config),
        ensemble=ensemble.init(ensemble_config, num_features, jax.random.fold_in(root, 0)),
        replay=experience.empty_replay(capacity, num_features),
        step=0,
        queries=0,
        batches=0,
    )

    claim(workdir, config)
    with (
        checkpoint.open_directory(workdir / "checkpoints", config.checkpoint.keep) as checkpoints,
        experience.Ledger(workdir / "queries.jsonl") as ledger,
        Interrupts() as interrupts,
    ):
        agent = sea.Agent(
            prompts=batches.__getitem__,
            generate=actor(sampler),
            texts=texts,
            features=features,
            rule=rule,
            oracle=wiring.oracle(config.oracle, preference),
            ledger=ledger,
            learn_rewards=jax.jit(functools.partial(ensemble.update, config=ensemble_config)),
            learn_policy=lambda state, pairs: learner.update(
                state,
                policy.frozen,
                policy.reference,
                pairs,
                loss=loss,
                config=policy.config,
                learner_config=learner_config,
            ),
            exploration=sea.ExplorationConfig(max_queries=config.max_queries, **exploration_fields(config)),
        )

        # ---------------------------------------------------------------------------------------------------------- Resume
        restored = checkpoint.restore(checkpoints, state)
        if restored is not None:
            state = restored[1]
            logging.info("going on from the checkpoint of step %d, %d queries paid for", state.step, state.queries)

        # ------------------------------------------------------------------------------------------------------ Evaluation
        evaluation = evaluate.Evaluation(
            records=[one.record for one in heldout_prompts],
            preference=preference,
            initial=evaluate.greedy(greedy, texts, policy.reference, heldout),
        )

        def evaluated(state: sea.State, writer: metrics.Writer) -> dict[str, float]:
            start = time.perf_counter()
            trained = state.learner.trained
            now = evaluate.greedy(greedy, texts, trained, heldout) if state.step else evaluation.initial
            row, probability = evaluate.measure(evaluation, now, "rm")
            for sample in evaluate.samples(evaluation, now, probability, state.step):
                writer.sample(sample)
            if state.queries >= config.max_queries and config.eval.best_of_n:
                few = list(
                    data.once(heldout_prompts[: config.eval.best_of_n_prompts], batch_size=batch_size, **padding)
                )
                best = evaluate.best_of_n(many, texts, features, trained, state.ensemble, few, root)
                row |= evaluate.measure(evaluation, best, "bon")[0]
            initial_length = float(evaluation.initial.lengths.mean())
            return row | {
                "eval/initial_response_length": initial_length,
                "eval/elapsed_time": time.perf_counter() - start,
            }

        # ------------------------------------------------------------------------------------------------------ Training
        with (
            metrics.Writer(workdir, start_step=state.step) as writer,
            metrics.Progress(config.max_queries, "query", state.queries) as progress,
        ):
            if state.step == 0:
                row = counters(state) | evaluated(state, writer)
                writer.write(0, row)
                checkpoint.save(checkpoints, 0, state)
            idle_steps = 0
            while state.queries < config.max_queries and not interrupts.requested:
                queries_before, start = state.queries, time.perf_counter()
                state, row = sea.step(agent, state, jax.random.fold_in(root, state.step + 1))
                row |= {"misc/step_time": time.perf_counter() - start} | counters(state)
                metrics.check_finite(row, state.step, last_checkpoint(checkpoints))
                done = state.queries >= config.max_queries
                if crossed(queries_before, state.queries, config.eval.every_queries) or done:
                    row |= evaluated(state, writer)
                writer.write(state.step, row)
                progress.update(state.queries, progress_values(row), important="eval/rm_win_rate" in row)
                if state.step % config.checkpoint.every_steps == 0 or done:
                    checkpoint.save(checkpoints, state.step, state)
                idle_steps = 0 if state.queries > queries_before else idle_steps + 1
                if idle_steps == MAX_IDLE_STEPS:
                    raise ValueError(
                        f"no query in {MAX_IDLE_STEPS} steps up to step {state.step}: the candidates of every prompt are "
                        "the same text. The policy has collapsed: lower config.learner.learning_rate, or raise "
                        "config.sampling.temperature or config.loss.beta, and start anew"
                    )
            if interrupts.requested:
                checkpoint.save(checkpoints, state.step, state)

    if interrupts.requested:
        logging.warning("stopped at step %d and saved; the same command goes on from there", state.step)
        sys.exit(130)
    path = report.write(workdir)
    print(path.read_text())
    print(
        f"{time.perf_counter() - begin:.0f} s in all. Everything written is in {workdir.absolute()}; the report is {path}"
    )


MAX_IDLE_STEPS = 20  # steps without a query after which a run gives up


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


def claim(workdir: Path, config: ml_collections.ConfigDict) -> None:
    """Makes the work directory and leaves the configuration in it.

    Args:
      workdir: where everything is written.
      config: this run's configuration.
    """
    workdir.mkdir(parents=True, exist_ok=True)
    unfinished = workdir / "config.json.tmp"
    unfinished.write_text(json.dumps(json.loads(config.to_json()), indent=2) + "\n")
    unfinished.rename(workdir / "config.json")


def exploration_fields(config: ml_collections.ConfigDict) -> dict[str, Any]:
    """Returns the fields of `exploration` but the rule's name."""
    return {name: value for name, value in config.exploration.items() if name != "rule"}


def policy_steps(config: ml_collections.ConfigDict) -> int:
    """Returns how many policy steps the budget will take, for the learning rate's schedule.

    Args:
      config: a whole configuration.

    Returns:
      The number expected if every prompt has two different candidates.
    """
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
    config = console.CONFIG.value
    cache.keep_compiled_programs()
    train(config, Path(WORKDIR.value or f"runs/{config.name}-seed{config.seed}"))


if __name__ == "__main__":
    console.run(main)
