"""Do judges agree? Several are shown the same pairs in the same order: how often they choose alike, and what stands first."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from jaxtyping import Bool, Float64

from sea_jax.oracles.preferences import answers
from sea_jax.statistics import Interval, cohens_kappa, win_rate, wins_of
from sea_jax.types import Preference


@dataclass(frozen=True)
class Pairs:
    """N pairs.

    Attributes:
      prompts: N.
      first: N responses.
      second: N responses.
      swapped: [N], pairs that are shown with the second response first.
    """

    prompts: Sequence[str]
    first: Sequence[str]
    second: Sequence[str]
    swapped: Bool[np.ndarray, " N"]


@dataclass(frozen=True)
class Opinion:
    """What a judge says of N pairs.

    Attributes:
      probability: that the first response wins, [N]; NaN where there is no answer.
      by_place: in which order a pair is shown may change it.
    """

    probability: Float64[np.ndarray, " N"]
    by_place: bool


def opinion(preference: Preference, pairs: Pairs) -> Opinion:
    """Asks a judge about pairs.

    Raises:
      ValueError: an answer cannot be used, see `preferences.answers`.
      OSError: it does not answer.
    """
    probability = np.full(len(pairs.prompts), np.nan)
    for rows, known in answers(preference, pairs.prompts, pairs.first, pairs.second, pairs.swapped):
        probability[rows] = known
    return Opinion(probability, not getattr(preference, "pointwise", False))


def shown_first_wins(said: Opinion, swapped: Bool[np.ndarray, " N"]) -> Interval | None:
    """Returns the share of pairs that the response shown first wins, a tie counting half; None: there is nothing to tell."""
    known = ~np.isnan(said.probability)
    if not said.by_place or not known.any():
        return None
    return win_rate(wins_of(np.where(swapped, 1 - said.probability, said.probability)[known]))


def agreement(one: Opinion, other: Opinion) -> tuple[Interval, float] | None:
    """Returns the share of pairs on which two judges choose alike, a tie being a choice, and Cohen's kappa.

    None where there is no pair that both have answered.
    """
    known = ~np.isnan(one.probability) & ~np.isnan(other.probability)
    if not known.any():
        return None
    chosen = wins_of(one.probability[known]), wins_of(other.probability[known])
    return win_rate((chosen[0] == chosen[1]).astype(np.float64)), cohens_kappa(*chosen)


def table(opinions: Mapping[str, Opinion], swapped: Bool[np.ndarray, " N"]) -> str:
    """Returns what each judge says and how far any two agree, as two Markdown tables."""
    alone = ["| judge | answered | ties | shown first wins [95% interval] |", "| --- | ---: | ---: | ---: |"]
    for name, said in opinions.items():
        known = said.probability[~np.isnan(said.probability)]
        bias = shown_first_wins(said, swapped)
        shares = f"{len(known)} of {len(said.probability)} | {int((known == 0.5).sum())}"
        alone.append(f"| {name} | {shares} | {bias.shown() if bias else 'reads one at a time'} |")
    together = ["| judges | pairs | agreement [95% interval] | Cohen's kappa |", "| --- | ---: | ---: | ---: |"]
    for (name, one), (other_name, other) in combinations(opinions.items(), 2):
        found = agreement(one, other)
        told = f"{found[0].count} | {found[0].shown()} | {found[1]:.3f}" if found else "0 |  | "
        together.append(f"| {name}, {other_name} | {told} |")
    return "\n".join([*alone, *(["", *together] if len(opinions) > 1 else [])])
