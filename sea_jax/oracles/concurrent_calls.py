"""Coroutines that are awaited many at once, in a loop of their own, for whoever iterates over what they say."""

import asyncio
import functools
import queue
import threading
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from typing import Any

END = object()  # behind the last answer


@functools.cache
def loop() -> asyncio.AbstractEventLoop:
    """Returns the one loop that all is awaited in: clients keep connections, which are their loop's."""
    own = asyncio.new_event_loop()
    threading.Thread(target=own.run_forever, name="oracle", daemon=True).start()
    return own


def wait_for(waited: Awaitable[Any]) -> Any:
    """Returns what something to be awaited says."""

    async def wait() -> Any:
        return await waited

    work: Coroutine[Any, Any, Any] = wait()
    return asyncio.run_coroutine_threadsafe(work, loop()).result()


def at_once(
    ask: Callable[[int, asyncio.Event], Awaitable[Any]], count: int, concurrency: int
) -> Iterator[tuple[int, Any]]:
    """Asks about N = `count` rows, some at once, and yields each with its answer as it comes.

    Args:
      ask: row -> answer; the event is set when another row has failed, or nobody wants to know any more, so that nobody waits
        to try again.
      count: N.
      concurrency: rows that are asked about at once.

    Raises:
      Exception: what the first row that failed did; what was on its way then is waited for, and nothing more is begun.
    """
    answers: queue.SimpleQueue[Any] = queue.SimpleQueue()
    turns, gone = asyncio.Semaphore(concurrency), asyncio.Event()
    failed: list[Exception] = []

    async def take_turn(row: int) -> None:
        async with turns:
            if gone.is_set():
                return
            try:
                answers.put((row, await ask(row, gone)))
            except Exception as error:
                failed.append(error)
                gone.set()

    async def ask_all() -> None:
        await asyncio.gather(*(take_turn(row) for row in range(count)))

    asking = asyncio.run_coroutine_threadsafe(ask_all(), loop())
    asking.add_done_callback(lambda _: answers.put(END))
    try:
        while (answer := answers.get()) is not END:
            yield answer
    finally:
        loop().call_soon_threadsafe(gone.set)
        try:
            asking.result()  # what is on its way is paid for, also where nobody wants to know any more
        except BaseException:
            asking.cancel()
            raise
    if failed:
        raise failed[0]


async def pause(seconds: float, gone: asyncio.Event) -> bool:
    """Waits; returns whether the event was set before the time was over."""
    try:
        await asyncio.wait_for(gone.wait(), seconds)
    except TimeoutError:
        return False
    return True
