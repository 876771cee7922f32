"""One simulated run of a recipe in one scan: a policy over a fixed pool, the library's ERM, rules, losses and replay.

A response of the pool is written as one token, its number, and a prompt as another: what the library says of tokens holds as
it is. The policy is pi(y | x) ~ pi_ref(y | x) exp f(x, y), pi_ref uniform over the pool, whose responses are its samples.
"""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Float32, Int32, PRNGKeyArray

from sea_jax import ensemble, learner, losses, sampling
from sea_jax.agent import (
    Assignment,
    Experience,
    ExplorationSettings,
    Proposal,
    labelled_duels,
    named_keys,
    step_key,
    take_duel,
)
from sea_jax.ensemble import Ensemble, EnsembleSettings
from sea_jax.learner import LearnerConfig
from sea_jax.losses import LossSettings
from sea_jax.methods import sea
from sea_jax.replay import Replay, add_pairs, empty_replay
from sea_jax.types import Array, Candidates, Duel, PairLogps, PreferenceBatch

Rewards = Float32[Array, "C N"]
Rate = Float32[Array, ""]


@struct.dataclass
class Environment:
    """C prompts with N responses each; the last of the prompts are held out.

    Attributes:
      erm_features: what the ERM sees.
      policy_features: what the policy's f is a function of.
      oracle: rewards, in logits of Bradley-Terry.
      judge: rewards of somebody who is never learnt from.
      text: responses of one number are the same text.
      lengths: tokens.
      num_train: prompts that are trained on.
    """

    erm_features: Float32[Array, "C N d"]
    policy_features: Float32[Array, "C N p"]
    oracle: Rewards
    judge: Rewards
    text: Int32[Array, "C N"]
    lengths: Int32[Array, "C N"]
    num_train: int = struct.field(pytree_node=False)


# Constant rate 1: Adam's step is multiplied by the rate, which is data, so that a search over rates compiles once.
ADAM = LearnerConfig(
    learning_rate=1.0,
    warmup_fraction=0.0,
    final_fraction=1.0,
    b1=0.9,
    b2=0.95,
    weight_decay=0.0,
    clip_norm=1.0,
    microbatch_size=1,
    remat=False,
    total_steps=1,
    dtype="float32",
)

LESSONS = ("labels", "erm_pair", "erm_best_worst")
LABELS = ("soft", "hard")
WRITERS = ("policy", "reference")
ERM_PAIRS = tuple(itertools.product(("duel", "max_margin"), ("head", "mean")))  # of ExplorationSettings
RULES = tuple(sampling.RULES)
MAX_PLANNING = 4


@dataclass(frozen=True)
class Recipe:
    """How a run learns.

    Attributes:
      rule: which pair is asked about, one of sampling.RULES.
      gamma: probability that the oracle labels a duel once the burn-in is paid for, as the next two of ExplorationSettings.
      burn_in_queries: queries before gamma applies.
      erm_pair: what the ERM labels then, "duel" or "max_margin".
      erm_label: and how, "head" or "mean".
      lessons: what the policy learns from where the oracle was asked: its "labels"; "erm_pair", the same pair as the ERM
        labels it; or "erm_best_worst", the ERM's best and worst of the same candidates.
      planning_steps: policy steps per oracle step on prompts without a label: the ERM's best against its worst.
      planning_after_queries: none before so many.
      planning_label: "soft", the heads' mean probability, or "hard", who it prefers.
      writer: who writes the candidates: the "policy", or the "reference", which never changes.
      learns_policy: False: the ERM alone learns.
      anchor_strength: of the ERM, as in EnsembleSettings.
      flip_probability: of an oracle's label.
    """

    rule: str = "passive"
    gamma: float = 1.0
    burn_in_queries: int = 0
    erm_pair: str = "duel"
    erm_label: str = "head"
    lessons: str = "labels"
    planning_steps: int = 0
    planning_after_queries: int = 48
    planning_label: str = "soft"
    writer: str = "policy"
    learns_policy: bool = True
    anchor_strength: float = 0.5
    flip_probability: float = 0.0

    def choices(self, rules: Sequence[str]) -> "Choices":
        """Returns the recipe as numbers, so that one compiled program serves all recipes.

        Args:
          rules: the duel rules that the program holds.

        Raises:
          ValueError: a choice is none of those that there are.
        """

        def number(name: str, value: Any, known: Sequence[Any]) -> Int32[np.ndarray, ""]:
            if value not in known:
                raise ValueError(f"{name}={value!r}: must be one of {', '.join(map(str, known))}")
            return np.array(known.index(value), np.int32)

        return Choices(
            rule=number("rule", self.rule, rules),
            gamma=np.float32(self.gamma),
            burn_in_queries=np.int32(self.burn_in_queries),
            erm_pair=number("erm_pair, erm_label", (self.erm_pair, self.erm_label), ERM_PAIRS),
            lessons=number("lessons", self.lessons, LESSONS),
            planning_steps=number("planning_steps", self.planning_steps, range(MAX_PLANNING + 1)),
            planning_after_queries=np.int32(self.planning_after_queries),
            hard=number("planning_label", self.planning_label, LABELS),
            frozen_writer=number("writer", self.writer, WRITERS),
            learns_policy=np.float32(self.learns_policy),
            anchor_strength=np.float32(self.anchor_strength),
            flip_probability=np.float32(self.flip_probability),
        )


@struct.dataclass
class Choices:
    """A recipe as numbers; what is a name there is its place among the names here."""

    rule: Any
    gamma: Any
    burn_in_queries: Any
    erm_pair: Any
    lessons: Any
    planning_steps: Any
    planning_after_queries: Any
    hard: Any
    frozen_writer: Any
    learns_policy: Any
    anchor_strength: Any
    flip_probability: Any


@dataclass(frozen=True)
class Sizes:
    """What all recipes of a laboratory share; static under jit.

    Attributes:
      queries: labels paid for in all.
      batch_size: prompts a step, a duel of each.
      num_samples: M, candidates of a prompt.
      best_of_n: responses that the ERM chooses from where it is evaluated.
      evaluations: how often, at equal distances of steps.
      ensemble: the ERM; its anchor_strength is the recipe's.
      loss: the policy's.
      rules: duel rules, those that the recipes name.
    """

    queries: int
    batch_size: int
    num_samples: int
    best_of_n: int
    evaluations: int
    ensemble: EnsembleSettings
    loss: LossSettings
    rules: tuple[str, ...]


@struct.dataclass
class Run:
    """What a run is between two steps.

    Attributes:
      weights: of the policy's f, which is linear in its features.
      opt_state: Adam's.
      ensemble: the ERM.
      replay: the oracle's pairs.
      queries: paid for.
      policy_steps: taken.
      regret: summed over the duels that were paid for, in logits.
      online: the duellists' win rate against the starting policy's samples, summed likewise.
    """

    weights: Float32[Array, " p"]
    opt_state: Any
    ensemble: Ensemble
    replay: Replay
    queries: Int32[Array, ""]
    policy_steps: Float32[Array, ""]
    regret: Float32[Array, ""]
    online: Float32[Array, ""]


def win_rates(rewards: Rewards) -> Rewards:
    """Returns how often each response beats a sample of the starting policy, another of its prompt's pool; ties count half."""
    beats = (jnp.sign(rewards[:, :, None] - rewards[:, None, :]) + 1) / 2  # [C, N, N]
    return (beats.sum(-1) - 0.5) / (rewards.shape[1] - 1)  # without itself


def num_steps(recipe: Recipe, sizes: Sizes) -> int:
    """Returns steps that are enough to spend the budget, with a tenth for those in which twins or the ERM are drawn."""
    certain = min(recipe.burn_in_queries, sizes.queries)
    steps = math.ceil(1.1 * (certain + (sizes.queries - certain) / recipe.gamma) / sizes.batch_size)
    return math.ceil(steps / sizes.evaluations) * sizes.evaluations


def begin(sizes: Sizes, environment: Environment, key: PRNGKeyArray) -> Run:
    """Returns a run before its first step; the ERM's features are calibrated on the pools of a first batch."""
    num_features = environment.erm_features.shape[-1]
    heads = ensemble.init(sizes.ensemble, num_features, key)
    weights = jnp.zeros(environment.policy_features.shape[-1])
    zero = jnp.zeros((), jnp.int32)
    return Run(
        weights=weights,
        opt_state=learner.optimizer(ADAM).init(weights),
        ensemble=ensemble.calibrate(heads, environment.erm_features[: sizes.batch_size]),
        replay=empty_replay(sizes.queries + sizes.batch_size, num_features),
        queries=zero,
        policy_steps=jnp.zeros(()),
        regret=jnp.zeros(()),
        online=jnp.zeros(()),
    )


def propose(
    choices: Choices, sizes: Sizes, environment: Environment, run: Run, rows: Int32[Array, " B"], key: PRNGKeyArray
) -> Proposal:
    """Has M responses to some prompts drawn from whoever writes."""
    logits = environment.policy_features[rows] @ run.weights  # [B, N]
    logprobs = jax.nn.log_softmax(logits)
    written = jnp.where(choices.frozen_writer, 0.0, logits)
    picked = jax.random.categorical(key, written, shape=(sizes.num_samples, len(rows))).T.astype(jnp.int32)  # [B, M]
    features = environment.erm_features[rows[:, None], picked]
    text = jnp.take_along_axis(environment.text[rows], picked, axis=1)
    lengths = jnp.take_along_axis(environment.lengths[rows], picked, axis=1)
    own = jnp.take_along_axis(logprobs, picked, axis=1)
    seen = {
        "logprobs": own,
        "reference_logprobs": jnp.full_like(own, -math.log(logits.shape[1])),
        "lengths": lengths,
        "features": features,
    }
    return Proposal(
        batch={"tokens": rows[:, None], "valid": jnp.ones((len(rows), 1), bool)},
        candidates=Candidates(tokens=picked[..., None], lengths=lengths, logprobs=own[..., None], features=features),
        texts=[],
        distinct=text[:, :, None] != text[:, None, :],
        finished=jnp.ones(picked.shape, bool),
        rewards=ensemble.rewards(run.ensemble, features),
        seen=seen,
    )


def choose(choices: Choices, sizes: Sizes, proposal: Proposal, key: PRNGKeyArray) -> Duel:
    """The duel of the recipe's rule, which is shown what it asks for."""

    def of(name: str) -> Callable[[], Duel]:
        rule = sampling.RULES[name]
        seen = {each: proposal.seen[each] for each in sampling.seen_by(rule, f"exploration.rule={name}")}
        return lambda: rule(proposal.rewards, proposal.distinct, key, **seen)

    return jax.lax.switch(choices.rule, [of(name) for name in sizes.rules])


def assign(choices: Choices, proposal: Proposal, duel: Duel, queries: Array, keys: Mapping[str, Array]) -> Assignment:
    """Who labels: the oracle alone until the burn-in is paid for, then as gamma shares it (Eq. 9)."""

    def shared(erm_pair: str, erm_label: str) -> Callable[[], dict[str, Any]]:
        gamma = jnp.where(queries < choices.burn_in_queries, 1.0, choices.gamma)
        exploration = ExplorationSettings(gamma=gamma, burn_in_queries=0, erm_pair=erm_pair, erm_label=erm_label)  # type: ignore[arg-type]
        assign = sea.shared(exploration)
        return lambda: vars(assign(proposal, duel, 0, keys))

    return Assignment(**jax.lax.switch(choices.erm_pair, [shared(*each) for each in ERM_PAIRS]))


def answers(
    choices: Choices, first: Float32[Array, " B"], second: Float32[Array, " B"], key: PRNGKeyArray
) -> Float32[Array, " B"]:
    """The oracle's labels of pairs by their rewards: drawn through Bradley-Terry, some of them flipped."""
    drawn, flipped = jax.random.split(key)
    wins = jax.random.bernoulli(drawn, jax.nn.sigmoid(first - second))
    return (wins ^ jax.random.bernoulli(flipped, choices.flip_probability, wins.shape)).astype(jnp.float32)


def learn_policy(
    choices: Choices, sizes: Sizes, environment: Environment, run: Run, lessons: PreferenceBatch, rate: Rate
) -> Run:
    """One step of Adam on labelled pairs, if there are any."""
    rows, picked = lessons.prompts.tokens[:, 0], lessons.tokens[..., 0]  # [B], [B, 2]
    loss = losses.build(sizes.loss)
    reference = jnp.full(rows.shape, -math.log(environment.oracle.shape[1]))

    def mean_loss(weights: Float32[Array, " p"]) -> Float32[Array, ""]:
        logprobs = jax.nn.log_softmax(environment.policy_features[rows] @ weights)
        own = jnp.take_along_axis(logprobs, picked, axis=1)
        pairs = PairLogps(own[:, 0], own[:, 1], reference, reference, lessons.lengths[:, 0], lessons.lengths[:, 1])
        values = losses.expected(loss, pairs, lessons.labels)
        return (values * lessons.weights).sum() / jnp.maximum(lessons.weights.sum(), 1e-9)

    gradient = jax.grad(mean_loss)(run.weights)
    updates, opt_state = learner.optimizer(ADAM).update(gradient, run.opt_state, run.weights)
    taken = choices.learns_policy * (lessons.weights.sum() > 0)
    return replace(
        run,
        weights=run.weights + taken * rate * updates,
        opt_state=jax.tree.map(lambda new, old: jnp.where(taken > 0, new, old), opt_state, run.opt_state),
        policy_steps=run.policy_steps + taken,
    )


def taught(
    choices: Choices, proposal: Proposal, duel: Duel, labels: Array, reward_model: Ensemble
) -> tuple[Duel, Array]:
    """The pair of each of the oracle's prompts that the policy learns from, and its label."""
    rewards = ensemble.rewards(reward_model, proposal.candidates.features)
    best_worst = sampling.best_against_worst(rewards, proposal.distinct, jax.random.key(0))  # it needs no key
    pairs = {
        "labels": (duel, labels),
        "erm_pair": (duel, sampling.mean_label(rewards, duel)),
        "erm_best_worst": (best_worst, sampling.mean_label(rewards, best_worst)),
    }
    return jax.tree.map(lambda *each: jax.lax.select_n(choices.lessons, *each), *(pairs[name] for name in LESSONS))


def step(
    choices: Choices,
    sizes: Sizes,
    environment: Environment,
    run: Run,
    rows: Int32[Array, "S B"],
    rate: Rate,
    key: PRNGKeyArray,
) -> Run:
    """One step: asks about the prompts of rows[0], learns, and plans on those of the other rows without a label."""
    keys = named_keys(key)
    proposal = propose(choices, sizes, environment, run, rows[0], keys["generate"])
    duel = choose(choices, sizes, proposal, keys["duel"])
    assignment = assign(choices, proposal, duel, run.queries, keys)
    duel = assignment.duel
    differ = proposal.distinct[jnp.arange(len(rows[0])), duel.first, duel.second]
    to_oracle = assignment.to_oracle & differ
    to_oracle &= jnp.cumsum(to_oracle) <= sizes.queries - run.queries

    def of_duel(values: Float32[Array, "B N"]) -> Float32[Array, "B 2"]:
        return take_duel(jnp.take_along_axis(values, proposal.candidates.tokens[..., 0], axis=1), duel)

    rewards = of_duel(environment.oracle[rows[0]])
    paid = answers(choices, rewards[:, 0], rewards[:, 1], keys["oracle"])
    labels = jnp.where(to_oracle, paid, assignment.erm_labels)
    labelled = to_oracle | (assignment.to_erm & differ)
    replay = add_pairs(run.replay, take_duel(proposal.candidates.features, duel), labels, to_oracle)
    heads = replace(sizes.ensemble, anchor_strength=choices.anchor_strength)
    reward_model, _ = ensemble.update(run.ensemble, replay, keys["rewards"], heads)
    regret = environment.oracle[rows[0]].max(-1) - rewards.mean(-1)
    won = of_duel(win_rates(environment.oracle[rows[0]])).mean(-1)
    new = replace(
        run,
        ensemble=reward_model,
        replay=replay,
        queries=run.queries + to_oracle.sum(),
        regret=run.regret + (regret * to_oracle).sum(),
        online=run.online + (won * to_oracle).sum(),
    )
    lessons = labelled_duels(
        Experience(proposal, *taught(choices, proposal, duel, labels, reward_model), labelled, reward_model)
    )
    new = learn_policy(choices, sizes, environment, new, lessons, rate)
    new = plan(choices, sizes, environment, new, rows[1:], rate, keys["plan"])
    spent = run.queries >= sizes.queries
    return jax.tree.map(lambda after, before: jnp.where(spent, before, after), new, run)


def plan(
    choices: Choices,
    sizes: Sizes,
    environment: Environment,
    run: Run,
    rows: Int32[Array, "S B"],
    rate: Rate,
    key: PRNGKeyArray,
) -> Run:
    """Policy steps on prompts that nobody is asked about: the ERM's best against its worst, as the ERM labels them."""

    def one(number: Array, run: Run) -> Run:
        keys = named_keys(jax.random.fold_in(key, number))
        proposal = propose(choices, sizes, environment, run, rows[number], keys["generate"])
        duel = sampling.best_against_worst(proposal.rewards, proposal.distinct, keys["duel"])
        soft = sea.all_to_erm(proposal, duel, 0, keys).erm_labels
        labels = jnp.where(choices.hard, jnp.round(soft), soft)
        labelled = proposal.distinct[jnp.arange(len(duel.first)), duel.first, duel.second]
        labelled &= run.queries >= choices.planning_after_queries
        lessons = labelled_duels(Experience(proposal, duel, labels, labelled, run.ensemble))
        return learn_policy(choices, sizes, environment, run, lessons, rate)

    return jax.lax.fori_loop(0, choices.planning_steps, one, run)


def best_of_n(probability: Rewards, ranked_by: Rewards, n: int) -> Rewards:
    """Returns the probability of each response to be the best of n drawn from a policy, as a reward ranks them; no ties."""
    order = jnp.argsort(ranked_by, axis=-1)
    up_to = jnp.cumsum(jnp.take_along_axis(probability, order, axis=-1), axis=-1) ** n
    chosen = jnp.diff(up_to, axis=-1, prepend=0.0)
    return jnp.take_along_axis(chosen, jnp.argsort(order, axis=-1), axis=-1)


def evaluate(sizes: Sizes, environment: Environment, run: Run) -> dict[str, Float32[Array, ""]]:
    """Returns how good a run is on the held-out prompts, in expectation over what is drawn.

    "policy": a sample; "greedy": the most probable response; "best_of_n": that of n samples which the ERM's mean ranks
    highest. Each against a sample of the starting policy, by the oracle and by the judge.
    """
    held_out = jax.tree.map(lambda x: x[environment.num_train :], environment)
    logits = held_out.policy_features @ run.weights
    ranked = ensemble.rewards(run.ensemble, held_out.erm_features).mean(0)
    policy = jax.nn.softmax(logits)
    chosen = {
        "policy": policy,
        "greedy": jax.nn.softmax(jnp.where(logits == logits.max(-1, keepdims=True), 0.0, -jnp.inf)),
        "best_of_n": best_of_n(policy, ranked, sizes.best_of_n),
    }
    rates = {"oracle": win_rates(held_out.oracle), "judge": win_rates(held_out.judge)}
    found = {
        f"{who}/{name}": (probability * rate).sum(-1).mean()
        for who, probability in chosen.items()
        for name, rate in rates.items()
    }
    apart = held_out.oracle[:, :, None] - held_out.oracle[:, None, :]
    agrees = (ranked[:, :, None] > ranked[:, None, :]) == (apart > 0)
    entropy = -(policy * jax.nn.log_softmax(logits)).sum(-1).mean()
    return found | {
        "erm_accuracy": jnp.where(apart != 0, agrees, 0).sum() / jnp.maximum((apart != 0).sum(), 1),
        "length": (policy * held_out.lengths).sum(-1).mean(),
        "kl": math.log(logits.shape[1]) - entropy,
        "queries": run.queries.astype(jnp.float32),
        "policy_steps": run.policy_steps,
        "cumulative_regret": run.regret,
        "online": run.online,
    }


def simulate(
    choices: Choices, sizes: Sizes, steps: int, environment: Environment, rate: Rate, key: PRNGKeyArray
) -> dict[str, Float32[Array, " E"]]:
    """Returns the evaluations of one run, the first before its first step.

    Args:
      choices: of a recipe.
      sizes: Sizes.
      steps: a multiple of the evaluations, see `num_steps`; none is taken once the budget is spent.
      environment: a step and its planning read (1 + MAX_PLANNING) batches of its prompts without replacement.
      rate: of the policy's Adam.
      key: of the run.
    """
    first = begin(sizes, environment, jax.random.fold_in(key, 0))
    shape = (1 + MAX_PLANNING, sizes.batch_size)

    def one(run: Run, number: Int32[Array, ""]) -> tuple[Run, None]:
        own_key = step_key(key, number)  # type: ignore[arg-type]
        order = jax.random.permutation(jax.random.fold_in(own_key, 0), environment.num_train)
        rows = order[: math.prod(shape)].reshape(shape).astype(jnp.int32)
        return step(choices, sizes, environment, run, rows, rate, own_key), None

    def until_evaluation(run: Run, numbers: Int32[Array, " n"]) -> tuple[Run, dict[str, Float32[Array, ""]]]:
        run, _ = jax.lax.scan(one, run, numbers)
        return run, evaluate(sizes, environment, run)

    _, found = jax.lax.scan(until_evaluation, first, jnp.arange(steps).reshape(sizes.evaluations, -1))
    return jax.tree.map(lambda a, b: jnp.concatenate([a[None], b]), evaluate(sizes, environment, first), found)


Laboratory = Callable[[Recipe, Sequence[float], Sequence[int]], dict[str, np.ndarray]]
"""Runs a recipe with one rate and one seed each, S of both -> evaluations by name, [S, E]."""


def laboratory(
    sizes: Sizes, make_environment: Callable[[Any, PRNGKeyArray], Environment], given: Any = None
) -> Laboratory:
    """Returns how the recipes of a laboratory are run.

    Args:
      sizes: Sizes.
      make_environment: of what is given and of a seed's key.
      given: arrays that all seeds share.
    """

    @partial(jax.jit, static_argnames=("steps",))
    def all_seeds(
        given: Any, choices: Choices, rates: Array, seeds: Array, *, steps: int
    ) -> dict[str, Float32[Array, "S E"]]:
        def one(rate: Rate, seed: Int32[Array, ""]) -> dict[str, Float32[Array, " E"]]:
            own_key, drawn = jax.random.split(jax.random.key(seed))
            return simulate(choices, sizes, steps, make_environment(given, drawn), rate, own_key)

        return jax.vmap(one)(rates, seeds)

    def run(recipe: Recipe, rates: Sequence[float], seeds: Sequence[int]) -> dict[str, np.ndarray]:
        found = all_seeds(
            given,
            recipe.choices(sizes.rules),
            jnp.asarray(rates, jnp.float32),
            jnp.asarray(seeds, jnp.int32),
            steps=num_steps(recipe, sizes),
        )
        return jax.tree.map(np.asarray, found)

    return run
