"""Signal handling: SIGTERM or Ctrl-C stops a run after the current step, a second Ctrl-C immediately.

With several processes, SIGTERM to one stops all of them after the same step.
"""

import signal
import threading
from types import FrameType

import jax

from mamba2_jax.processes import stop_together


class StopSignals:
    """Context manager that stores the number of the last signal in `received` (None: no signal yet)."""

    def __init__(self):
        self.received: int | None = None
        self._before = {}

    def __enter__(self) -> "StopSignals":
        # Only the main thread may set handlers. With several processes, JAX itself handles SIGTERM.
        if threading.current_thread() is threading.main_thread() and jax.process_count() == 1:
            for number in (signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def asked(self, step: int) -> bool:
        """Return whether to stop now, after `step` steps; every process must call it at every step."""
        if jax.process_count() > 1 and stop_together(step):
            self.received = signal.SIGTERM
        return self.received is not None

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.received is not None:
            raise KeyboardInterrupt
        self.received = number
