"""Responses that another process wrote: held against the learner's own log-probs, kept on disk, written a batch ahead."""

import functools
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float32, Int32, PRNGKeyArray

from sea_jax.actors.bridge import ActorSettings
from sea_jax.actors.in_process import at_once
from sea_jax.actors.journal import Journal, Written
from sea_jax.types import Array, Candidates, Generate, Params, Prompts, Respond

COMPARED = 2  # responses to each prompt whose log-probs are compared


Logprobs = Callable[[Params, Prompts, Int32[Array, "B m T"], Int32[Array, "B m"]], Float32[Array, "B m T"]]
"""Trained parameters, prompts, tokens and lengths of m responses to each -> the learner's log-probs."""


def _start(write: Callable[[], Candidates]) -> Future[Candidates]:
    """Writes in a daemon, since an executor's threads are waited for at the interpreter's end, come what may."""
    future: Future[Candidates] = Future()

    def work() -> None:
        try:
            future.set_result(write())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=work, daemon=True).start()
    return future


def resumable(version: int, sync_every: int) -> bool:
    """Whether a run can go on from here: it has the weights that are to write next, its own or the initial policy's.

    Args:
      version: policy steps.
      sync_every: policy steps after which who writes is given the new weights.
    """
    return version % sync_every == 0 or version < sync_every


class SyncedWeights:
    """The weights with which responses are written: those of the last multiple of `sync_every` policy steps."""

    def __init__(self, initial: Params, sync_every: int) -> None:
        """Begins with the initial policy's.

        Args:
          initial: the trained part of its parameters.
          sync_every: policy steps; above 1 a copy of the weights is kept.
        """
        self._held, self._sync_every = (initial, 0), sync_every

    def newest(self, trained: Params, version: int) -> tuple[Params, int]:
        """Returns the weights that write, and their version.

        Args:
          trained: the newest there are.
          version: how many policy steps made them.
        """
        if self._sync_every == 1:
            return trained, version
        newest = version - version % self._sync_every
        if self._held[1] != newest:
            assert version == newest, "a run goes on where `resumable` says"
            self._held = jax.tree.map(jnp.copy, trained), version
        return self._held


class EngineResponder:
    """Answers batch after batch, from the journal where it can.

    With `next_batch` the engine writes the next batch while the learner works on this one: its policy is then a step old.
    """

    def __init__(
        self,
        generate: Generate,
        logprobs: Logprobs,
        journal: Journal,
        *,
        max_logprob_gap: float,
        initial: Params,
        sync_every: int,
        next_batch: Callable[[int], tuple[Prompts, PRNGKeyArray]] | None = None,
    ) -> None:
        """Takes the parts.

        Args:
          generate: who writes.
          logprobs: the learner's.
          journal: Journal.
          max_logprob_gap: nats per token; a greater one stops the run.
          initial: the initial policy's, which writes until it is given others.
          sync_every: policy steps after which who writes is given the new weights; above 1 they are kept here, too.
          next_batch: number of a batch -> its prompts and the key that it is answered with; None: nothing is written ahead.
        """
        self._generate, self._logprobs, self._journal = generate, logprobs, journal
        self._max_logprob_gap, self._next_batch = max_logprob_gap, next_batch
        self._synced = SyncedWeights(initial, sync_every)
        self._pending: tuple[int, Prompts, Params, int, Future[Candidates]] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.settle()

    def __call__(
        self, number: int, trained: Params, prompts: Prompts, key: PRNGKeyArray, version: int
    ) -> tuple[Candidates, Mapping[str, float]]:
        """Returns the responses to a batch.

        Args:
          number: of the batch.
          trained: the trained part of the policy's parameters.
          prompts: Prompts.
          key: random key.
          version: how many policy steps made the parameters.

        Returns:
          Candidates and {"actor/logprob_gap", "actor/staleness"}: nats per token, policy steps.

        Raises:
          ValueError: the learner and whoever wrote the responses disagree on their log-probs.
        """
        self.settle()
        # Whatever the journal holds: the next batch may need them.
        weights, of_version = self._synced.newest(trained, version)
        written = self._journal.find(number)
        if written is None:
            written = self._compare(prompts, weights, of_version, self._generate(weights, prompts, key, of_version))
            self._journal.record(number, written)
        if self._next_batch is not None and self._journal.find(number + 1) is None:
            following, following_key = self._next_batch(number + 1)
            if weights is trained:
                weights = jax.tree.map(jnp.copy, trained)  # the learner's next step takes the buffers
            future = _start(functools.partial(self._generate, weights, following, following_key, of_version))
            self._pending = (number + 1, following, weights, of_version, future)
        staleness = version - written.version
        return written.candidates, {"actor/staleness": staleness, "actor/logprob_gap": written.logprob_gap}

    def settle(self) -> None:
        """Returns when what is being written ahead is on disk; a checkpoint must not be saved before."""
        if self._pending is not None:
            number, prompts, trained, version, future = self._pending
            self._pending = None
            self._journal.record(number, self._compare(prompts, trained, version, future.result()))

    def _compare(self, prompts: Prompts, trained: Params, version: int, candidates: Candidates) -> Written:
        """Compares the log-probs of who wrote with the learner's under the same weights."""
        some, lengths = candidates.tokens[:, :COMPARED], candidates.lengths[:, :COMPARED]
        own = np.asarray(self._logprobs(trained, prompts, some, lengths))
        valid = np.arange(own.shape[-1]) < np.asarray(lengths)[..., None]
        gap = float(np.abs(own - np.asarray(candidates.logprobs[:, :COMPARED]))[valid].mean())
        if not gap <= self._max_logprob_gap:
            raise ValueError(
                f"actor/logprob_gap is {gap:.4f} nats per token after {version} policy steps, above "
                f"config.actor.max_logprob_gap={self._max_logprob_gap}: the engine does not compute what the learner does. "
                "Does it serve the same model, in a dtype that is precise enough? The oracle was asked nothing of this batch"
            )
        return Written(candidates, version, gap)


class Responder(NamedTuple):
    """Who answers the batches of prompts.

    Attributes:
      respond: answers one.
      settle: returns when nothing is on its way any more; before a checkpoint is saved.
      checkpointed: told how many batches were used when a checkpoint is saved.
    """

    respond: Respond
    settle: Callable[[], None]
    checkpointed: Callable[[int], None]


@contextmanager
def open_responder(
    settings: ActorSettings,
    generate: Generate,
    *,
    logprobs: Logprobs,
    initial: Params,
    next_batch: Callable[[int], tuple[Prompts, PRNGKeyArray]],
    directory: Path,
    checkpoints_kept: int,
) -> Iterator[Responder]:
    """Opens the way from prompts to candidates, in this process or through servers.

    Args:
      settings: ActorSettings.
      generate: who writes.
      logprobs, initial, next_batch: as of `EngineResponder`, of servers.
      directory: where the responses of servers are kept until a checkpoint has passed them.
      checkpoints_kept: how many.

    Raises:
      ValueError: several processes cannot write ahead.
    """
    if settings.kind == "in_process":
        yield Responder(
            at_once(generate, SyncedWeights(initial, settings.sync_every).newest), lambda: None, lambda batches: None
        )
        return
    if settings.lag and jax.process_count() > 1:
        raise ValueError("config.actor.lag=1: only a learner of one process writes ahead; set it to 0")
    journal = Journal(directory, checkpoints_kept)
    with EngineResponder(
        generate,
        logprobs,
        journal,
        max_logprob_gap=settings.max_logprob_gap,
        initial=initial,
        sync_every=settings.sync_every,
        next_batch=next_batch if settings.lag else None,
    ) as answers:
        yield Responder(answers, answers.settle, journal.checkpointed)
