"""Read files with O_DIRECT, bypassing the page cache, when they are large relative to free memory."""

import io
import mmap
import os
import threading
from pathlib import Path

import numpy as np

from mamba2_jax.weights.files import CheckpointError, cut_short

_UNCACHED_BYTES = 4 << 20  # largest read of a thread


class _Pages(threading.local):
    """Page-aligned buffer of each thread, as O_DIRECT requires."""

    def __init__(self):
        self.view = memoryview(mmap.mmap(-1, _UNCACHED_BYTES + mmap.PAGESIZE))


_PAGES = _Pages()


def bypass_cache(file: io.FileIO) -> bool:
    """Switch an open file to O_DIRECT, for `read_uncached` only; return False where that is unsupported."""
    try:
        import fcntl

        flags = fcntl.fcntl(file, fcntl.F_GETFL)
        fcntl.fcntl(file, fcntl.F_SETFL, flags | os.O_DIRECT)
    except (ImportError, AttributeError, OSError):  # not Linux, or not on this file system
        return False
    try:
        os.preadv(file.fileno(), [_PAGES.view[: mmap.PAGESIZE]], 0)
    except OSError:  # flag accepted, read refused: larger alignment required
        fcntl.fcntl(file, fcntl.F_SETFL, flags)
        return False
    return True


def read_uncached(file: io.FileIO, path: Path, offset: int, out: np.ndarray, what: str) -> None:
    """Fill `out` as `read_exactly` does, from a file after `bypass_cache`, in reads of whole pages."""
    out = out.view(np.uint8).reshape(-1)
    for start in range(0, len(out), _UNCACHED_BYTES):
        piece = out[start : start + _UNCACHED_BYTES]
        skip = (offset + start) % mmap.PAGESIZE
        wanted, done = skip + len(piece), 0
        pages = _PAGES.view[: -(-wanted // mmap.PAGESIZE) * mmap.PAGESIZE]
        try:
            while done < wanted:
                count = os.preadv(file.fileno(), [pages[done:]], offset + start - skip + done)
                done += count
                if not count or count % mmap.PAGESIZE:  # the end of the file
                    break
        except OSError as error:
            raise CheckpointError(path, [f"{what}: cannot be read: {error.strerror}"]) from None
        if done < wanted:
            raise cut_short(path, what, len(out) - start - max(0, done - skip))
        piece[:] = np.frombuffer(pages, np.uint8, len(piece), skip)


def available_memory() -> int | None:
    """Return the bytes that can be allocated without swapping, or None where unknown (not Linux)."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")), None)
