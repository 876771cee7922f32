"""Stopping a run without losing anything."""

import signal
from types import FrameType
from typing import Any

from absl import logging


class Interrupts:
    """Turns the first Ctrl-C, SIGTERM or SIGUSR1 into a request to stop after a step; a second Ctrl-C stops at once."""

    def __init__(self) -> None:
        self.requested = False
        self._former: dict[int, Any] = {}

    def __enter__(self) -> "Interrupts":
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            self._former[number] = signal.signal(number, self._request)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)

    def _request(self, number: int, frame: FrameType | None) -> None:
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.requested = True
        logging.warning(
            "%s: stopping as soon as all is saved, most often after this step; once more stops at once",
            signal.Signals(number).name,
        )
