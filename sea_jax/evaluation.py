"""How good the policy is: its greedy responses to held-out prompts against the initial policy's, as oracle and judge see it."""

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
from sea_jax.oracles.oracle import JudgeSettings
from sea_jax.oracles.preferences import answers
from sea_jax.policy_logprobs import ReadLikelihood
from sea_jax.repetition import repetition_metrics
from sea_jax.settings import AT_LEAST_1, NOT_NEGATIVE, section, setting
from sea_jax.statistics import Interval, win_rate, wins_of
from sea_jax.types import Candidates, Generate, Params, Preference, Prompts

Decode = Callable[[Candidates], list[list[str]]]  # B lists of M texts
Finished = Callable[[Candidates], np.ndarray]  # [B, M], which ended by themselves
HeldOut = Sequence[tuple[Mapping[str, Any], np.ndarray]]  # batches of prompts, and which of their rows count
ORACLE, JUDGE = "oracle", "judge"
# Who judges -> what the metrics call the win rates of the policy's greedy responses, and of the best of N.
WIN_RATES = {
    ORACLE: {"policy": "rm_win_rate", "best_of_n": "bon_win_rate", "reference": "rm_reference_win_rate"},
    JUDGE: {"policy": "judge_win_rate", "best_of_n": "bon_judge_win_rate", "reference": "judge_reference_win_rate"},
}


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
    likelihood_prompts: int = setting(
        128,
        "held-out prompts at which fluency and the loss on references are measured; 0: not",
        NOT_NEGATIVE,
    )
    oracle: bool = setting(True, "ask the oracle, too, not counted as queries; False: the judge alone, if there is one")
    judge: JudgeSettings = section(JudgeSettings)

    def faults(self) -> Iterator[str]:
        """Yields a line for everything that does not go together."""
        yield from self.judge.faults_of("eval.judge")


def best_by(settings: EvaluationSettings) -> str:
    """Returns by whose win rate a checkpoint is the best; "": nobody is asked."""
    return JUDGE if settings.judge.kind else ORACLE if settings.oracle else ""


@dataclass(frozen=True)
class Responses:
    """One response to each of N held-out prompts.

    Attributes:
      texts: N.
      lengths: [N] response tokens, the end-of-sequence token included.
      tokens: [N, T], padded behind the end of the sequence.
      finished: [N] bool, which ended by themselves; the others were cut.
    """

    texts: list[str]
    lengths: np.ndarray
    tokens: np.ndarray
    finished: np.ndarray


def greedy(
    generate: Generate, texts: Decode, finished: Finished, trained: Params, version: int, heldout: HeldOut
) -> Responses:
    """Writes the most probable response to every held-out prompt, token by token.

    Args:
      generate: an actor with one sample per prompt and temperature 0.
      texts: Candidates -> B lists of M texts.
      finished: Candidates -> which of them ended by themselves.
      trained: the trained part of the policy's parameters.
      version: how many policy steps made them.
      heldout: batches and masks.

    Returns:
      Responses to the prompts that count, in order.
    """
    written: list[str] = []
    lengths: list[np.ndarray] = []
    tokens: list[np.ndarray] = []
    ended: list[np.ndarray] = []
    for batch, counts in heldout:
        candidates = generate(trained, Prompts(batch["tokens"], batch["valid"]), jax.random.key(0), version)
        written += [row[0] for row, count in zip(texts(candidates), counts, strict=True) if count]
        lengths.append(np.asarray(candidates.lengths)[counts, 0])
        tokens.append(np.asarray(candidates.tokens)[counts, 0])
        ended.append(finished(candidates)[counts, 0])
    return Responses(written, np.concatenate(lengths), np.concatenate(tokens), np.concatenate(ended))


def best_of_n(
    generate: Generate,
    texts: Decode,
    finished: Finished,
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
      finished: Candidates -> which of them ended by themselves.
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
    tokens: list[np.ndarray] = []
    ended: list[np.ndarray] = []
    for index, (batch, counts) in enumerate(heldout):
        candidates = generate(
            trained, Prompts(batch["tokens"], batch["valid"]), jax.random.fold_in(key, index), version
        )
        responses = texts(candidates)
        best = np.asarray(sampling.best_of_n(ensemble.rewards(reward_model, features(batch, candidates, responses))))
        rows = np.flatnonzero(counts)
        written += [responses[row][best[row]] for row in rows]
        lengths.append(np.asarray(candidates.lengths)[rows, best[rows]])
        tokens.append(np.asarray(candidates.tokens)[rows, best[rows]])
        ended.append(finished(candidates)[rows, best[rows]])
    return Responses(written, np.concatenate(lengths), np.concatenate(tokens), np.concatenate(ended))


@dataclass(frozen=True)
class Evaluation:
    """What every evaluation of a run shares.

    Attributes:
      records: the N held-out records.
      preferences: who compares, ORACLE and JUDGE as far as they are asked -> the taste, free of noise.
      greedy: trained parameters, policy steps -> a response to every held-out prompt.
      best_of_n: trained parameters, ERM, policy steps -> the best of n responses to the first of them.
      likelihood: what policies think of texts; None: it is not measured.
      initial: the initial policy's greedy responses.
      swapped: [N] bool, prompts at which the pair is shown the other way round.
    """

    records: Sequence[Record]
    preferences: Mapping[str, Preference]
    greedy: Callable[[Params, int], Responses]
    best_of_n: Callable[[Params, Ensemble, int], Responses]
    likelihood: ReadLikelihood | None
    initial: Responses
    swapped: np.ndarray

    def against_initial(self, texts: Sequence[str], who: str) -> tuple[Interval, np.ndarray]:
        """Compares responses with the initial policy's.

        Args:
          texts: to the first n <= N held-out prompts.
          who: compares, one of the preferences.

        Returns:
          As of `compare`.
        """
        count = len(texts)
        taste, opponents = self.preferences[who], self.initial.texts[:count]
        return compare(taste, self._prompts(count), texts, opponents, self.swapped[:count], who)

    def against_references(self, texts: Sequence[str], who: str) -> tuple[Interval, np.ndarray] | None:
        """Compares responses with the data set's own, where it has one.

        Args:
          texts: to the first n <= N held-out prompts.
          who: compares, one of the preferences.

        Returns:
          As of `compare`, P(response wins) [n] being NaN where there is no reference; None if there is none at all, or if who
          compares holds every response against it, so that nothing is as good.
        """
        if getattr(self.preferences[who], "reads_references", False):
            return None
        references = [record["reference"].strip() for record in self.records[: len(texts)]]
        there = [i for i, reference in enumerate(references) if reference]
        if not there:
            return None
        prompts = self._prompts(len(texts))
        prompts, known_texts, opponents = ([column[i] for i in there] for column in (prompts, texts, references))
        interval, known = compare(self.preferences[who], prompts, known_texts, opponents, self.swapped[there], who)
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
    best = None
    if settings.best_of_n and reward_model is not None:
        best = evaluation.best_of_n(trained, reward_model, version)
    row, probabilities = {"eval/rm_response_length": float(now.lengths.mean())}, {}
    for who in evaluation.preferences:
        names = WIN_RATES[who]
        interval, probabilities[who] = evaluation.against_initial(now.texts, who)
        row |= win_rate_metrics(interval, names["policy"])
        if settings.against_references and (found := evaluation.against_references(now.texts, who)):
            row |= win_rate_metrics(found[0], names["reference"])
        if best is not None:
            row |= win_rate_metrics(evaluation.against_initial(best.texts, who)[0], names["best_of_n"])
    if best is not None:
        row["eval/bon_response_length"] = float(best.lengths.mean())
    row |= text_metrics(evaluation, trained, now)
    row |= {
        "eval/initial_response_length": float(evaluation.initial.lengths.mean()),
        "eval/elapsed_time": time.perf_counter() - start,
    }
    return row, samples(evaluation, now, probabilities, step)


def win_rate_metrics(interval: Interval, name: str) -> dict[str, float]:
    """Returns a win rate with its bounds as metrics."""
    return {f"eval/{name}": interval.mean, f"eval/{name}_low": interval.low, f"eval/{name}_high": interval.high}


def text_metrics(evaluation: Evaluation, trained: Params, responses: Responses) -> dict[str, float]:
    """Returns what nobody's taste is needed for: how many ended by themselves, repetition, fluency, the loss on references.

    Args:
      evaluation: Evaluation.
      trained: the trained part of the parameters of the policy whose loss it is.
      responses: to the first n <= N held-out prompts.
    """
    found = {"finished_ratio": float(responses.finished.mean())} | repetition_metrics(responses.texts)
    if evaluation.likelihood is not None:
        likelihood = evaluation.likelihood(trained, responses.tokens, responses.lengths)
        found["fluency"] = likelihood.fluency
        if likelihood.reference_loss is not None:
            found["reference_loss"] = likelihood.reference_loss
    return {f"eval/{name}": value for name, value in found.items()}


def samples(
    evaluation: Evaluation, responses: Responses, probabilities: Mapping[str, np.ndarray], step: int
) -> Iterator[dict[str, Any]]:
    """Yields what samples.jsonl holds of an evaluation.

    Args:
      evaluation: Evaluation.
      responses: to the held-out prompts.
      probabilities: who compares -> P(response wins), one for each; NaN where there is no answer.
      step: training step.

    Yields:
      One record per prompt.
    """
    names = {ORACLE: "win_probability", JUDGE: "judge_win_probability"}
    rows = zip(evaluation.records, responses.texts, evaluation.initial.texts, strict=True)
    for i, (record, text, initial) in enumerate(rows):
        said = {names[who]: float(probability[i]) for who, probability in probabilities.items()}
        yield {
            "step": step,
            "prompt_id": record["id"],
            "prompt": record["prompt"],
            "reference": record["reference"],
            "initial": initial,
            "response": text,
        } | {name: probability for name, probability in said.items() if not np.isnan(probability)}


def compare(
    preference: Preference,
    prompts: Sequence[str],
    responses: Sequence[str],
    opponents: Sequence[str],
    swapped: np.ndarray,
    who: str = ORACLE,
) -> tuple[Interval, np.ndarray]:
    """Returns the share of prompts where a taste, free of noise, prefers a response over its opponent's.

    Args:
      preference: the taste.
      prompts: N.
      responses: N.
      opponents: N.
      swapped: [N] bool, pairs that are shown with the opponent first.
      who: compares, for errors.

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
        raise ValueError(f"the {who} was asked about {len(asked)} pairs of an evaluation and answered none")
    return win_rate(wins_of(decided)), probability
