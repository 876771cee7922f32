"""The seven agents of the SEA paper's Table 1: what explores, what learns from whom, and what answers in the end."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial

from sea_jax.agent import Agent, FillSlots
from sea_jax.config import RunSettings
from sea_jax.methods.limits import check, exactly
from sea_jax.methods.online import online
from sea_jax.methods.sea import sea
from sea_jax.policy import Policy
from sea_jax.settings import Check


@dataclass(frozen=True)
class Row:
    """A row of Table 1.

    Attributes:
      best_of_n: the ERM chooses the answer among several, else the policy answers greedily.
      active: a rule chooses the duel, else two plain samples meet.
      mixed: the policy also learns from the ERM's labels.
      policy_learns: it does at all.
    """

    best_of_n: bool
    active: bool
    mixed: bool
    policy_learns: bool = True


TABLE: Mapping[int, Row] = {
    2: Row(best_of_n=False, active=True, mixed=False),
    3: Row(best_of_n=False, active=True, mixed=True),
    4: Row(best_of_n=True, active=False, mixed=False),
    5: Row(best_of_n=True, active=True, mixed=False),
    6: Row(best_of_n=True, active=True, mixed=True),
    7: Row(best_of_n=True, active=True, mixed=False, policy_learns=False),
}


def variant(number: int, settings: RunSettings) -> FillSlots:
    """One of the agents with an ERM; 7 is Dwaracherla et al.'s (https://arxiv.org/abs/2402.00396)."""
    row = TABLE[number]
    any_rule: Check = (lambda v: v != "passive", "a rule that chooses, such as bai_ts")
    below_1: Check = (lambda v: v < 1, "numbers below 1")
    many: Check = (lambda v: v > 1, "2 or more")
    takes: dict[str, Check] = {
        "exploration.rule": any_rule if row.active else exactly("passive"),
        "exploration.gamma": below_1 if row.mixed else exactly(1),
        "exploration.planning_steps": exactly(0),
        "eval.best_of_n": many if row.best_of_n else exactly(0),
        "eval.best_of_n_always": exactly(row.best_of_n),
    }
    check(settings, f"is row {number} of Table 1", takes)
    fill = sea(settings)
    if row.policy_learns:
        return fill

    def fill_without_policy(agent: Agent, policy: Policy) -> Agent:
        return replace(fill(agent, policy), learn_policy=None)

    return fill_without_policy


VARIANTS: Mapping[str, Callable[[RunSettings], FillSlots]] = {
    "variant1": online,
    **{f"variant{number}": partial(variant, number) for number in TABLE},
}
