"""SIGTERM and Ctrl-C ask a run to stop after the step at hand; a second Ctrl-C stops at once."""

import signal
import threading
from types import FrameType


class StopSignals:
    """While entered, remembers the first signal in `received` (its number; None before)."""

    def __init__(self):
        self.received: int | None = None
        self._before = {}

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():  # only there may handlers be set
            for number in (signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.received is not None:
            raise KeyboardInterrupt
        self.received = number
