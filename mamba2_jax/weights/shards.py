"""Map the shards of a leaf to stored rows and columns, and allocate their host memory."""

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
"""Sharding or device of an array; None: JAX's default device."""

_ALIGNMENT = 64  # bytes; JAX on CPU takes over an aligned host array without a copy


@dataclass(frozen=True)
class Shard:
    """One shard of a leaf in host memory, and the devices of this process that store it.

    Args:
        array: the shard, in the model's layout.
        rows_view: the same memory as `(rows, columns)`, in the order of the stored rows.
        runs: the leaf's stored rows that the shard holds, as contiguous ranges in the order of `rows_view`.
        columns: range of the columns that the shard holds of each stored row.
        devices: the devices that store the shard.
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
        """Return the slice of `rows_view` that holds a range of stored rows; None if the shard lacks them."""
        index = bisect.bisect_right(self._starts, rows.start) - 1
        if index < 0 or rows.start >= self.runs[index].stop:
            return None
        first = self._offsets[index] + rows.start - self.runs[index].start
        return slice(first, first + len(rows))


def shards_of(leaf: Leaf, dtype: np.dtype, placement: Placement) -> list[Shard]:
    """Allocate the shards of a leaf that devices of this process hold; replicas share one `Shard`.

    Raises:
        ValueError: the sharding does not divide the shape of the leaf.
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
    """Split the rows held by any shard into ranges of at most `rows`, none partly inside a shard."""
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
    row_axes = axes[len(axes) - num_axes :] if leaf.rows_last else axes[:num_axes]
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
    view = array.reshape(-1, len(rows)).T if leaf.rows_last else array.reshape(len(rows), -1)
    first = int(columns[0]) if len(columns) else 0
    return Shard(array, view, _runs(rows), range(first, first + len(columns)), devices)


def _count_row_axes(leaf: Leaf, count: int) -> int:
    """Count the axes of a leaf that together index its `count` stored rows."""
    sizes = leaf.shape[::-1] if leaf.rows_last else leaf.shape
    product, axes = 1, 0
    while product < count:
        product *= sizes[axes]
        axes += 1
    return axes


def _runs(rows: np.ndarray) -> tuple[range, ...]:
    """Convert increasing row numbers to contiguous ranges."""
    breaks = np.flatnonzero(np.diff(rows) != 1) + 1
    return tuple(range(int(run[0]), int(run[-1]) + 1) for run in np.split(rows, breaks) if len(run))


def _aligned_empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Allocate a host array aligned so that JAX on CPU takes it over without a copy."""
    nbytes = math.prod(shape) * dtype.itemsize
    buffer = np.empty(nbytes + _ALIGNMENT, np.uint8)
    offset = -buffer.ctypes.data % _ALIGNMENT
    return buffer[offset : offset + nbytes].view(dtype).reshape(shape)
