"""Reading past the system's cache, for files larger than the memory that is free."""

import io
import mmap
import os
import threading
from pathlib import Path

import numpy as np

from mamba2_jax.weights.files import CheckpointError, cut_short

_UNCACHED_BYTES = 4 << 20  # that a thread reads at once past the cache


class _Pages(threading.local):
    """Memory of each thread that begins at a page, as uncached reads want it."""

    def __init__(self):
        self.view = memoryview(mmap.mmap(-1, _UNCACHED_BYTES + mmap.PAGESIZE))


_PAGES = _Pages()


def bypass_cache(file: io.FileIO) -> bool:
    """Have this file read past the system's cache, by `read_uncached` alone; False where that cannot be."""
    try:
        import fcntl

        flags = fcntl.fcntl(file, fcntl.F_GETFL)
        fcntl.fcntl(file, fcntl.F_SETFL, flags | os.O_DIRECT)
    except (ImportError, AttributeError, OSError):  # not Linux, or not on this file system
        return False
    try:
        os.preadv(file.fileno(), [_PAGES.view[: mmap.PAGESIZE]], 0)
    except OSError:  # promised, and refused: wants larger pages
        fcntl.fcntl(file, fcntl.F_SETFL, flags)
        return False
    return True


def read_uncached(file: io.FileIO, path: Path, offset: int, out: np.ndarray, what: str) -> None:
    """`read_exactly` for a file after `bypass_cache`: by whole pages, a few megabytes at a time."""
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
    """Bytes that could be allocated without swapping, where the system tells (Linux)."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")), None)
