"""The SEA agent: Algorithm 2 of the paper, line by line, for a batch of prompts."""

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from sea_jax import ensemble, sampling
from sea_jax.ensemble import Ensemble
from sea_jax.features import Featurize
from sea_jax.learner import Learner
from sea_jax.oracles.labelling import Question, label
from sea_jax.oracles.ledger import Ledger
from sea_jax.replay import Replay, add_pairs
from sea_jax.types import Array, Candidates, Duel, DuelRule, Oracle, PreferenceBatch, Prompts, Respond

Metrics = dict[str, float]


@dataclass(frozen=True)
class ExplorationConfig:
    """Which pairs are labelled by whom.

    Attributes:
      max_queries: oracle labels in all.
      gamma: probability that a duel goes to the oracle; else the ERM labels a pair.
      burn_in_queries: gamma is 1 until so many labels are paid for.
      erm_share: who is left to the ERM: "drawn" (each prompt with probability 1 - gamma) or "fixed" (always
        floor((1 - gamma) B) random prompts of a batch, the authors' code).
      erm_pair: what the ERM labels: "duel" (the duel's own pair) or "max_margin" (a random head's best and worst).
      erm_label: how: "head" (a random head's choice) or "mean" (the mean over heads of P(first wins)).
      planning_steps: extra policy steps per oracle step, on fresh prompts with ERM-labelled pairs (Dyna).
      planning_after_queries: no planning before so many labels are paid for.
    """

    max_queries: int
    gamma: float = 0.7
    burn_in_queries: int = 1000
    erm_share: str = "drawn"
    erm_pair: str = "duel"
    erm_label: str = "head"
    planning_steps: int = 0
    planning_after_queries: int = 128


@struct.dataclass
class State:
    """All that a run is, between two steps.

    Attributes:
      learner: the policy.
      ensemble: the ERM.
      replay: oracle-labelled experience D.
      step: oracle steps taken.
      queries: oracle labels paid for.
      batches: batches of prompts used.
    """

    learner: Learner
    ensemble: Ensemble
    replay: Replay
    step: int
    queries: int
    batches: int


@dataclass(frozen=True)
class Agent:
    """The agent's behaviour, as functions.

    Attributes:
      prompts: batch number -> {"id", "prompt", "tokens" [B, P], "valid" [B, P]}.
      respond: batch number, trained parameters, Prompts, key, policy steps -> Candidates, metrics.
      texts: Candidates -> B lists of M response texts.
      features: what the ERM sees of them, [B, M, d].
      rule: the duel rule.
      oracle: labels duels.
      ledger: every label, on disk before it is used.
      learn_rewards: Ensemble, Replay, key -> Ensemble, metrics.
      learn_policy: Learner, PreferenceBatch -> Learner, metrics.
      exploration: ExplorationConfig.
      standardise: the ERM's features are divided by their spread, see `ensemble.calibrate`.
    """

    prompts: Callable[[int], Mapping[str, Any]]
    respond: Respond
    texts: Callable[[Candidates], list[list[str]]]
    features: Featurize
    rule: DuelRule
    oracle: Oracle
    ledger: Ledger
    learn_rewards: Callable[[Ensemble, Replay, Array], tuple[Ensemble, dict[str, Array]]]
    learn_policy: Callable[[Learner, PreferenceBatch], tuple[Learner, dict[str, Array]]]
    exploration: ExplorationConfig
    standardise: bool


KEYS = ("generate", "duel", "gamma", "oracle", "head", "rewards", "plan")  # what a step's key is split for


def generation_key(key: Array) -> Array:
    """Returns the key that a step's responses are drawn with.

    Args:
      key: random key of the step.
    """
    return _named_keys(key, *KEYS)["generate"]


def step(agent: Agent, state: State, key: Array) -> tuple[State, Metrics]:
    """Takes one step of Algorithm 2, and `planning_steps` policy steps on the ERM's word after it.

    Args:
      agent: Agent.
      state: State.
      key: random key of this step.

    Returns:
      State and the step's metrics.
    """
    metrics: Metrics = {}
    keys = _named_keys(key, *KEYS)
    batch, state = _next_prompts(agent, state)  # line 3
    with _timed(metrics, "actor/generate_time"):
        proposal = _propose(agent, state, batch, keys["generate"], metrics)  # line 4
        state = _calibrated(agent, state, proposal.candidates)
        rewards = ensemble.rewards(state.ensemble, proposal.candidates.features)
        duel = agent.rule(rewards, proposal.distinct, keys["duel"])  # lines 5 to 7
    with _timed(metrics, "actor/oracle_time"):
        to_oracle, to_erm = _who_labels(agent.exploration, state, proposal, duel, keys["gamma"])  # line 8
        erm_duel, erm_labels = _erm_label(agent.exploration, rewards, proposal.distinct, duel, keys["head"])
        duel = jax.tree.map(lambda own, erm: jnp.where(to_erm, erm, own), duel, erm_duel)
        labels = _label(agent, state, batch, proposal, duel, to_oracle, to_erm, erm_labels, keys["oracle"])
    with _timed(metrics, "train/rm/learn_time"):
        features = _take(proposal.candidates.features, duel)
        replay = add_pairs(state.replay, features, labels, to_oracle)
        reward_model, erm_metrics = agent.learn_rewards(state.ensemble, replay, keys["rewards"])  # line 9
        jax.block_until_ready(reward_model)
    with _timed(metrics, "train/learn_time"):
        pairs = _preferences(batch, proposal.candidates, duel, labels, to_oracle | to_erm)
        learner, policy_metrics = agent.learn_policy(state.learner, pairs)  # line 10
        jax.block_until_ready(learner)
    metrics |= _duel_metrics(rewards, proposal, duel, labels, to_oracle, to_erm)
    metrics |= {f"train/{name}": float(value) for name, value in policy_metrics.items()}
    metrics |= {"train/rm/loss_rew": float(erm_metrics["loss"]), "train/rm/acc_rew": float(erm_metrics["accuracy"])}
    state = replace(
        state,
        learner=learner,
        ensemble=reward_model,
        replay=replay,
        step=state.step + 1,
        queries=state.queries + int(to_oracle.sum()),
    )
    if state.queries >= agent.exploration.planning_after_queries:
        for index in range(agent.exploration.planning_steps):
            state = _plan(agent, state, index, jax.random.fold_in(keys["plan"], index), metrics)
    return state, metrics


def _plan(agent: Agent, state: State, index: int, key: Array, metrics: Metrics) -> State:
    """One policy step on fresh prompts: the ensemble mean's best response against its worst, softly labelled by the ERM."""
    keys = _named_keys(key, "generate", "duel", "oracle")
    batch, state = _next_prompts(agent, state)
    with _timed(metrics, "plan/generate_time"):
        proposal = _propose(agent, state, batch, keys["generate"], metrics)
        rewards = ensemble.rewards(state.ensemble, proposal.candidates.features)
        duel = sampling.best_against_worst(rewards, proposal.distinct, keys["duel"])
        nobody, to_erm = jnp.zeros(len(batch["id"]), bool), _differ(proposal, duel)
        erm_labels = sampling.mean_label(rewards, duel)
        labels = _label(
            agent, state, batch, proposal, duel, nobody, to_erm, erm_labels, keys["oracle"], suffix=f"-plan{index}"
        )
    with _timed(metrics, "plan/learn_time"):
        learner, report = agent.learn_policy(
            state.learner, _preferences(batch, proposal.candidates, duel, labels, to_erm)
        )
        jax.block_until_ready(learner)
    metrics |= {"plan/loss": float(report["loss"]), "plan/label": float(labels.mean())}
    return replace(state, learner=learner)


@dataclass(frozen=True)
class _Proposal:
    """The candidates S_t of a batch, their texts, and which of them differ: distinct [B, M, M]."""

    candidates: Candidates
    texts: Sequence[Sequence[str]]
    distinct: Array


def _named_keys(key: Array, *names: str) -> dict[str, Array]:
    """Splits a key once into named ones."""
    return dict(zip(names, jax.random.split(key, len(names)), strict=True))


@contextlib.contextmanager
def _timed(metrics: Metrics, name: str) -> Iterator[None]:
    """Adds the seconds spent inside to a metric."""
    start = time.perf_counter()
    yield
    metrics[name] = metrics.get(name, 0.0) + time.perf_counter() - start


def _next_prompts(agent: Agent, state: State) -> tuple[Mapping[str, Any], State]:
    return agent.prompts(state.batches), replace(state, batches=state.batches + 1)


def _propose(agent: Agent, state: State, batch: Mapping[str, Any], key: Array, metrics: Metrics) -> _Proposal:
    """Samples M responses per prompt from the current policy."""
    learner, prompts = state.learner, Prompts(batch["tokens"], batch["valid"])
    candidates, written = agent.respond(state.batches - 1, learner.trained, prompts, key, int(learner.step))
    metrics |= written
    texts = agent.texts(candidates)
    candidates = replace(candidates, features=agent.features(batch, candidates, texts))
    group = np.array([[row.index(text) for text in row] for row in texts])  # the first candidate with the same text
    return _Proposal(candidates, texts, jnp.asarray(group[:, :, None] != group[:, None, :]))


def _calibrated(agent: Agent, state: State, candidates: Candidates) -> State:
    """Until the ERM has learnt from a label its features are standardised by the candidates at hand."""
    if not agent.standardise or int(state.replay.added):
        return state
    return replace(state, ensemble=ensemble.calibrate(state.ensemble, candidates.features))


def _differ(proposal: _Proposal, duel: Duel) -> Array:
    """Whether the duellists' texts differ: [B] bool. Also holds a rule of the user's to never ask about twins."""
    return proposal.distinct[jnp.arange(duel.first.shape[0]), duel.first, duel.second]


def _who_labels(
    config: ExplorationConfig, state: State, proposal: _Proposal, duel: Duel, key: Array
) -> tuple[Array, Array]:
    """Which rows the oracle labels, and which the ERM: two [B] bool; rows of twins, or beyond the budget, are neither."""
    gamma = config.gamma if state.queries >= config.burn_in_queries else 1.0
    differ = _differ(proposal, duel)
    draws = jax.random.uniform(key, differ.shape)
    if config.erm_share == "fixed":
        num_oracle = len(draws) - math.floor((1 - gamma) * len(draws) + 1e-9)  # a tenth of ten is one, also in binary
        oracle_turn = draws.argsort().argsort() < num_oracle
    else:
        oracle_turn = draws < gamma
    to_oracle = differ & oracle_turn
    within_budget = jnp.cumsum(to_oracle) <= config.max_queries - state.queries
    return to_oracle & within_budget, differ & ~oracle_turn


def _erm_label(
    config: ExplorationConfig, rewards: Array, distinct: Array, duel: Duel, key: Array
) -> tuple[Duel, Array]:
    """The pair that the ERM labels in each row, and its label [B]."""
    if config.erm_pair == "max_margin":
        duel = sampling.max_margin(rewards, distinct, key)
        value = jnp.ones(duel.first.shape, jnp.float32)  # the head that chose the pair prefers its first response
    else:
        value = sampling.head_label(rewards, duel, key)
    return duel, sampling.mean_label(rewards, duel) if config.erm_label == "mean" else value


def _label(
    agent: Agent,
    state: State,
    batch: Mapping[str, Any],
    proposal: _Proposal,
    duel: Duel,
    to_oracle: Array,
    to_erm: Array,
    erm_labels: Array,
    key: Array,
    suffix: str = "",
) -> Array:
    """Labels the chosen rows: [B] float32, one half in the rows that nobody labels."""
    first, second, by_erm = np.asarray(duel.first), np.asarray(duel.second), np.asarray(to_erm)
    rows = np.flatnonzero(np.asarray(to_oracle) | by_erm).tolist()
    questions = [
        Question(
            key=f"{state.step}{suffix}-{row}",
            step=state.step,
            prompt_id=batch["id"][row],
            prompt=batch["prompt"][row],
            first=proposal.texts[row][first[row]],
            second=proposal.texts[row][second[row]],
            erm_label=float(erm_labels[row]) if by_erm[row] else None,
        )
        for row in rows
    ]
    labels = np.full(len(first), 0.5, np.float32)
    if questions:
        labels[rows] = label(questions, agent.oracle, agent.ledger, jax.random.split(key, len(first))[jnp.array(rows)])
    return jnp.asarray(labels)


def _take(values: Array, duel: Duel) -> Array:
    """Picks the duellists: values [B, M, ...], Duel [B] -> [B, 2, ...]."""
    rows = jnp.arange(duel.first.shape[0])
    return jnp.stack([values[rows, duel.first], values[rows, duel.second]], axis=1)


def _preferences(
    batch: Mapping[str, Any], candidates: Candidates, duel: Duel, labels: Array, kept: Array
) -> PreferenceBatch:
    return PreferenceBatch(
        prompts=Prompts(jnp.asarray(batch["tokens"]), jnp.asarray(batch["valid"])),
        tokens=_take(candidates.tokens, duel),
        lengths=_take(candidates.lengths, duel),
        labels=labels,
        weights=kept.astype(jnp.float32),
    )


def _duel_metrics(
    rewards: Array, proposal: _Proposal, duel: Duel, labels: Array, to_oracle: Array, to_erm: Array
) -> Metrics:
    """What the log says of a step's duels."""
    mean_probability = np.asarray(sampling.mean_label(rewards, duel))
    asked, kept = np.asarray(to_oracle), np.asarray(to_oracle | to_erm)
    best = np.asarray(rewards.argmax(-1))  # [K, B]
    metrics = {
        "actor/init_clash_ratio": float((best == best[:1]).all(0).mean()),
        "actor/response_length": float(proposal.candidates.lengths.mean()),
        "actor/distinct_ratio": float(np.mean([len(set(row)) / len(row) for row in proposal.texts])),
        "explorer/model_data_ratio": float(np.asarray(to_erm).sum() / max(kept.sum(), 1)),
        "explorer/pairs": int(kept.sum()),
        "explorer/head_spread": float(rewards.std(0).mean()),
    }
    if asked.any():  # how well the ERM foresaw the labels it has not learnt from yet
        agrees = (mean_probability > 0.5) == (np.asarray(labels) > 0.5)
        metrics["explorer/erm_accuracy"] = float(agrees[asked].mean())
    return metrics
