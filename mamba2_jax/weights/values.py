"""What is looked at in the numbers themselves: NaN, infinity, and how they are copied."""

import math
import threading

import numpy as np

_EXPONENT = {
    8: 0x7FF0 << 48,
    4: 0x7F80 << 16,
}  # all ones: infinite or NaN; of 2 bytes see `count_non_finite`
_TILE_ROWS = 32  # rows of a matrix that are transposed together: their lines stay in the cache


class Scratch(threading.local):
    """A buffer that each thread keeps: new memory for every block would cost as much as copying it."""

    def __init__(self):
        self._buffers: dict[str, np.ndarray] = {}

    def take(self, name: str, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        """Return an array over the thread's buffer of that name; the next such call overwrites it."""
        nbytes = math.prod(shape) * dtype.itemsize
        if len(self._buffers.get(name, ())) < nbytes:
            self._buffers[name] = np.empty(nbytes, np.uint8)
        return self._buffers[name][:nbytes].view(dtype).reshape(shape)


def count_non_finite(block: np.ndarray) -> int:
    """Count NaN and infinite values by their exponent bits, which is many times faster than isfinite."""
    size = block.dtype.itemsize
    exponent = _EXPONENT.get(size) or (0x7C00 if block.dtype == np.float16 else 0x7F80)
    bits, sign = block.view(f"u{size}"), 1 << (8 * size - 1)
    # As signed integers the positive non-finite values are the largest, as unsigned ones the negative.
    if bits.max(initial=0) < sign | exponent and block.view(f"i{size}").max(initial=0) < exponent:
        return 0
    return int(np.count_nonzero((bits & bits.dtype.type(exponent)) == exponent))


def cast(block: np.ndarray, dtype: np.dtype) -> tuple[np.ndarray, int]:
    """Convert to another float type; also count the values that are too large for it."""
    if block.dtype == dtype:
        return block, 0
    with np.errstate(over="ignore", invalid="ignore"):  # counted here
        result = block.astype(dtype)
    count = count_non_finite(result)
    return result, count - count_non_finite(np.ascontiguousarray(block)) if count else 0


def copy_rows(source: np.ndarray, target: np.ndarray, scratch: Scratch) -> None:
    """Copy a matrix of some megabytes between two layouts, of which one may be transposed.

    Then it is transposed in a compact buffer: in the large matrix, whose rows lie a power of two apart, all
    lines would compete for the same places of the cache, which is six times slower.
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
