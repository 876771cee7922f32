"""Which two of the M candidates are compared: Thompson sampling and the other duel rules.

A rule implements `types.DuelRule`. `distinct[b, i, j]` says that the texts of candidates i and j differ: two identical texts
tell an oracle nothing, so a rule picks among the distinct pairs wherever there are any.
The rules named _oat are those of the authors' code (https://github.com/sail-sg/oat) where it departs from the paper.
"""

import inspect
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float32, Int, Int32, PRNGKeyArray

from sea_jax.settings import user_function
from sea_jax.types import Array, Duel, DuelRule

NEVER = -jnp.inf

# What a rule may see besides rewards and distinct, by the names of its keyword-only parameters.
SEES: Mapping[str, str] = {
    "logprobs": "[B, M] of each response under the newest policy, summed over its tokens",
    "reference_logprobs": "[B, M] the same under the reference policy",
    "lengths": "[B, M] tokens of each response",
    "features": "[B, M, d] what the ERM sees",
}


def seen_by(rule: Callable[..., Any], field: str) -> frozenset[str]:
    """Returns which of `SEES` a rule asks for, by its keyword-only parameters.

    Args:
      rule: a function of rewards, distinct and key.
      field: the config field that names it and its value, for the error.

    Raises:
      ValueError: it asks for something else.
    """
    asked = [each for each in inspect.signature(rule).parameters.values() if each.kind is each.KEYWORD_ONLY]
    if unknown := [each.name for each in asked if each.default is each.empty and each.name not in SEES]:
        raise ValueError(f"config.{field}: it asks for {', '.join(unknown)}; a rule can see {', '.join(SEES)}")
    return frozenset(each.name for each in asked if each.name in SEES)


def _random_head(rewards: Float32[Array, "K B M"], key: PRNGKeyArray) -> Float32[Array, "B M"]:
    """The rewards of one head per prompt, drawn uniformly."""
    num_heads, num_prompts, _ = rewards.shape
    head = jax.random.randint(key, (num_prompts,), 0, num_heads)
    return rewards[head, jnp.arange(num_prompts)]


def _differs_from(distinct: Bool[Array, "B M M"], first: Int[Array, " B"]) -> Bool[Array, "B M"]:
    """Which candidates' texts differ from the first response's."""
    return jnp.take_along_axis(distinct, first[:, None, None], axis=1)[:, 0]


def best_pair(score: Float32[Array, "B M M"], distinct: Bool[Array, "B M M"]) -> Duel:
    """The distinct pair with the highest score."""
    num_candidates = score.shape[-1]
    best = jnp.where(distinct, score, NEVER).reshape(score.shape[0], -1).argmax(-1).astype(jnp.int32)
    return Duel(first=best // num_candidates, second=best % num_candidates)


def _first_to_differ(
    rewards: Float32[Array, "K B M"], distinct: Bool[Array, "B M M"], order: Int32[Array, "B K"]
) -> Duel:
    """The first head's best against that of the next head that differs, the heads taken in the given order."""
    shuffled = jnp.take_along_axis(rewards.swapaxes(0, 1), order[:, :, None], axis=1)  # [B, K, M]
    best = shuffled.argmax(-1)  # [B, K]
    first = best[:, 0]
    candidates = _differs_from(distinct, first)  # [B, M]
    other = jnp.take_along_axis(candidates, best, axis=1)  # [B, K]: this head's best differs from the first
    redrawn = jnp.take_along_axis(best, other.argmax(-1)[:, None], axis=1)[:, 0]
    runner_up = jnp.where(candidates, shuffled[:, 0], NEVER).argmax(-1)
    second = jnp.where(other.any(-1), redrawn, runner_up)
    return Duel(first=first.astype(jnp.int32), second=second.astype(jnp.int32))


def _margins(rewards: Float32[Array, "K B M"], first: Int[Array, " B"]) -> Float32[Array, "K B M"]:
    """Every head's logit of the first response against each candidate."""
    return jnp.take_along_axis(rewards, first[None, :, None], axis=2) - rewards


def _most_disputed(first: Int[Array, " B"], views: Float32[Array, "K B M"], distinct: Bool[Array, "B M M"]) -> Duel:
    """The first response against the one on which the heads' views vary most."""
    second = jnp.where(_differs_from(distinct, first), views.var(0), NEVER).argmax(-1)
    return Duel(first=first.astype(jnp.int32), second=second.astype(jnp.int32))


def passive(rewards: Float32[Array, "K B M"], distinct: Bool[Array, "B M M"], key: PRNGKeyArray) -> Duel:
    """Compares two plain samples of the policy: the first, and the next one whose text differs; needs no rewards and no key."""
    first = jnp.zeros(rewards.shape[1], jnp.int32)
    return Duel(first=first, second=_differs_from(distinct, first).argmax(-1).astype(jnp.int32))


def ee_ts(rewards: Float32[Array, "K B M"], distinct: Bool[Array, "B M M"], key: PRNGKeyArray) -> Duel:
    """Thompson sampling for explore and exploit (SEA paper, Algorithm 2, lines 5 and 6).

    Heads are drawn again until their best response differs from the first; drawing without replacement gives the same
    distribution and ends. If every head agrees, the drawn head's best differing response is taken.
    """
    num_heads, num_prompts, _ = rewards.shape
    keys = jax.random.split(key, num_prompts)
    order = jax.vmap(lambda k: jax.random.permutation(k, num_heads))(keys)  # [B, K]
    return _first_to_differ(rewards, distinct, order)


def ee_ts_oat(rewards: Float32[Array, "K B M"], distinct: Bool[Array, "B M M"], key: PRNGKeyArray) -> Duel:
    """As `ee_ts`, but the heads are shuffled once for all prompts of the call, as the authors' code does.

    Its fallback to the second best, an option there, is always taken: a prompt on which all heads agree would be lost.
    """
    num_heads, num_prompts, _ = rewards.shape
    order = jax.random.permutation(key, num_heads)
    return _first_to_differ(rewards, distinct, jnp.broadcast_to(order, (num_prompts, num_heads)))


def bai_ts(rewards: Float32[Array, "K B M"], distinct: Bool[Array, "B M M"], key: PRNGKeyArray) -> Duel:
    """Thompson sampling for best-arm identification (SEA paper, Algorithm 2, lines 5 and 7).

    The best under a random head meets the response whose preference the heads dispute most.
    """
    first = _random_head(rewards, key).argmax(-1)
    return _most_disputed(first, jax.nn.sigmoid(_margins(rewards, first)), distinct)


def bai_ts_logits(rewards: Float32[Array, "K B M"], distinct: Bool[Array, "B M M"], key: PRNGKeyArray) -> Duel:
    """As `bai_ts`, but by the variance of the logit instead of the preference's, as in the authors' code."""
    first = _random_head(rewards, key).argmax(-1)
    return _most_disputed(first, _margins(rewards, first), distinct)


def bai_ts_oat(rewards: Float32[Array, "K B M"], distinct: Bool[Array, "B M M"], key: PRNGKeyArray) -> Duel:
    """As `bai_ts_logits`, but one random head chooses for all prompts of the call: both departures of the authors' code."""
    first = rewards[jax.random.randint(key, (), 0, rewards.shape[0])].argmax(-1)
    return _most_disputed(first, _margins(rewards, first), distinct)


def uncertainty(rewards: Float32[Array, "K B M"], distinct: Bool[Array, "B M M"], key: PRNGKeyArray) -> Duel:
    """Pure exploration: the pair whose logit difference the heads dispute most (SEA paper, App. G.1); needs no key."""
    return best_pair((rewards[..., :, None] - rewards[..., None, :]).var(0), distinct)


def max_margin(rewards: Float32[Array, "K B M"], distinct: Bool[Array, "B M M"], key: PRNGKeyArray) -> Duel:
    """The pair that a random head tells apart most: first its best, then its worst."""
    reward = _random_head(rewards, key)
    return best_pair(reward[:, :, None] - reward[:, None, :], distinct)


def best_against_worst(rewards: Float32[Array, "K B M"], distinct: Bool[Array, "B M M"], key: PRNGKeyArray) -> Duel:
    """The pair that the ensemble's mean tells apart most: first its best, then its worst; needs no key."""
    reward = rewards.mean(0)
    return best_pair(reward[:, :, None] - reward[:, None, :], distinct)


def infomax(rewards: Float32[Array, "K B M"], distinct: Bool[Array, "B M M"], key: PRNGKeyArray) -> Duel:
    """The pair whose preference the heads dispute most, Var_k[sigmoid(r_k(y) - r_k(y'))]; needs no key.

    Efficient Exploration at Scale (https://arxiv.org/abs/2603.17378); `uncertainty` takes the variance of the logit.
    """
    return best_pair(jax.nn.sigmoid(rewards[..., :, None] - rewards[..., None, :]).var(0), distinct)


def entropy_epistemic(rewards: Float32[Array, "K B M"], distinct: Bool[Array, "B M M"], key: PRNGKeyArray) -> Duel:
    """The pair of which the label tells most about the heads: entropy of their mean label minus their mean entropy.

    The epistemic term of BAL-PM (https://arxiv.org/abs/2406.10023); its other one, the entropy of the prompts asked about so
    far, is the same for all pairs of a prompt. Needs no key.
    """
    wins = jax.nn.sigmoid(rewards[..., :, None] - rewards[..., None, :])
    return best_pair(_entropy(wins.mean(0)) - _entropy(wins).mean(0), distinct)


def _entropy(probability: Float32[Array, "*N"]) -> Float32[Array, "*N"]:
    """Of a coin, in nats."""
    return jax.scipy.special.entr(probability) + jax.scipy.special.entr(1 - probability)


def _interval(rewards: Float32[Array, "K B M"], width: float) -> tuple[Float32[Array, "B M"], Float32[Array, "B M"]]:
    """Mean reward and half-width of its interval, `width` standard deviations over the heads."""
    return rewards.mean(0), width * rewards.std(0)


def _best_pair_of(
    first_score: Float32[Array, "B M"], second_score: Float32[Array, "B M"], distinct: Bool[Array, "B M M"]
) -> Duel:
    """The best by one score, then the best by another among those that differ from it."""
    first = first_score.argmax(-1)
    second = jnp.where(_differs_from(distinct, first), second_score, NEVER).argmax(-1)
    return Duel(first=first.astype(jnp.int32), second=second.astype(jnp.int32))


def _two_draws(
    rewards: Float32[Array, "K B M"], width: float, key: PRNGKeyArray
) -> tuple[Float32[Array, "B M"], Float32[Array, "2 B M"]]:
    """Mean rewards, and two draws of how far a response is from its mean, uniform over its interval."""
    mean, half_width = _interval(rewards, width)
    return mean, half_width * jax.random.uniform(key, (2, *mean.shape), minval=-1.0)


def dts(
    rewards: Float32[Array, "K B M"], distinct: Bool[Array, "B M M"], key: PRNGKeyArray, *, width: float = 1.0
) -> Duel:
    """Double Thompson sampling from intervals: the best of two draws, uniform in mean +- width standard deviations.

    This and the next four: ActiveUltraFeedback (https://arxiv.org/abs/2603.09692).
    """
    mean, (first, second) = _two_draws(rewards, width, key)
    return _best_pair_of(mean + first, mean + second, distinct)


def drts(
    rewards: Float32[Array, "K B M"], distinct: Bool[Array, "B M M"], key: PRNGKeyArray, *, width: float = 1.0
) -> Duel:
    """Double reverse Thompson sampling: the best of one draw from the intervals against the worst of another."""
    mean, (first, second) = _two_draws(rewards, width, key)
    return _best_pair_of(mean + first, second - mean, distinct)


def delta_ucb(
    rewards: Float32[Array, "K B M"], distinct: Bool[Array, "B M M"], key: PRNGKeyArray, *, width: float = 1.0
) -> Duel:
    """The pair with the widest gap from the upper end of one interval to the lower end of the other; needs no key."""
    mean, half_width = _interval(rewards, width)
    return best_pair((mean + half_width)[:, :, None] - (mean - half_width)[:, None, :], distinct)


def infomax_intervals(
    rewards: Float32[Array, "K B M"], distinct: Bool[Array, "B M M"], key: PRNGKeyArray, *, width: float = 1.0
) -> Duel:
    """The pair whose preference the intervals leave most open, sigmoid(U - L') - sigmoid(L - U'); needs no key."""
    mean, half_width = _interval(rewards, width)
    upper, lower = mean + half_width, mean - half_width
    most = jax.nn.sigmoid(upper[:, :, None] - lower[:, None, :])
    return best_pair(most - jax.nn.sigmoid(lower[:, :, None] - upper[:, None, :]), distinct)


def max_min_lcb(
    rewards: Float32[Array, "K B M"], distinct: Bool[Array, "B M M"], key: PRNGKeyArray, *, width: float = 1.0
) -> Duel:
    """The response whose margin over its worst opponent has the highest lower bound, against that opponent; needs no key.

    https://arxiv.org/abs/2406.16745, with m - m' - (s + s') as the lower bound of the margin.
    """
    mean, half_width = _interval(rewards, width)
    lower_bound = (mean - half_width)[:, :, None] - (mean + half_width)[:, None, :]
    worst = jnp.where(distinct, lower_bound, jnp.inf).min(-1)
    first = jnp.where(distinct.any(-1), worst, NEVER).argmax(-1)
    against = jnp.take_along_axis(lower_bound, first[:, None, None], axis=1)[:, 0]
    second = jnp.where(_differs_from(distinct, first), -against, NEVER).argmax(-1)
    return Duel(first=first.astype(jnp.int32), second=second.astype(jnp.int32))


def ucb(
    rewards: Float32[Array, "K B M"], distinct: Bool[Array, "B M M"], key: PRNGKeyArray, *, width: float = 1.0
) -> Duel:
    """The highest upper confidence bound against a random other response (https://arxiv.org/abs/2312.00267)."""
    mean, half_width = _interval(rewards, width)
    return _best_pair_of(mean + half_width, jax.random.uniform(key, mean.shape), distinct)


RULES: Mapping[str, DuelRule] = {
    "passive": passive,
    "ee_ts": ee_ts,
    "bai_ts": bai_ts,
    "uncertainty": uncertainty,
    "max_margin": max_margin,
    "best_against_worst": best_against_worst,
    "infomax": infomax,
    "dts": dts,
    "drts": drts,
    "delta_ucb": delta_ucb,
    "infomax_intervals": infomax_intervals,
    "max_min_lcb": max_min_lcb,
    "ucb": ucb,
    # Its bonus ||phi(y) - phi(y')|| is, in a linear model, the posterior's deviation of the logit (https://arxiv.org/abs/2402.10500).
    "max_uncertainty": uncertainty,
    "entropy_epistemic": entropy_epistemic,
    "ee_ts_oat": ee_ts_oat,
    "bai_ts_logits": bai_ts_logits,
    "bai_ts_oat": bai_ts_oat,
}


def build(name: str, width: float | None = None) -> DuelRule:
    """Returns a duel rule, jitted: one of RULES, or my_module:my_rule.

    Args:
      name: of the rule.
      width: of its intervals, in standard deviations over the heads; None: the rule's own.

    Raises:
      ValueError: there is no such rule, it asks for what no rule can see, or it knows no intervals.
    """
    rule = RULES[name] if name in RULES else user_function(name, "exploration.rule")
    seen_by(rule, f"exploration.rule={name}")
    if width is None:
        return jax.jit(rule)
    if "width" not in inspect.signature(rule).parameters:
        having = ", ".join(each for each, own in RULES.items() if "width" in inspect.signature(own).parameters)
        raise ValueError(
            f"config.exploration.width={width}: the rule '{name}' has no intervals; leave it None, or take one of {having}"
        )
    return jax.jit(partial(rule, width=width))


def best_of_n(rewards: Float32[Array, "K B N"]) -> Int32[Array, " B"]:
    """Returns the candidate that the ensemble's mean ranks highest."""
    return rewards.mean(0).argmax(-1).astype(jnp.int32)


def duel_rewards(rewards: Float32[Array, "K B M"], duel: Duel) -> tuple[Float32[Array, "K B"], Float32[Array, "K B"]]:
    """Returns every head's rewards of the two duellists, the first's and the second's."""
    return (
        jnp.take_along_axis(rewards, duel.first[None, :, None], axis=2)[..., 0],
        jnp.take_along_axis(rewards, duel.second[None, :, None], axis=2)[..., 0],
    )


def head_label(rewards: Float32[Array, "K B M"], duel: Duel, key: PRNGKeyArray) -> Float32[Array, " B"]:
    """Labels a duel as one random head per prompt sees it: 1 if it prefers the first response, 0 the second, 0.5 on a tie."""
    first, second = duel_rewards(rewards, duel)
    head = jax.random.randint(key, (rewards.shape[1],), 0, rewards.shape[0])
    margin = jnp.take_along_axis(first - second, head[None], axis=0)[0]
    return (jnp.sign(margin) + 1) / 2


def mean_label(rewards: Float32[Array, "K B M"], duel: Duel) -> Float32[Array, " B"]:
    """Labels a duel softly, as the ensemble on the whole sees it: mean over heads of sigmoid(r(first) - r(second))."""
    first, second = duel_rewards(rewards, duel)
    return jax.nn.sigmoid(first - second).mean(0)
