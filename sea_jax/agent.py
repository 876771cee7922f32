"""One step of any method: propose, choose, assign, label, learn rewards, learn the policy (SEA paper, Algorithm 2).

A method is an `Agent`: a value whose slots are functions. Nothing here knows which method it is.
"""

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

from sea_jax import ensemble, open_pairs, sampling
from sea_jax.ensemble import Ensemble
from sea_jax.features import Featurize
from sea_jax.learner import Learner
from sea_jax.open_pairs import OpenPairs
from sea_jax.oracles.labelling import ORACLE, Question, label, label_late
from sea_jax.oracles.ledger import Ledger
from sea_jax.policy import Policy
from sea_jax.replay import Replay, add_pairs
from sea_jax.settings import NOT_NEGATIVE, one_of, one_of_or_user, setting
from sea_jax.types import (
    Array,
    Candidates,
    Duel,
    DuelRule,
    LateOracle,
    Oracle,
    Params,
    PreferenceBatch,
    Prompts,
    Respond,
)

Metrics = dict[str, float]


@dataclass(frozen=True)
class ExplorationSettings:
    """Which pairs are labelled by whom."""

    rule: str = setting(
        "bai_ts",
        "duel rule by name, those named _oat as in the authors' code; or my_module:my_rule",
        one_of_or_user(sampling.RULES),
    )
    width: float | None = setting(
        None,
        "half-width of a reward's interval, in standard deviations over the heads, of the rules that have them; None: the "
        "rule's own",
        (lambda v: v is None or 0 < v < math.inf, "a finite number above 0, or None for the rule's own default"),
    )
    gamma: float = setting(
        0.7,
        "probability that the oracle labels a duel; else the ERM labels a pair",
        (lambda v: 0 < v <= 1, "a number above 0 and up to 1"),
        source="authors' code; mixture ratio of Eq. 9",
    )
    asked_prompts: int = setting(
        0, "prompts of a batch that go on, where the method selects them (apl); 0: all", NOT_NEGATIVE, unit="prompts"
    )
    burn_in_queries: int = setting(1000, "gamma is 1 until so many queries are paid for", NOT_NEGATIVE, unit="queries")
    erm_share: str = setting(
        "drawn",
        'who is left to the ERM: "drawn", each prompt with probability 1 - gamma (paper), or "fixed", always '
        "floor((1 - gamma) B) random prompts of a batch (authors' code)",
        one_of("drawn", "fixed"),
    )
    erm_pair: str = setting(
        "duel",
        'what the ERM labels: "duel", the rule\'s own pair (paper), or "max_margin", a random head\'s best and worst '
        "(authors' code)",
        one_of("duel", "max_margin"),
    )
    erm_label: str = setting(
        "head",
        'how: "head", a random head\'s choice (paper), or "mean": soft, mean over heads of P(first wins)',
        one_of("head", "mean"),
    )
    unfinished: str = setting(
        "asked",
        'pairs with a response that was cut at sampling.max_new_tokens: "asked" as all are, "left_out", or "lose" to one that '
        "ended by itself, without the oracle",
        one_of("asked", "left_out", "lose"),
    )
    planning_steps: int = setting(0, "policy steps on fresh ERM-labelled pairs per oracle step (Dyna)", NOT_NEGATIVE)
    planning_after_queries: int = setting(128, "no planning before so many queries", NOT_NEGATIVE, unit="queries")


@struct.dataclass
class State:
    """All that a run is, between two steps.

    Attributes:
      learner: the policy.
      ensemble: the ERM.
      replay: oracle-labelled experience D.
      step: steps taken in which the oracle could be asked.
      queries: oracle labels paid for.
      batches: batches of prompts used.
      open: pairs that the oracle may still answer; None: it answers at once or never.
    """

    learner: Learner
    ensemble: Ensemble
    replay: Replay
    step: int
    queries: int
    batches: int
    open: OpenPairs | None = None


@dataclass(frozen=True)
class Proposal:
    """What was written to a batch of B prompts, and what can be known of it before anybody is asked.

    Attributes:
      batch: {"id", "prompt", "tokens" [B, P], "valid" [B, P]}.
      candidates: M responses to each prompt.
      texts: B lists of M.
      distinct: [B, M, M] bool, whether two responses differ, and may be compared.
      finished: [B, M] bool, whether a response ended by itself.
      rewards: [K, B, M] float32, of every head.
      seen: what the rules ask for of `sampling.SEES`, by name.
    """

    batch: Mapping[str, Any]
    candidates: Candidates
    texts: Sequence[Sequence[str]]
    distinct: Array
    finished: Array
    rewards: Array
    seen: Mapping[str, Array]

    @property
    def prompts(self) -> Prompts:
        """The prompts as token ids."""
        return Prompts(jnp.asarray(self.batch["tokens"]), jnp.asarray(self.batch["valid"]))

    def rows(self, rows: Array) -> "Proposal":
        """Returns the proposal of some of the prompts, [b] int32."""
        numbers = np.asarray(rows).tolist()
        batch = {
            name: [column[row] for row in numbers] if isinstance(column, list) else column[np.asarray(rows)]
            for name, column in self.batch.items()
        }
        return Proposal(
            batch=batch,
            candidates=jax.tree.map(lambda x: x[rows], self.candidates),
            texts=[self.texts[row] for row in numbers],
            distinct=self.distinct[rows],
            finished=self.finished[rows],
            rewards=self.rewards[:, rows],
            seen={name: value[rows] for name, value in self.seen.items()},
        )


@dataclass(frozen=True)
class Assignment:
    """Who labels which pair.

    Attributes:
      duel: the pair of each prompt, [B].
      to_oracle: [B] bool.
      to_erm: [B] bool.
      erm_labels: [B] float32, what the ERM says where it labels.
      cut: [B] bool, of those that the ERM labels: which are labelled by who was cut, instead; None: none.
    """

    duel: Duel
    to_oracle: Array
    to_erm: Array
    erm_labels: Array
    cut: Array | None = None


@dataclass(frozen=True)
class Experience:
    """What a step ends with, for the policy to learn from.

    Attributes:
      proposal: Proposal.
      duel: the pair of each prompt, [B].
      labels: [B] float32, probability that the first wins; one half where nobody labelled.
      labelled: [B] bool.
      reward_model: the ERM after it has learnt.
    """

    proposal: Proposal
    duel: Duel
    labels: Array
    labelled: Array
    reward_model: Ensemble


Select = Callable[..., Array]
"""Which prompts go on: as a DuelRule, but -> [b] int32, rows of the batch; b must be the same at every step."""

Assign = Callable[[Proposal, Duel, int, Mapping[str, Array]], Assignment]
"""Who labels: proposal, the rule's duel, queries paid for, the step's named keys -> Assignment."""

FillSlots = Callable[["Agent", Policy], "Agent"]
"""What a method makes of its settings: an agent with every slot filled as in passive online learning, the policy -> its own."""

LearnRewards = Callable[[Ensemble, Replay, Array], tuple[Ensemble, dict[str, Array]]]
LearnPolicy = Callable[[Learner, Any], tuple[Learner, dict[str, Array]]]


@dataclass(frozen=True)
class Planning:
    """Steps between two steps of an agent, in which nobody is asked.

    Attributes:
      agent: takes them.
      steps: how many.
      after_queries: none before so many queries are paid for.
    """

    agent: "Agent"
    steps: int
    after_queries: int


@dataclass(frozen=True)
class Agent:
    """A method, as functions.

    Attributes:
      prompts: batch number -> a batch of prompts, see `Proposal`.
      respond: batch number, trained parameters, Prompts, key, policy steps -> Candidates, metrics.
      texts: Candidates -> B lists of M response texts.
      finished: Candidates -> which of them ended by themselves, [B, M].
      unfinished: what becomes of pairs with one that did not, see `ExplorationSettings`.
      features: what the ERM sees of them, [B, M, d].
      logprobs: trained parameters, Prompts, Candidates -> [B, M] under the policy and [B, M] under the reference.
      select: which prompts of a batch go on; None: all.
      rule: the duel rule.
      assign: who labels.
      oracle: labels duels.
      ledger: every label, on disk before it is used.
      max_queries: oracle labels in all.
      batch_size: prompts of a batch.
      learn_rewards: Ensemble, Replay, key -> Ensemble, metrics; None: there is no reward model to learn.
      standardise: the ERM's features are divided by their spread, see `ensemble.calibrate`.
      lessons: Experience -> what the policy learns from.
      policy_learns_late: it learns from pairs that are answered after their step, `batch_size` labelled ones at a time; else
        these teach the ERM alone.
      learn_policy: Learner, lessons -> Learner, metrics; None: the policy stays as it is.
      planning: steps in between; None: none.
    """

    prompts: Callable[[int], Mapping[str, Any]]
    respond: Respond
    texts: Callable[[Candidates], list[list[str]]]
    finished: Callable[[Candidates], np.ndarray]
    unfinished: str
    features: Featurize
    logprobs: Callable[[Params, Prompts, Candidates], tuple[Array, Array]]
    rule: DuelRule
    assign: Assign
    oracle: Oracle
    ledger: Ledger
    max_queries: int
    batch_size: int
    learn_rewards: LearnRewards | None
    standardise: bool
    lessons: Callable[[Experience], Any]
    policy_learns_late: bool
    learn_policy: LearnPolicy | None
    select: Select | None = None
    planning: Planning | None = None


def all_to_oracle(proposal: Proposal, duel: Duel, queries: int, keys: Mapping[str, Array]) -> Assignment:
    """Every duel is the oracle's to label."""
    everybody = jnp.ones(duel.first.shape, bool)
    return Assignment(duel, everybody, ~everybody, jnp.zeros(duel.first.shape))


KEYS = ("generate", "duel", "gamma", "oracle", "head", "rewards", "plan", "select")  # what a step's key is split for


def step_key(root: Array, number: int) -> Array:
    """Returns the key of a step.

    Args:
      root: the run's.
      number: steps taken before it.
    """
    return jax.random.fold_in(root, number + 1)


def named_keys(key: Array) -> dict[str, Array]:
    """Splits a step's key once into named ones."""
    return dict(zip(KEYS, jax.random.split(key, len(KEYS)), strict=True))


def step(agent: Agent, state: State, key: Array) -> tuple[State, Metrics]:
    """Takes one step, and those of the agent's planning behind it.

    Args:
      agent: Agent.
      state: State.
      key: random key of this step.

    Returns:
      State and the step's metrics.
    """
    keys = named_keys(key)
    state, metrics = learn_late(agent, state, keys["rewards"])
    if state.queries < agent.max_queries:
        state, of_duels = take(agent, state, keys)
        metrics |= of_duels
    state = replace(state, step=state.step + 1)
    planning = agent.planning
    if planning and state.queries >= planning.after_queries:
        for index in range(planning.steps):
            plan_keys = named_keys(jax.random.fold_in(keys["plan"], index))
            state, row = take(planning.agent, state, plan_keys, suffix=f"-plan{index}")
            metrics |= {"plan/loss": row["train/loss"], "plan/label": row["explorer/label"]}
            for name, parts in PLAN_TIMES.items():
                metrics[name] = metrics.get(name, 0.0) + sum(row.get(part, 0.0) for part in parts)
    return state, metrics


PLAN_TIMES = {
    "plan/generate_time": ("actor/generate_time", "actor/oracle_time"),
    "plan/learn_time": ("train/rm/learn_time", "train/learn_time"),
}


def take(agent: Agent, state: State, keys: Mapping[str, Array], suffix: str = "") -> tuple[State, Metrics]:
    """Goes once through the slots of an agent, whatever they hold.

    Args:
      agent: Agent.
      state: State.
      keys: from `named_keys`.
      suffix: tells the questions of this pass from others of the same step.

    Returns:
      State and metrics.
    """
    metrics: Metrics = {}
    with timed(metrics, "actor/generate_time"):
        proposal, state = propose(agent, state, keys, metrics)  # lines 3 and 4
        seen = _pick_seen(proposal, agent.rule)
        duel = agent.rule(proposal.rewards, proposal.distinct, keys["duel"], **seen)  # lines 5 to 7
    with timed(metrics, "actor/oracle_time"):
        assignment = agent.assign(proposal, duel, state.queries, keys)  # line 8
        assignment = _as_on_record(agent.ledger, f"{state.step}{suffix}", proposal, assignment)
        if agent.unfinished == "lose":
            assignment = _let_unfinished_lose(proposal, assignment)
        assignment = _apply_limits(agent, state, proposal, assignment)
        duel = assignment.duel
        labels, labelled, answered = _label(agent, state, proposal, assignment, keys["oracle"], suffix)
        state = _keep_open(agent, state, proposal, duel, suffix)
    features = take_duel(proposal.candidates.features, duel)
    state = _learn_rewards(agent, state, features, labels, answered, keys["rewards"], metrics)  # line 9
    if agent.learn_policy is not None:
        with timed(metrics, "train/learn_time"):
            lessons = agent.lessons(Experience(proposal, duel, labels, labelled, state.ensemble))
        state = _learn_policy(agent.learn_policy, state, lessons, metrics)  # line 10
    metrics |= _duel_metrics(proposal, assignment, labels, labelled, answered)
    return replace(state, queries=state.queries + int(answered.sum())), metrics


def _learn_rewards(
    agent: Agent, state: State, features: Array, labels: Array, answered: Array, key: Array, metrics: Metrics
) -> State:
    """Remembers what the oracle has answered, and has the ERM learn."""
    if agent.learn_rewards is None:
        return state
    with timed(metrics, "train/rm/learn_time"):
        replay = add_pairs(state.replay, features, labels, answered)
        reward_model, found = agent.learn_rewards(state.ensemble, replay, key)
        metrics |= {"train/rm/loss_rew": float(found["loss"]), "train/rm/acc_rew": float(found["accuracy"])}
    return replace(state, ensemble=reward_model, replay=replay)


def _learn_policy(learn_policy: LearnPolicy, state: State, lessons: Any, metrics: Metrics) -> State:
    """Takes a policy step."""
    with timed(metrics, "train/learn_time"):
        learner, found = learn_policy(state.learner, lessons)
        jax.block_until_ready(learner)
        metrics |= {f"train/{name}": float(value) for name, value in found.items()}
    return replace(state, learner=learner)


def learn_late(agent: Agent, state: State, key: Array) -> tuple[State, Metrics]:
    """Learns from the answers that have come to pairs which steps before asked about.

    It waits for some where nothing more can be asked until then.

    Args:
      agent: Agent.
      state: State.
      key: random key.

    Returns:
      State and metrics, none where the oracle is not one that answers late.
    """
    held, oracle = state.open, agent.oracle
    if held is None or not isinstance(oracle, LateOracle):
        return state, {}
    row: Metrics = {}
    capacity = len(held.step)
    slots = {f"{held.step[slot]}-{held.row[slot]}": slot for slot in held.taken()}
    oldest = int(state.learner.step) - oracle.max_staleness
    with timed(row, "late/wait_time"):
        found = label_late(
            list(slots),
            oracle,
            agent.ledger,
            state.step,
            stale=[name for name, slot in slots.items() if held.version[slot] < oldest],
            enough=lambda answered, never: (
                len(slots) == answered + never
                or _room(agent, capacity, state.queries + answered, len(slots) - answered - never) > 0
            ),
        )
    labels = {slots[name]: value for name, value in found.items() if not math.isnan(value)}
    for start in range(0, len(labels), agent.batch_size):
        some = list(labels)[start : start + agent.batch_size]
        pairs, features = open_pairs.batch_of(held, some, [labels[slot] for slot in some], agent.batch_size)
        own_key = jax.random.fold_in(key, start + 1)
        state = _learn_rewards(agent, state, features, pairs.labels, pairs.weights > 0, own_key, row)
        if agent.learn_policy is not None and agent.policy_learns_late:
            state = _learn_policy(agent.learn_policy, state, pairs, row)
    metrics: Metrics = {
        "explorer/pairs": 0,
        "explorer/unanswered": 0,
        "late/pairs": len(labels),
        "late/open": len(slots) - len(found),
        "late/wait_time": row["late/wait_time"],
        "late/learn_time": row.get("train/rm/learn_time", 0.0) + row.get("train/learn_time", 0.0),
    }
    held = open_pairs.free(held, [slots[name] for name in found])
    return replace(state, open=held, queries=state.queries + len(labels)), metrics


def _room(agent: Agent, capacity: int, queries: int, num_open: int) -> int:
    """How many pairs more the oracle may be asked about, if no more than `capacity` may be open."""
    return min(agent.max_queries - queries, capacity) - num_open


def _keep_open(agent: Agent, state: State, proposal: Proposal, duel: Duel, suffix: str) -> State:
    """Keeps the pairs of a step that the oracle may still answer."""
    left = np.array([agent.ledger.left_open(f"{state.step}{suffix}-{row}") for row in range(len(proposal.texts))])
    if state.open is None or not left.any():
        return state
    candidates = proposal.candidates
    held = open_pairs.add(
        state.open,
        left,
        step=state.step,
        version=int(state.learner.step),
        prompts=proposal.prompts,
        tokens=take_duel(candidates.tokens, duel),
        lengths=take_duel(candidates.lengths, duel),
        features=take_duel(candidates.features, duel),
    )
    return replace(state, open=held)


@contextlib.contextmanager
def timed(metrics: Metrics, name: str) -> Iterator[None]:
    """Adds the seconds spent inside to a metric."""
    start = time.perf_counter()
    yield
    metrics[name] = metrics.get(name, 0.0) + time.perf_counter() - start


def propose(agent: Agent, state: State, keys: Mapping[str, Array], metrics: Metrics) -> tuple[Proposal, State]:
    """Has the next batch of prompts answered and looks at the responses."""
    number, learner = state.batches, state.learner
    batch = agent.prompts(number)
    prompts = Prompts(batch["tokens"], batch["valid"])
    candidates, written = agent.respond(number, learner.trained, prompts, keys["generate"], int(learner.step))
    metrics |= written
    texts = agent.texts(candidates)
    candidates = replace(candidates, features=agent.features(batch, candidates, texts))
    state = replace(state, batches=number + 1)
    if agent.standardise and not int(state.replay.added):  # until it has learnt from a label
        state = replace(state, ensemble=ensemble.calibrate(state.ensemble, candidates.features))
    finished = agent.finished(candidates)
    proposal = Proposal(
        batch=batch,
        candidates=candidates,
        texts=texts,
        distinct=jnp.asarray(comparable(texts, finished, agent.unfinished)),
        finished=jnp.asarray(finished),
        rewards=ensemble.rewards(state.ensemble, candidates.features),
        seen={},
    )
    proposal = replace(proposal, seen=_compute_seen(agent, state, proposal))
    if agent.select is not None:
        rows = agent.select(proposal.rewards, proposal.distinct, keys["select"], **_pick_seen(proposal, agent.select))
        proposal = proposal.rows(rows)
    return proposal, state


def comparable(texts: Sequence[Sequence[str]], finished: np.ndarray, unfinished: str) -> np.ndarray:
    """Returns which two of M responses may be compared, [B, M, M] bool: those that differ, and of which none is left out.

    Args:
      texts: B lists of M.
      finished: [B, M] bool, whether they ended by themselves.
      unfinished: as of `ExplorationSettings`.
    """
    group = np.array([[row.index(text) for text in row] for row in texts])  # the first candidate with the same text
    distinct = group[:, :, None] != group[:, None, :]
    return distinct & finished[:, :, None] & finished[:, None, :] if unfinished == "left_out" else distinct


def _compute_seen(agent: Agent, state: State, proposal: Proposal) -> dict[str, Array]:
    """What the agent's rules ask for; log-probs cost a pass through the policy and are taken for nobody else."""
    names = {name for rule in (agent.rule, agent.select) if rule for name in sampling.seen_by(rule, "exploration.rule")}
    seen: dict[str, Array] = {"lengths": proposal.candidates.lengths, "features": proposal.candidates.features}
    if names & {"logprobs", "reference_logprobs"}:
        found = agent.logprobs(state.learner.trained, proposal.prompts, proposal.candidates)
        seen["logprobs"], seen["reference_logprobs"] = found
    return {name: value for name, value in seen.items() if name in names}


def _pick_seen(proposal: Proposal, rule: Callable[..., Any]) -> dict[str, Array]:
    """What this rule asks for of what was seen."""
    return {name: proposal.seen[name] for name in sampling.seen_by(rule, "exploration.rule")}


def _as_on_record(ledger: Ledger, name: str, proposal: Proposal, assignment: Assignment) -> Assignment:
    """Keeps to the pairs that a run asked about before it was cut off, where other devices round to another choice."""
    first, second, to_oracle, to_erm = (
        np.array(x) for x in (assignment.duel.first, assignment.duel.second, assignment.to_oracle, assignment.to_erm)
    )
    differs = False
    for row, texts in enumerate(proposal.texts):
        former = ledger.find(f"{name}-{row}") or ledger.asked(f"{name}-{row}")
        if former is None or former["prompt_id"] != proposal.batch["id"][row]:
            continue
        pair, paid = [former["first"], former["second"]], former["labeller"] == ORACLE
        if not set(pair) <= set(texts):
            continue
        if [texts[first[row]], texts[second[row]]] != pair or to_oracle[row] != paid or to_erm[row] == paid:
            differs = True
            first[row], second[row] = map(texts.index, pair)
            to_oracle[row], to_erm[row] = paid, not paid
    if not differs:
        return assignment
    duel = Duel(first=jnp.asarray(first), second=jnp.asarray(second))
    return replace(assignment, duel=duel, to_oracle=jnp.asarray(to_oracle), to_erm=jnp.asarray(to_erm))


def _let_unfinished_lose(proposal: Proposal, assignment: Assignment) -> Assignment:
    """Labels the pairs of which one response ended by itself and the other was cut: nobody needs to be asked."""
    rows, duel = jnp.arange(proposal.finished.shape[0]), assignment.duel
    first, second = proposal.finished[rows, duel.first], proposal.finished[rows, duel.second]
    cut = (first != second) & (assignment.to_oracle | assignment.to_erm)
    return replace(
        assignment,
        to_oracle=assignment.to_oracle & ~cut,
        to_erm=assignment.to_erm | cut,
        erm_labels=jnp.where(cut, first.astype(jnp.float32), assignment.erm_labels),
        cut=cut,
    )


def _apply_limits(agent: Agent, state: State, proposal: Proposal, assignment: Assignment) -> Assignment:
    """Nobody is asked about twins, whatever a rule returns, nor beyond the budget."""
    duel = assignment.duel
    differ = proposal.distinct[jnp.arange(duel.first.shape[0]), duel.first, duel.second]
    to_oracle = assignment.to_oracle & differ
    held = state.open
    left = agent.max_queries - state.queries
    if held is not None:
        left = _room(agent, len(held.step), state.queries, len(held.taken()))
    within_budget = jnp.cumsum(to_oracle) <= left
    return replace(assignment, to_oracle=to_oracle & within_budget, to_erm=assignment.to_erm & differ)


def _label(
    agent: Agent, state: State, proposal: Proposal, assignment: Assignment, key: Array, suffix: str
) -> tuple[Array, Array, Array]:
    """Labels [B] float32, one half where there is none; which rows have one, and which have the oracle's: two [B] bool."""
    first, second = np.asarray(assignment.duel.first), np.asarray(assignment.duel.second)
    to_oracle, to_erm = np.asarray(assignment.to_oracle), np.asarray(assignment.to_erm)
    cut = np.zeros(len(first), bool) if assignment.cut is None else np.asarray(assignment.cut)
    finished = np.asarray(proposal.finished)
    foreseen = np.asarray(sampling.mean_label(proposal.rewards, assignment.duel))
    rows = np.flatnonzero(to_oracle | to_erm).tolist()
    questions = [
        Question(
            key=f"{state.step}{suffix}-{row}",
            step=state.step,
            prompt_id=proposal.batch["id"][row],
            prompt=proposal.batch["prompt"][row],
            first=proposal.texts[row][first[row]],
            second=proposal.texts[row][second[row]],
            erm_label=float(assignment.erm_labels[row]) if to_erm[row] else None,
            cut=bool(cut[row]),
            finished=(bool(finished[row, first[row]]), bool(finished[row, second[row]])),
            foreseen=None if agent.learn_rewards is None else float(foreseen[row]),
        )
        for row in rows
    ]
    labels = np.full(len(first), np.nan, np.float32)
    if questions:
        labels[rows] = label(questions, agent.oracle, agent.ledger, jax.random.split(key, len(first))[jnp.array(rows)])
    labelled = ~np.isnan(labels)
    filled = np.where(labelled, labels, np.float32(0.5))
    return jnp.asarray(filled), jnp.asarray(labelled), jnp.asarray(labelled & to_oracle)


def take_duel(values: Array, duel: Duel) -> Array:
    """Picks the duellists: values [B, M, ...], Duel [B] -> [B, 2, ...]."""
    rows = jnp.arange(duel.first.shape[0])
    return jnp.stack([values[rows, duel.first], values[rows, duel.second]], axis=1)


def labelled_duels(experience: Experience) -> PreferenceBatch:
    """Lessons of direct optimizers: every pair that was labelled, whoever did it."""
    candidates, duel = experience.proposal.candidates, experience.duel
    frozen = candidates.frozen
    return PreferenceBatch(
        prompts=experience.proposal.prompts,
        tokens=take_duel(candidates.tokens, duel),
        lengths=take_duel(candidates.lengths, duel),
        labels=experience.labels,
        weights=experience.labelled.astype(jnp.float32),
        frozen=frozen and replace(frozen, responses=take_duel(frozen.responses, duel)),
    )


def _duel_metrics(
    proposal: Proposal, assignment: Assignment, labels: Array, labelled: Array, answered: Array
) -> Metrics:
    """What the log says of a step's duels."""
    rewards, to_erm = proposal.rewards, np.asarray(assignment.to_erm)
    mean_probability = np.asarray(sampling.mean_label(rewards, assignment.duel))
    asked, kept = np.asarray(answered), np.asarray(labelled)
    best = np.asarray(rewards.argmax(-1))  # [K, B]
    metrics: Metrics = {
        "actor/init_clash_ratio": float((best == best[:1]).all(0).mean()),
        "actor/response_length": float(proposal.candidates.lengths.mean()),
        "actor/finished_ratio": float(np.asarray(proposal.finished).mean()),
        "actor/distinct_ratio": float(np.mean([len(set(row)) / len(row) for row in proposal.texts])),
        "explorer/model_data_ratio": float(to_erm.sum() / max(kept.sum(), 1)),
        "explorer/pairs": int(kept.sum()),
        "explorer/unanswered": int((np.asarray(assignment.to_oracle) & ~asked).sum()),
        "explorer/head_spread": float(rewards.std(0).mean()),
        "explorer/label": float(labels.mean()),
    }
    if asked.any():  # how well the ERM foresaw the labels it has not learnt from yet
        agrees = (mean_probability > 0.5) == (np.asarray(labels) > 0.5)
        metrics["explorer/erm_accuracy"] = float(agrees[asked].mean())
    return metrics
