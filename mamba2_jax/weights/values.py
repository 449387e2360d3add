"""What is looked at in the numbers themselves: NaN, infinity, and how they are copied."""

import numpy as np

_EXPONENT = {
    8: 0x7FF0 << 48,
    4: 0x7F80 << 16,
}  # all ones: infinite or NaN; of 2 bytes see `count_non_finite`
_LINE = 64  # bytes that a cache moves at once


def count_non_finite(block: np.ndarray) -> int:
    """Count NaN and infinite values by their exponent bits, which is several times faster than isfinite."""
    size = block.dtype.itemsize
    exponent = _EXPONENT.get(size) or (0x7C00 if block.dtype == np.float16 else 0x7F80)
    bits = block.view(f"u{size}")
    return int(np.count_nonzero((bits & bits.dtype.type(exponent)) == exponent))


def cast(block: np.ndarray, dtype: np.dtype) -> tuple[np.ndarray, int]:
    """Convert to another float type; also count the values that are too large for it."""
    if block.dtype == dtype:
        return block, 0
    with np.errstate(over="ignore", invalid="ignore"):  # counted here
        result = block.astype(dtype)
    count = count_non_finite(result)
    return result, count - count_non_finite(np.ascontiguousarray(block)) if count else 0


def copy_rows(source: np.ndarray, target: np.ndarray) -> None:
    """Copy a matrix, either of the two possibly transposed in memory.

    As many rows at a time as fill a cache line of a transposed side: several times faster than all at once.
    """
    bits = f"u{source.itemsize}"
    source, target = source.view(bits), target.view(bits)
    step = max(1, _LINE // source.itemsize)
    for row in range(0, len(source), step):
        target[row : row + step] = source[row : row + step]
