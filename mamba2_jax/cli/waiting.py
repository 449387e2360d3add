"""Shorten waits and say what they are for: compiled programs kept between runs, a status line meanwhile."""

import contextlib
import hashlib
import os
import pathlib
import platform
import sys
from collections.abc import Iterator

from rich.console import Console

MAX_BYTES = 2 << 30  # of all kept programs; those unused for longest go first
_MIN_SECONDS = 0.1  # of compiling; loading a program that compiles faster gains nothing


@contextlib.contextmanager
def working(words: str) -> Iterator[None]:
    """Show `words` with a spinner on stderr until the block ends, if stderr is a terminal."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield
        return
    with console.status(words):
        yield


def keep_compiled() -> None:
    """Keep compiled programs in the user's cache folder, unless JAX has been told a folder or to keep none.

    JAX reads `JAX_COMPILATION_CACHE_DIR` and `JAX_ENABLE_COMPILATION_CACHE`.
    """
    import jax  # here, so that `working` can be shown while it is imported

    given = jax.config.values
    if given["jax_compilation_cache_dir"] is not None or not given["jax_enable_compilation_cache"]:
        return
    try:
        folder = cache_folder() / "compiled" / _machine()
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError):  # nowhere to write, or no home: JAX would warn at every program
        return
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", _MIN_SECONDS)
    if given["jax_compilation_cache_max_size"] == -1:  # no limit
        jax.config.update("jax_compilation_cache_max_size", MAX_BYTES)


def cache_folder() -> pathlib.Path:
    """Return the user's cache folder for this package, by the customs of the operating system."""
    given = os.environ.get("XDG_CACHE_HOME") or (sys.platform == "win32" and os.environ.get("LOCALAPPDATA"))
    if given:
        return pathlib.Path(given, "mamba2_jax")
    return pathlib.Path.home() / ("Library/Caches" if sys.platform == "darwin" else ".cache") / "mamba2_jax"


def _machine() -> str:
    """Hash the CPU's instruction sets: a program compiled for others would crash, and homes are shared."""
    info = pathlib.Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    flags = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return hashlib.sha256(f"{platform.machine()} {platform.processor()} {flags}".encode()).hexdigest()[:12]
