"""Measure the speed of a run: tokens per second over a window of steps, time to the end, and MFU."""

import contextlib
import time
from collections import deque
from collections.abc import Iterator, Mapping
from typing import Any

import jax.numpy as jnp

from mamba2_jax.config import Mamba2Config
from mamba2_jax.config.leaves import CONVOLUTION, EMBEDDING_TABLE, EXPERTS, OUTPUT_HEAD, ROUTER
from mamba2_jax.config.table import role_of
from mamba2_jax.typing import Array, DTypeLike

WINDOW = 20
"""Steps over which the rate is averaged."""

# Dense bfloat16 operations per second, by a part of the device's name; the first match counts.
_PEAKS = {
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "H200": 989e12,
    "GH200": 989e12,
    "B200": 2250e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L40": 181e12,
    "L4": 121e12,
    "TPU v6": 918e12,
    "TPU v5p": 459e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v4": 275e12,
}
_OPERATIONS_OF_A_STATE = 5  # per element of the recurrence: decay, input and sum, then product and sum to y


class Speed:
    """Clock of a run's steps that leaves out compiling, evaluating and saving.

    The first step after construction, or `restart`, compiles and is not measured.
    """

    def __init__(self):
        self._steps: deque[tuple[int, float]] = deque(maxlen=WINDOW)  # tokens, seconds
        self._since: float | None = None  # when the step that is now running began
        self._aside: dict[str, float] = {}  # seconds of the last evaluation and checkpoint

    def restart(self) -> None:
        """Forget the steps so far and leave out the next one, which compiles."""
        self._steps.clear()
        self._since = None

    def step_done(self, tokens: int) -> None:
        """Record that a step of `tokens` tokens, padding excluded, has just ended."""
        now = time.perf_counter()
        if self._since is not None:
            self._steps.append((tokens, now - self._since))
        self._since = now

    @contextlib.contextmanager
    def aside(self, what: str) -> Iterator[None]:
        """Leave out the time of the block, between two steps; `what` is a key of `seconds_left`."""
        began = time.perf_counter()
        yield
        ended = time.perf_counter()
        self._aside[what] = ended - began
        if self._since is not None:
            self._since = ended

    def tokens_per_second(self) -> float | None:
        """Return the rate over the last `WINDOW` steps; None before a step was measured."""
        if not self._steps:
            return None
        return sum(tokens for tokens, _ in self._steps) / sum(seconds for _, seconds in self._steps)

    def seconds_left(self, steps: float, asides: Mapping[str, int]) -> float | None:
        """Estimate the time to the end of the run.

        Args:
            steps: steps left, in steps of the length of those measured.
            asides: blocks left, by the name given to `aside`; each is taken to last as long as the last one.

        Returns:
            Seconds; None before a step was measured.
        """
        if not self._steps:
            return None
        mean = sum(seconds for _, seconds in self._steps) / len(self._steps)
        return steps * mean + sum(count * self._aside.get(what, 0.0) for what, count in asides.items())


def peak_operations(device: Any, dtype: DTypeLike) -> float | None:
    """Return a device's peak of operations per second in `dtype`; None where it is not known."""
    if jnp.dtype(dtype).itemsize != 2:
        return None
    return next((peak for part, peak in _PEAKS.items() if part in device.device_kind), None)


def operations_per_token(
    config: Mamba2Config, trained: Mapping[str, Array], frozen: Mapping[str, Array]
) -> float:
    """Count the operations per token that a training step needs; recomputation and attention scores excluded.

    A matrix takes 2 operations per element and token forward and as many for the gradient of its input;
    a trained one 2 more for its own gradient.
    """

    def matrices(arrays: Mapping[str, Array]) -> float:
        return sum(array.size * _share(name, config) for name, array in arrays.items())

    arrays = {name: array for name, array in {**frozen, **trained}.items() if not name.startswith("full.")}
    heads = sum(array.size for name, array in arrays.items() if name.endswith("mixer.A_log"))
    states = heads * config.head_dim * config.state_size
    return 6 * matrices(trained) + 4 * matrices(frozen) + 3 * _OPERATIONS_OF_A_STATE * states


def _share(name: str, config: Mamba2Config) -> float:
    """Return the share of the parameter that a token is multiplied by: 0, 1, or the experts it chooses."""
    if name.startswith("full."):  # base weights that an adapter replaces
        return 0
    role = role_of(name)
    if role is None:
        return ".lora." in name
    if role == EXPERTS and config.experts_cfg is not None:
        return config.experts_cfg.top_k / config.experts_cfg.num_experts
    tied_head = role == EMBEDDING_TABLE and config.tie_word_embeddings
    return role.is_matrix or role in (CONVOLUTION, OUTPUT_HEAD, ROUTER) or tied_head
