"""Which rows and columns of a stored tensor this process holds, and the memory that they are read into."""

import bisect
import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
import numpy as np
from jax.sharding import Sharding

from mamba2_jax.weights.plan import show_shape
from mamba2_jax.weights.table import Leaf

Placement = Sharding | jax.Device | None
"""Where an array goes; None is JAX's default device."""

_ALIGNMENT = 64  # JAX on CPU takes an aligned host array as it is, without a second copy


@dataclass(frozen=True)
class Shard:
    """A part of a leaf, in host memory, and the devices of this process that want it.

    Args:
        array: of the part's shape, in the model's layout.
        rows_view: the same memory as `(rows, numbers per row)`, as the file orders them.
        runs: the part's rows of the leaf, as runs of neighbours, in the order of `rows_view`.
        columns: its numbers of each row.
        devices: where it goes.
    """

    array: np.ndarray
    rows_view: np.ndarray
    runs: tuple[range, ...]
    columns: range
    devices: tuple[Any, ...]

    @cached_property
    def _starts(self) -> list[int]:
        return [run.start for run in self.runs]

    @cached_property
    def _offsets(self) -> list[int]:
        return np.cumsum([0, *map(len, self.runs)]).tolist()

    def place_of(self, rows: range) -> slice | None:
        """Where in `rows_view` a run of the leaf's rows is; None: it has none of them."""
        index = bisect.bisect_right(self._starts, rows.start) - 1
        if index < 0 or rows.start >= self.runs[index].stop:
            return None
        first = self._offsets[index] + rows.start - self.runs[index].start
        return slice(first, first + len(rows))


def shards_of(leaf: Leaf, dtype: np.dtype, placement: Placement) -> list[Shard]:
    """Allocate the parts of a leaf that this process's devices hold, each once.

    Raises:
        ValueError: a sharding that does not divide the leaf.
    """
    if not isinstance(placement, Sharding):
        return [_shard(leaf, dtype, tuple(slice(None) for _ in leaf.shape), ())]
    try:
        indices = placement.addressable_devices_indices_map(leaf.shape)
    except ValueError as error:
        raise ValueError(
            f"load_weights: cannot place {leaf.path} {show_shape(leaf.shape)}: {error}"
        ) from error
    devices: dict[tuple, list[Any]] = {}
    slices: dict[tuple, tuple[slice, ...]] = {}
    for device, index in indices.items():
        index = index or tuple(slice(None) for _ in leaf.shape)
        key = tuple(part.indices(size) for part, size in zip(index, leaf.shape, strict=True))
        devices.setdefault(key, []).append(device)
        slices[key] = index
    return [_shard(leaf, dtype, slices[key], tuple(on)) for key, on in devices.items()]


def blocks_of(shards: list[Shard], rows: int) -> list[range]:
    """Cut the rows that some shard has into runs of at most so many, each whole in a shard or outside it."""
    borders = sorted({edge for shard in shards for run in shard.runs for edge in (run.start, run.stop)})
    return [
        range(first, min(first + rows, stop))
        for start, stop in zip(borders, borders[1:], strict=False)
        if any(shard.place_of(range(start, stop)) is not None for shard in shards)
        for first in range(start, stop, rows)
    ]


def _shard(leaf: Leaf, dtype: np.dtype, index: tuple[slice, ...], devices: tuple) -> Shard:
    count = leaf.rows[1] - leaf.rows[0]
    axes, num_axes = list(range(len(leaf.shape))), _count_row_axes(leaf, count)
    row_axes = axes[len(axes) - num_axes :] if leaf.role.rows_last else axes[:num_axes]
    other = [axis for axis in axes if axis not in row_axes]
    rows = np.arange(count).reshape([leaf.shape[axis] for axis in row_axes])
    rows = rows[tuple(index[axis] for axis in row_axes)].reshape(-1)
    width = math.prod(leaf.shape[axis] for axis in other)
    numbers = np.arange(width).reshape([leaf.shape[axis] for axis in other])
    columns = numbers[tuple(index[axis] for axis in other)].reshape(-1)
    if len(columns) and columns[-1] - columns[0] + 1 != len(columns):
        raise ValueError(f"load_weights: cannot place {leaf.path}: its rows would be cut into several pieces")
    shape = tuple(len(range(*part.indices(size))) for part, size in zip(index, leaf.shape, strict=True))
    array = _aligned_empty(shape, dtype)
    view = array.reshape(-1, len(rows)).T if leaf.role.rows_last else array.reshape(len(rows), -1)
    first = int(columns[0]) if len(columns) else 0
    return Shard(array, view, _runs(rows), range(first, first + len(columns)), devices)


def _count_row_axes(leaf: Leaf, count: int) -> int:
    """How many of a leaf's axes are the stored tensor's rows."""
    sizes = leaf.shape[::-1] if leaf.role.rows_last else leaf.shape
    product, axes = 1, 0
    while product < count:
        product *= sizes[axes]
        axes += 1
    return axes


def _runs(rows: np.ndarray) -> tuple[range, ...]:
    """Write increasing numbers as runs of neighbours."""
    breaks = np.flatnonzero(np.diff(rows) != 1) + 1
    return tuple(range(int(run[0]), int(run[-1]) + 1) for run in np.split(rows, breaks) if len(run))


def _aligned_empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Allocate an array that JAX on CPU can take over without a copy."""
    nbytes = math.prod(shape) * dtype.itemsize
    buffer = np.empty(nbytes + _ALIGNMENT, np.uint8)
    offset = -buffer.ctypes.data % _ALIGNMENT
    return buffer[offset : offset + nbytes].view(dtype).reshape(shape)
