"""Check, cast and copy weight values on the host: NaN, infinity, overflow, transposition."""

import math
import threading
from collections.abc import Iterable

import jax.numpy as jnp
import numpy as np

from mamba2_jax.config.leaves import Leaf

_EXPONENT = {
    8: 0x7FF0 << 48,
    4: 0x7F80 << 16,
}  # exponent bits by itemsize, all ones: infinite or NaN; for 2 bytes see `count_non_finite`
_TILE_ROWS = 32  # rows transposed together, whose cache lines stay in the CPU cache


class Scratch(threading.local):
    """Reusable buffers of each thread: allocating memory for a block would cost as much as copying it."""

    def __init__(self):
        self._buffers: dict[str, np.ndarray] = {}

    def take(self, name: str, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        """Return an array over this thread's buffer `name`; the next call with that name overwrites it."""
        nbytes = math.prod(shape) * dtype.itemsize
        if len(self._buffers.get(name, ())) < nbytes:
            self._buffers[name] = np.empty(nbytes, np.uint8)
        return self._buffers[name][:nbytes].view(dtype).reshape(shape)


def count_non_finite(block: np.ndarray) -> int:
    """Count NaN and infinite values by exponent bits, which is many times faster than isfinite."""
    size = block.dtype.itemsize
    if size == 1:  # quantized values
        return 0
    exponent = _EXPONENT.get(size) or (0x7C00 if block.dtype == np.float16 else 0x7F80)
    bits, sign = block.view(f"u{size}"), 1 << (8 * size - 1)
    # Positive non-finite values are the largest as signed integers, negative ones as unsigned integers.
    if bits.max(initial=0) < sign | exponent and block.view(f"i{size}").max(initial=0) < exponent:
        return 0
    return int(np.count_nonzero((bits & bits.dtype.type(exponent)) == exponent))


def cast(block: np.ndarray, dtype: np.dtype) -> tuple[np.ndarray, int]:
    """Cast to another float dtype; return the result and the number of finite values that overflow."""
    if block.dtype == dtype:
        return block, 0
    with np.errstate(over="ignore", invalid="ignore"):  # counted here
        result = block.astype(dtype)
    count = count_non_finite(result)
    return result, count - count_non_finite(np.ascontiguousarray(block)) if count else 0


def copy_rows(source: np.ndarray, target: np.ndarray, scratch: Scratch) -> None:
    """Copy a matrix of a few megabytes, transposing its memory layout where source and target differ.

    The transposition runs in a compact buffer: rows of the large matrix lie a power of two apart, so their
    cache lines would compete for the same sets of the CPU cache, which is six times slower.
    """
    bits = np.dtype(f"u{source.itemsize}")
    source, target = source.view(bits), target.view(bits)
    if source.strides[0] >= source.strides[1] and target.strides[0] >= target.strides[1]:
        target[...] = source
        return
    into = target.strides[0] < target.strides[1]
    buffer = scratch.take("tile", source.shape[::-1], bits).T
    if not into:
        buffer[...] = source
    first, second = (source, buffer) if into else (buffer, target)
    for row in range(0, len(source), _TILE_ROWS):
        second[row : row + _TILE_ROWS] = first[row : row + _TILE_ROWS]
    if into:
        target[...] = buffer


def target_dtype(leaves: Iterable[Leaf], own: np.dtype, wanted: np.dtype | None) -> np.dtype:
    """Return the dtype that leaves of dtype `own` get: `wanted`; None keeps theirs.

    A_log, dt_bias, D and scales get the smallest dtype that holds both: float32 for float16 with bfloat16.
    Values of one byte, which are quantized, stay as they are.
    """
    if wanted is None or own.itemsize == 1:
        return own
    precise = any(leaf.role.keep_precision for leaf in leaves)
    return np.dtype(jnp.promote_types(own, wanted)) if precise else wanted
