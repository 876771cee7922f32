"""From the settings to who labels, and to who judges."""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import numpy as np

from sea_jax.oracles import judge, people, preferences, user_preference
from sea_jax.oracles.embedding import AGAINST, embedding_similarity, less_repetition
from sea_jax.oracles.judge import ChatJudgeSettings
from sea_jax.oracles.people import PeopleSettings
from sea_jax.oracles.reward_model import remote_reward, reward_model_scores
from sea_jax.runtime import processes
from sea_jax.settings import (
    AT_LEAST_1,
    DTYPE,
    FRACTION,
    NOT_NEGATIVE,
    POSITIVE,
    URLS,
    Check,
    addresses,
    naming,
    one_of,
    one_of_or_user,
    section,
    setting,
    user_function,
)
from sea_jax.types import Oracle, Preference

BY_REWARD = ("embedding", "reward_model", "remote")
KINDS = (*BY_REWARD, "judge")
KIND: Check = one_of_or_user(KINDS)
KIND_OR_NONE: Check = (lambda v: v == "" or KIND[0](v), f"empty, {KIND[1]}")
KINDS_TOLD = (
    '"embedding" similarity, a "reward_model" in this process, "remote" (servers), a chat model as "judge", or '
    "my_module:my_preference"
)


@dataclass(frozen=True)
class PreferenceSettings:
    """Whose taste it is."""

    kind: str = setting("embedding", KINDS_TOLD, KIND)
    encoder: str = setting("builtin:all-minilm-l6-v2", "embedding: whose embeddings are compared")
    against: str = setting(
        "prompt",
        'embedding: what a response is compared with: "prompt", "reference" (the human one) or a "mixture"',
        one_of(*AGAINST),
    )
    reference_weight: float = setting(
        0.5, "mixture: of the similarity with the reference; that with the prompt has the rest", FRACTION
    )
    repetition_penalty: float = setting(
        0.0, "embedding: taken off the similarity, times the share of words that were there before", NOT_NEGATIVE
    )
    reward_model: str = setting("", "sequence classifier with one label, or ArmoRM; given as policy.source is")
    urls: str = setting("", "remote: servers of reward_model, separated by commas; they share the texts", URLS)
    timeout_s: float = setting(
        600.0, "remote, judge, async def: how long a server or a call may take to answer", POSITIVE, unit="seconds"
    )
    retries: int = setting(
        8,
        "remote: as actor.retries; judge, my_preference: calls after one that failed; the waits double, up to a minute each",
        NOT_NEGATIVE,
    )
    concurrency: int = setting(
        16, "judge; my_preference, if it is async def: calls at once, of one pair each", AT_LEAST_1
    )
    max_abstentions: int = setting(
        64, "pairs in a row without an answer after which the run stops; 0: never", NOT_NEGATIVE, unit="pairs"
    )
    dtype: str = setting("bfloat16", "compute dtype of the reward model", DTYPE)
    batch_size: int = setting(
        32, "texts that the reward model reads at a time; remote: that one request holds", AT_LEAST_1
    )
    max_tokens: int = setting(
        2048,
        "of prompt and response to the reward model; the beginning of longer prompts is cut",
        AT_LEAST_1,
        unit="tokens",
    )
    scale: float = setting(
        0.0,
        "times the reward or similarity, inside Bradley-Terry's sigmoid; 0: 1 for a reward model, whose scores are logits, and "
        "10 for the similarity, a cosine",
        (lambda v: 0 <= v < math.inf, "a finite number of 0 or more"),
    )
    judge: ChatJudgeSettings = section(ChatJudgeSettings)

    @property
    def reads_references(self) -> bool:
        """Whether it compares a response with the human reference."""
        return self.kind == "embedding" and self.against != "prompt"

    def faults_of(self, field: str) -> Iterator[str]:
        """Yields a line for everything that does not go together.

        Args:
          field: where these settings stand, such as oracle.
        """
        if self.kind in ("reward_model", "remote") and not self.reward_model:
            yield f"config.{field}.reward_model='': {field}.kind={self.kind} needs a directory or hub name"
        if self.kind == "remote" and not self.urls:
            yield f"config.{field}.urls='': {field}.kind=remote needs the URL of a server, or several separated by commas"
        if self.kind == "judge":
            yield from self.judge.faults_of(f"{field}.judge")


@dataclass(frozen=True)
class JudgeSettings(PreferenceSettings):
    """Who compares responses in evaluations, apart from the oracle; nothing is ever learnt from it."""

    kind: str = setting("", f'"": there is none; {KINDS_TOLD}', KIND_OR_NONE)


@dataclass(frozen=True)
class OracleSettings(PreferenceSettings):
    """Who labels the duels, and how."""

    kind: str = setting(
        PreferenceSettings.kind,
        f'{KINDS_TOLD}; "people" in a web page, see `people`',
        one_of_or_user((*KINDS, people.KIND)),
    )
    label: str = setting(
        "deterministic",
        '"deterministic": who is preferred wins; "bradley_terry": drawn; "soft": the probability itself',
        one_of(*preferences.LABELS),
    )
    flip_probability: float = setting(0.0, "labels exchanged at random", FRACTION, source="paper, App. G.4")

    def faults(self) -> Iterator[str]:
        """Yields a line for everything that does not go together."""
        yield from self.faults_of("oracle")
        if self.kind == people.KIND and self.label != "deterministic":
            yield f"config.oracle.label={self.label}: what people say is the label; oracle.kind=people needs deterministic"
        if self.kind == people.KIND and self.flip_probability:
            yield f"config.oracle.flip_probability={self.flip_probability}: oracle.kind=people needs 0, their labels are kept"


def own_scale(settings: PreferenceSettings) -> float:
    """Returns what rewards are multiplied by, where nothing is set as the kind of preference wants it."""
    return settings.scale or (1.0 if settings.kind in ("reward_model", "remote") else 10.0)


def preference(
    settings: PreferenceSettings,
    token_file: str = "",
    now: datetime | None = None,
    *,
    field: str = "oracle",
    references: Mapping[str, str] | None = None,
    workdir: Path | None = None,
) -> Preference:
    """Returns the taste behind an oracle or a judge, free of noise.

    Args:
      settings: PreferenceSettings.
      token_file: holds the token of its servers; "": the environment does.
      now: the time that a reward model's chat template is told; None: that of the clock.
      field: where the settings stand, for errors.
      references: prompt -> the human response, for a taste that reads it.
      workdir: where a judge's answers are kept; None: nowhere.
    """
    if settings.kind == "embedding":
        with naming(f"{field}.encoder", settings.encoder):
            reward = embedding_similarity(
                settings.encoder, AGAINST[settings.against](settings.reference_weight), references or {}
            )
        if settings.repetition_penalty:
            reward = less_repetition(reward, settings.repetition_penalty)
        taste = preferences.by_reward(reward, own_scale(settings))
        taste.reads_references = settings.reads_references  # type: ignore[attr-defined]
        return taste
    if settings.kind == "reward_model":
        with naming(f"{field}.reward_model", settings.reward_model):
            scores = reward_model_scores(
                settings.reward_model,
                dtype=settings.dtype,
                batch_size=settings.batch_size,
                max_tokens=settings.max_tokens,
                now=now,
            )
        return preferences.by_reward(scores, own_scale(settings))
    if settings.kind == "remote":
        served = remote_scores(settings, token_file)
        with naming(f"{field}.reward_model", settings.reward_model):
            scores = remote_reward(served, settings.reward_model, settings.max_tokens, now)
        return processes.asked_by_first(preferences.by_reward(scores, own_scale(settings)))
    if settings.kind == "judge":
        return processes.asked_by_first(
            judge.judge(
                settings.judge,
                f"{field}.judge",
                workdir,
                retries=settings.retries,
                timeout_s=settings.timeout_s,
                concurrency=settings.concurrency,
            )
        )
    caller = user_preference.Caller(
        user_function(settings.kind, f"{field}.kind"),
        f"{field}.kind={settings.kind}",
        settings.retries,
        settings.timeout_s,
        settings.concurrency,
    )
    return processes.asked_by_first(user_preference.persistent(caller))


def remote_scores(settings: PreferenceSettings, token_file: str) -> Callable[[list[list[int]]], np.ndarray]:
    """Returns the scores of the servers of a reward model: token ids of N conversations -> [N].

    Raises:
      ValueError: there is no token.
    """
    from gpu_bridge import client  # the library works without

    patience = client.Patience(settings.timeout_s, settings.retries)
    token = client.read_token(token_file)
    return client.OracleClient(addresses(settings.urls), token, patience, settings.batch_size).score


def oracle(settings: OracleSettings, taste: Preference | None, asked: PeopleSettings) -> Oracle:
    """Returns who labels the duels.

    Args:
      settings: OracleSettings.
      taste: labelled with the settings' kind of label and noise; None: people are asked.
      asked: how these are.
    """
    if taste is None:
        return people.People(asked)
    labeller = preferences.labelled(taste, preferences.LABELS[settings.label])
    if settings.label != "deterministic" and settings.kind in BY_REWARD:
        labeller = preferences.told_if_certain(labeller, own_scale(settings))
    return preferences.flipped(labeller, settings.flip_probability) if settings.flip_probability else labeller


def opened(
    labeller: Oracle, workdir: Path, budget: int, stopping: Callable[[], bool]
) -> AbstractContextManager[object]:
    """Returns what is open while an oracle may be asked: the page of people, or nothing.

    Args:
      labeller: from `oracle`.
      workdir: of the run.
      budget: labels that the run pays for.
      stopping: whether the run was told to stop.
    """
    return labeller.open(workdir, budget, stopping) if isinstance(labeller, people.People) else nullcontext()
