"""How good the policy is: its greedy responses to held-out prompts against the initial policy's, as the oracle sees it."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from sea_jax import ensemble, sampling
from sea_jax.data.prompts import Record
from sea_jax.ensemble import Ensemble
from sea_jax.features import Featurize
from sea_jax.oracles.preferences import answers
from sea_jax.settings import AT_LEAST_1, NOT_NEGATIVE, setting
from sea_jax.statistics import Interval, win_rate
from sea_jax.types import Candidates, Generate, Params, Preference, Prompts

Texts = Callable[[Candidates], list[list[str]]]  # B lists of M texts
HeldOut = Sequence[tuple[Mapping[str, Any], np.ndarray]]  # batches of prompts, and which of their rows count


@dataclass(frozen=True)
class EvaluationSettings:
    """When and on what the policy is measured."""

    every_queries: int = setting(1000, "between evaluations", AT_LEAST_1, unit="queries")
    num_prompts: int = setting(1000, "held-out prompts", AT_LEAST_1, source="paper, App. F")
    batch_size: int = setting(128, "prompts generated for at a time", AT_LEAST_1)
    max_new_tokens: int = setting(53, "of a response", AT_LEAST_1, unit="tokens")
    against_references: bool = setting(False, "also against the data set's own responses")
    best_of_n: int = setting(0, "at the end: best of n under the ERM; 0: not", NOT_NEGATIVE)
    best_of_n_always: bool = setting(False, "best of n at every evaluation, not only at the end")
    best_of_n_prompts: int = setting(64, "held-out prompts for it", AT_LEAST_1)


@dataclass(frozen=True)
class Responses:
    """One response to each of N held-out prompts.

    Attributes:
      texts: N.
      lengths: [N] response tokens, the end-of-sequence token included.
    """

    texts: list[str]
    lengths: np.ndarray


def greedy(generate: Generate, texts: Texts, trained: Params, version: int, heldout: HeldOut) -> Responses:
    """Writes the most probable response to every held-out prompt, token by token.

    Args:
      generate: an actor with one sample per prompt and temperature 0.
      texts: Candidates -> B lists of M texts.
      trained: the trained part of the policy's parameters.
      version: how many policy steps made them.
      heldout: batches and masks.

    Returns:
      Responses to the prompts that count, in order.
    """
    written: list[str] = []
    lengths: list[np.ndarray] = []
    for batch, counts in heldout:
        candidates = generate(trained, Prompts(batch["tokens"], batch["valid"]), jax.random.key(0), version)
        written += [row[0] for row, count in zip(texts(candidates), counts, strict=True) if count]
        lengths.append(np.asarray(candidates.lengths)[counts, 0])
    return Responses(written, np.concatenate(lengths))


def best_of_n(
    generate: Generate,
    texts: Texts,
    features: Featurize,
    trained: Params,
    version: int,
    reward_model: Ensemble,
    heldout: HeldOut,
    key: jax.Array,
) -> Responses:
    """Writes N responses to every held-out prompt and keeps the one that the ERM's mean ranks highest.

    Args:
      generate: an actor with N samples per prompt.
      texts: Candidates -> B lists of N texts.
      features: what the ERM sees.
      trained: the trained part of the policy's parameters.
      version: how many policy steps made them.
      reward_model: the ERM.
      heldout: batches and masks.
      key: random key.

    Returns:
      Responses to the prompts that count, in order.
    """
    written: list[str] = []
    lengths: list[np.ndarray] = []
    for index, (batch, counts) in enumerate(heldout):
        candidates = generate(
            trained, Prompts(batch["tokens"], batch["valid"]), jax.random.fold_in(key, index), version
        )
        responses = texts(candidates)
        best = np.asarray(sampling.best_of_n(ensemble.rewards(reward_model, features(batch, candidates, responses))))
        rows = np.flatnonzero(counts)
        written += [responses[row][best[row]] for row in rows]
        lengths.append(np.asarray(candidates.lengths)[rows, best[rows]])
    return Responses(written, np.concatenate(lengths))


@dataclass(frozen=True)
class Evaluation:
    """What every evaluation of a run shares.

    Attributes:
      records: the N held-out records.
      preference: the oracle's taste, free of noise.
      greedy: trained parameters, policy steps -> a response to every held-out prompt.
      best_of_n: trained parameters, ERM, policy steps -> the best of n responses to the first of them.
      initial: the initial policy's greedy responses.
      swapped: [N] bool, prompts at which the pair is shown the other way round.
    """

    records: Sequence[Record]
    preference: Preference
    greedy: Callable[[Params, int], Responses]
    best_of_n: Callable[[Params, Ensemble, int], Responses]
    initial: Responses
    swapped: np.ndarray

    def against_initial(self, texts: Sequence[str]) -> tuple[Interval, np.ndarray]:
        """Compares responses with the initial policy's.

        Args:
          texts: to the first n <= N held-out prompts.

        Returns:
          As of `compare`.
        """
        count = len(texts)
        return compare(self.preference, self._prompts(count), texts, self.initial.texts[:count], self.swapped[:count])

    def against_references(self, texts: Sequence[str]) -> tuple[Interval, np.ndarray] | None:
        """Compares responses with the data set's own, where it has one.

        Args:
          texts: to the first n <= N held-out prompts.

        Returns:
          As of `compare`, P(response wins) [n] being NaN where there is no reference; None if there is none at all.
        """
        references = [record["reference"].strip() for record in self.records[: len(texts)]]
        there = [i for i, reference in enumerate(references) if reference]
        if not there:
            return None
        prompts = self._prompts(len(texts))
        prompts, known_texts, opponents = ([column[i] for i in there] for column in (prompts, texts, references))
        interval, known = compare(self.preference, prompts, known_texts, opponents, self.swapped[there])
        probability = np.full(len(texts), np.nan)
        probability[there] = known
        return interval, probability

    def _prompts(self, count: int) -> list[str]:
        return [record["prompt"] for record in self.records[:count]]


def evaluate(
    evaluation: Evaluation,
    settings: EvaluationSettings,
    trained: Params,
    version: int,
    step: int,
    reward_model: Ensemble | None,
) -> tuple[dict[str, float], Iterator[dict[str, Any]]]:
    """Measures a policy in all the ways that a run's settings ask for.

    Args:
      evaluation: Evaluation.
      settings: EvaluationSettings.
      trained: the trained part of the policy's parameters.
      version: how many policy steps made them.
      step: training step; at 0 the policy is the initial one.
      reward_model: the ERM, where it is to choose the best of n; None: not now.

    Returns:
      Metrics, and what samples.jsonl holds.
    """
    start = time.perf_counter()
    now = evaluation.greedy(trained, version) if step else evaluation.initial
    row, probability = measure(evaluation, now, "rm")
    if settings.against_references:
        row |= measure_against_references(evaluation, now, "rm")
    if settings.best_of_n and reward_model is not None:
        row |= measure(evaluation, evaluation.best_of_n(trained, reward_model, version), "bon")[0]
    row |= {
        "eval/initial_response_length": float(evaluation.initial.lengths.mean()),
        "eval/elapsed_time": time.perf_counter() - start,
    }
    return row, samples(evaluation, now, probability, step)


def measure(evaluation: Evaluation, responses: Responses, name: str) -> tuple[dict[str, float], np.ndarray]:
    """Compares responses with the initial policy's.

    Args:
      evaluation: Evaluation.
      responses: to the first n <= N held-out prompts.
      name: of the way in which they were made, for the metrics: "rm" (the policy, greedily) or "bon" (best of N).

    Returns:
      Metrics, and P(response wins) [n].
    """
    interval, probability = evaluation.against_initial(responses.texts)
    row = _row(interval, f"eval/{name}_win_rate")
    return row | {f"eval/{name}_response_length": float(responses.lengths.mean())}, probability


def measure_against_references(evaluation: Evaluation, responses: Responses, name: str) -> dict[str, float]:
    """Compares responses with the data set's own, where it has one.

    Args:
      evaluation: Evaluation.
      responses: to the first n <= N held-out prompts.
      name: as for `measure`.

    Returns:
      Metrics; empty if no prompt has a reference.
    """
    found = evaluation.against_references(responses.texts)
    return {} if found is None else _row(found[0], f"eval/{name}_reference_win_rate")


def _row(interval: Interval, name: str) -> dict[str, float]:
    return {name: interval.mean, f"{name}_low": interval.low, f"{name}_high": interval.high}


def samples(
    evaluation: Evaluation, responses: Responses, probability: np.ndarray, step: int
) -> Iterator[dict[str, Any]]:
    """Yields what samples.jsonl holds of an evaluation.

    Args:
      evaluation: Evaluation.
      responses: to the held-out prompts.
      probability: P(response wins), one for each; NaN where there is no answer.
      step: training step.

    Yields:
      One record per prompt.
    """
    rows = zip(evaluation.records, responses.texts, evaluation.initial.texts, probability, strict=True)
    for record, text, initial, p in rows:
        yield {
            "step": step,
            "prompt_id": record["id"],
            "prompt": record["prompt"],
            "reference": record["reference"],
            "initial": initial,
            "response": text,
        } | ({} if np.isnan(p) else {"win_probability": float(p)})


def compare(
    preference: Preference,
    prompts: Sequence[str],
    responses: Sequence[str],
    opponents: Sequence[str],
    swapped: np.ndarray,
) -> tuple[Interval, np.ndarray]:
    """Returns the share of prompts where the oracle, free of noise, prefers a response over its opponent's.

    Args:
      preference: the oracle's taste.
      prompts: N.
      responses: N.
      opponents: N.
      swapped: [N] bool, pairs that are shown with the opponent first.

    Returns:
      The win rate over the prompts that are answered, with its 95% interval, ties counting half; and P(response wins) [N],
      NaN where there is no answer.

    Raises:
      ValueError: an answer cannot be used, see `preferences.answers`, or there is none at all.
    """
    differ = np.array([a != b for a, b in zip(responses, opponents, strict=True)], bool)
    probability = np.where(differ, np.nan, 0.5)  # the same text is a tie: nobody needs to be asked
    asked = np.flatnonzero(differ)
    if len(asked):
        shown, first, second = ([texts[i] for i in asked.tolist()] for texts in (prompts, responses, opponents))
        for rows, known in answers(preference, shown, first, second, swapped[asked]):
            probability[asked[rows]] = known
    decided = probability[~np.isnan(probability)]
    if not len(decided):
        raise ValueError(f"the oracle was asked about {len(asked)} pairs of an evaluation and answered none")
    return win_rate((np.sign(decided - 0.5) + 1) / 2), probability
