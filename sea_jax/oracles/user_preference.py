"""A preference that is somebody's code: asked again after an error, awaited where it is a coroutine."""

import asyncio
import functools
import inspect
import time
import traceback
from collections.abc import AsyncIterator, Awaitable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from absl import logging

from sea_jax.oracles.concurrent_calls import END, at_once, pause, wait_for
from sea_jax.oracles.preferences import row_and_value, usable, usable_values
from sea_jax.runtime import backoff
from sea_jax.types import Preference

# What no second try makes better.
MISTAKES = (NameError, ImportError, SyntaxError, AssertionError, NotImplementedError)
LONGEST_TEXT = 300  # characters that are shown of an error


class NoAnswerError(OSError):
    """A preference has failed too often; the text names it."""


@dataclass(frozen=True)
class Caller:
    """How somebody's code is called.

    Attributes:
      preference: the code.
      name: oracle.kind=my_module:my_function, or that of a judge.
      retries: calls after one that failed, before the next is an error; they count anew behind every answer.
      timeout_s: seconds that one call may be awaited.
      concurrency: calls that are awaited at once.
    """

    preference: Preference
    name: str
    retries: int
    timeout_s: float
    concurrency: int


@dataclass(frozen=True)
class Pairs:
    """What is asked: N prompts, two responses each, and lists of N by the name of a further parameter."""

    prompts: Sequence[str]
    first: Sequence[str]
    second: Sequence[str]
    names: Mapping[str, Sequence[Any]]

    def rows(self, rows: Sequence[int]) -> "Pairs":
        """Returns some of them."""

        def pick(values: Sequence[Any]) -> list[Any]:
            return [values[row] for row in rows]

        names = {name: pick(values) for name, values in self.names.items()}
        return Pairs(pick(self.prompts), pick(self.first), pick(self.second), names)


def persistent(caller: Caller) -> Preference:
    """Returns a preference that bears with the failures of somebody's code.

    An `async def` is called with one pair at a time, several calls at once. Any other function is called with all pairs, and
    after an error with those that it has not answered yet. An answer that is no probability becomes NaN.

    Raises:
      ValueError: the code does not take prompts and two lists of responses.
      NoAnswerError: by the preference: the code has failed too often. What it answered before that has been handed on.
    """
    preference = caller.preference
    _check_signature(preference, caller.name)

    @functools.wraps(preference)  # whoever asks looks for the parameters of the preference's own
    def ask(prompts: Sequence[str], first: Sequence[str], second: Sequence[str], **names: Any) -> Any:
        pairs = Pairs(prompts, first, second, names)
        if _is_coroutine_function(preference):
            return _one_pair_each(caller, pairs)
        said = _call(caller, pairs, 0)
        if isinstance(said, Iterator | AsyncIterator):
            return _one_by_one(caller, pairs, said)
        return usable_values(said, len(prompts))

    ask.pointwise = getattr(preference, "pointwise", False)  # type: ignore[attr-defined]
    return ask


def _check_signature(preference: Preference, name: str) -> None:
    """Refuses code that cannot be called as preferences are."""
    try:
        signature = inspect.signature(preference)
    except ValueError:  # some callables written in C tell nothing of their parameters
        return
    try:
        signature.bind([], [], [])
    except TypeError as error:
        raise ValueError(
            f"config.{name} takes {signature}: {error}; it is called with the prompts, the first and the second "
            "responses, and all other parameters need a default"
        ) from error


def _is_coroutine_function(preference: Preference) -> bool:
    return inspect.iscoroutinefunction(preference) or inspect.iscoroutinefunction(
        getattr(preference, "__call__", None)  # noqa: B004
    )


def _call(caller: Caller, pairs: Pairs, failures: int) -> Any:
    """What the code returns, awaited if it wants that, after so many failures in a row."""
    while True:
        try:
            said = caller.preference(pairs.prompts, pairs.first, pairs.second, **pairs.names)
            return wait_for(said) if isinstance(said, Awaitable) else said
        except Exception as error:
            failures += 1
            time.sleep(_wait_s(caller, failures, error))


def _one_by_one(caller: Caller, pairs: Pairs, said: Any) -> Iterator[tuple[int, float]]:
    """The answers of code that yields them; after an error it is asked about what it has not answered."""
    open_rows, local, failures = list(range(len(pairs.prompts))), list(range(len(pairs.prompts))), 0
    while True:
        try:
            answer = wait_for(anext(said, END)) if isinstance(said, AsyncIterator) else next(said, END)
        except Exception as error:
            if not open_rows:
                return
            failures += 1
            time.sleep(_wait_s(caller, failures, error))
            local = list(open_rows)
            said = _call(caller, pairs.rows(local), failures)
            continue
        if answer is END:
            return
        row, value = row_and_value(answer)
        if row not in range(len(local)) or local[row] not in open_rows:
            raise ValueError(f"the oracle was asked about {len(local)} pairs and answered about pair {row} (again?)")
        failures = 0
        open_rows.remove(local[row])
        yield local[row], usable(value)


def _one_pair_each(caller: Caller, pairs: Pairs) -> Iterator[tuple[int, float]]:
    """The answers of a coroutine function as they come; where it fails for good, what is on its way is waited for."""

    async def ask(row: int, gone: asyncio.Event) -> Any:
        pair, failures = pairs.rows([row]), 0
        while True:
            try:
                async with asyncio.timeout(caller.timeout_s):
                    return await caller.preference(pair.prompts, pair.first, pair.second, **pair.names)
            except Exception as error:
                failures += 1
                if await pause(_wait_s(caller, failures, error), gone):
                    raise

    for row, said in at_once(ask, len(pairs.prompts), caller.concurrency):
        yield row, float(usable_values(said, 1)[0])


def _wait_s(caller: Caller, failures: int, error: Exception) -> float:
    """How long is waited before the code is called again; raises what the run ends with where it is not."""
    told = f"config.{caller.name} failed with {_one_line(error, caller.preference)}"
    if isinstance(error, MISTAKES):
        raise NoAnswerError(told) from error
    if failures > caller.retries:
        raise NoAnswerError(f"{told}, {failures} times in a row") from error
    wait_s = backoff.wait_s(failures)
    logging.warning("%s; it is called again in %g s, %d of %d", told, wait_s, failures, caller.retries)
    return wait_s


def _one_line(error: Exception, preference: Preference) -> str:
    """The kind of an error, what it says, and where in the user's own file it came up, or in which file else."""
    frames = traceback.extract_tb(error.__traceback__)
    own = getattr(inspect.getmodule(preference), "__file__", None)
    place = next((frame for frame in reversed(frames) if frame.filename == own), frames[-1] if frames else None)
    where = f" ({place.filename}, line {place.lineno})" if place else ""
    said = " ".join(str(error).split())[:LONGEST_TEXT]
    return f"{type(error).__name__}{f': {said}' if said else ''}{where}"
