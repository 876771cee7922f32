"""From the settings to who labels."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime

import numpy as np

from sea_jax.oracles import preferences, user_preference
from sea_jax.oracles.embedding import embedding_similarity
from sea_jax.oracles.reward_model import remote_reward, reward_model_scores
from sea_jax.runtime import processes
from sea_jax.settings import (
    AT_LEAST_1,
    DTYPE,
    FRACTION,
    NOT_NEGATIVE,
    POSITIVE,
    URLS,
    addresses,
    naming,
    one_of,
    one_of_or_user,
    setting,
    user_function,
)
from sea_jax.types import Oracle, Preference

KINDS = ("embedding", "reward_model", "remote")


@dataclass(frozen=True)
class OracleSettings:
    """Who labels the duels, and how."""

    kind: str = setting(
        "embedding",
        '"embedding" similarity, a "reward_model" in this process, "remote" (servers), or my_module:my_preference',
        one_of_or_user(KINDS),
    )
    encoder: str = setting("builtin:all-minilm-l6-v2", "of the embedding oracle")
    reward_model: str = setting("", "sequence classifier with one label, given as policy.source is")
    urls: str = setting("", "remote: servers of oracle.reward_model, separated by commas; they share the texts", URLS)
    timeout_s: float = setting(
        600.0, "remote, async def: how long a server or a call may take to answer", POSITIVE, unit="seconds"
    )
    retries: int = setting(
        8,
        "remote: as actor.retries; my_preference: calls after one that failed; the waits double, up to a minute each",
        NOT_NEGATIVE,
    )
    concurrency: int = setting(16, "my_preference, if it is async def: calls at once, of one pair each", AT_LEAST_1)
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
    label: str = setting(
        "deterministic",
        '"deterministic": who is preferred wins; "bradley_terry": drawn; "soft": the probability itself',
        one_of(*preferences.LABELS),
    )
    flip_probability: float = setting(0.0, "labels exchanged at random", FRACTION, source="paper, App. G.4")

    def faults(self) -> Iterator[str]:
        """Yields a line for everything that does not go together."""
        if self.kind in ("reward_model", "remote") and not self.reward_model:
            yield f"config.oracle.reward_model='': oracle.kind={self.kind} needs a directory or hub name"
        if self.kind == "remote" and not self.urls:
            yield "config.oracle.urls='': oracle.kind=remote needs the URL of a server, or several separated by commas"


def own_scale(settings: OracleSettings) -> float:
    """Returns what rewards are multiplied by, where nothing is set as the kind of oracle wants it."""
    return settings.scale or (1.0 if settings.kind in ("reward_model", "remote") else 10.0)


def preference(settings: OracleSettings, token_file: str = "", now: datetime | None = None) -> Preference:
    """Returns the taste behind the oracle, free of noise.

    Args:
      settings: OracleSettings.
      token_file: holds the token of the oracle's servers; "": the environment does.
      now: the time that a reward model's chat template is told; None: that of the clock.
    """
    if settings.kind == "embedding":
        with naming("oracle.encoder", settings.encoder):
            return preferences.by_reward(embedding_similarity(settings.encoder), own_scale(settings))
    if settings.kind == "reward_model":
        with naming("oracle.reward_model", settings.reward_model):
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
        with naming("oracle.reward_model", settings.reward_model):
            scores = remote_reward(served, settings.reward_model, settings.max_tokens, now)
        return processes.asked_by_first(preferences.by_reward(scores, own_scale(settings)))
    caller = user_preference.Caller(
        user_function(settings.kind, "oracle.kind"),
        settings.kind,
        settings.retries,
        settings.timeout_s,
        settings.concurrency,
    )
    return processes.asked_by_first(user_preference.persistent(caller))


def remote_scores(settings: OracleSettings, token_file: str) -> Callable[[list[list[int]]], np.ndarray]:
    """Returns the scores of the servers of a reward model: token ids of N conversations -> [N].

    Raises:
      ValueError: there is no token.
    """
    from gpu_bridge import client  # the library works without

    patience = client.Patience(settings.timeout_s, settings.retries)
    token = client.read_token(token_file)
    return client.OracleClient(addresses(settings.urls), token, patience, settings.batch_size).score


def oracle(settings: OracleSettings, taste: Preference) -> Oracle:
    """Returns who labels the duels by a taste: with the settings' kind of label and noise."""
    labeller = preferences.labelled(taste, preferences.LABELS[settings.label])
    if settings.label != "deterministic" and settings.kind in KINDS:
        labeller = preferences.told_if_certain(labeller, own_scale(settings))
    return preferences.flipped(labeller, settings.flip_probability) if settings.flip_probability else labeller
