"""SIGTERM and Ctrl-C ask a run to stop after the step at hand; a second Ctrl-C stops at once.

Of several processes, SIGTERM to one stops all, after the same step.
"""

import signal
import threading
from types import FrameType

import jax

from mamba2_jax.processes import stop_together


class StopSignals:
    """While entered, remembers the first signal in `received` (its number; None before)."""

    def __init__(self):
        self.received: int | None = None
        self._before = {}

    def __enter__(self) -> "StopSignals":
        # Only the main thread may set handlers. Of several processes, JAX listens for SIGTERM itself.
        if threading.current_thread() is threading.main_thread() and jax.process_count() == 1:
            for number in (signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def asked(self, step: int) -> bool:
        """Whether to stop now, after `step` steps."""
        if jax.process_count() > 1 and stop_together(step):
            self.received = signal.SIGTERM
        return self.received is not None

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.received is not None:
            raise KeyboardInterrupt
        self.received = number
