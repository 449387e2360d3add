"""How XLA compiles in the tests; shapes checked at run time, in rooms whose inputs the doors validate."""

import os
import pathlib
import shutil
import tempfile

import checkout  # noqa: F401
import jax
import pytest
import shapes
from jaxtyping import install_import_hook

# What needs several devices. JAX fixes their number once, so these tests want a process of their own:
# `pytest tests/sharded` is one, and test_sharded.py starts it for everybody else.
SHARDED = pathlib.Path(__file__).with_name("sharded")

# Tests of XLA's own habits hold what they found in this version of jax, the last for Python 3.11.
HABITS_OF = (0, 10)

_CACHE_EVERYTHING = {
    "persistent_cache_min_compile_time_secs": 0.0,
    "persistent_cache_min_entry_size_bytes": -1,
}
_own_cache = None  # the folder of the compilation cache, in the process that made it


def pytest_configure(config):
    if config.getoption("markexpr") == "gpu":  # a process that sees the GPU; all others stay on the CPU
        if jax.default_backend() != "gpu":
            pytest.exit(
                f"pytest -m gpu: no NVIDIA GPU here that jax {jax.__version__} can use (it runs on "
                f"{jax.default_backend()}). Install jax for CUDA, or name a Python that has it: "
                "make gpu PYTHON=/path/to/python",
                returncode=1,
            )
        return  # and with shapes unchecked: beartype may be missing there
    jax.config.update("jax_platforms", "cpu")
    install_import_hook(shapes.modules(), "shapes.checked")
    if config.getoption("markexpr") != "xla_habits":
        _compile_quickly_and_once()
    paths = [pathlib.Path(config.invocation_params.dir, argument.split("::")[0]) for argument in config.args]
    if paths and all(SHARDED in (path.resolve(), *path.resolve().parents) for path in paths):
        jax.config.update("jax_num_cpu_devices", 8)


def _compile_quickly_and_once():
    """Spare XLA most of its work, and compile once for workers, commands and notebooks.

    Compiling is most of the tests' time, and not what they look at. Through the environment, which processes
    that tests start inherit.
    """
    global _own_cache
    flags = "--xla_backend_optimization_level=0"
    if jax.__version_info__[:2] == (0, 10):  # later ones do not know it; it compiles in a third of the time
        flags += " --xla_cpu_use_fusion_emitters=false"
    given = os.environ.get("XLA_FLAGS", "")
    if "xla_backend_optimization_level" not in given:
        os.environ["XLA_FLAGS"] = f"{flags} {given}".strip()
    if "JAX_COMPILATION_CACHE_DIR" in os.environ:  # a worker, or somebody's own
        return
    _own_cache = tempfile.mkdtemp(prefix="mamba2-jax-tests-")
    options = {"compilation_cache_dir": _own_cache, **_CACHE_EVERYTHING}
    for name, value in options.items():
        os.environ[f"JAX_{name.upper()}"] = str(value)
        jax.config.update(f"jax_{name}", value)  # it has read the environment already


def pytest_unconfigure():
    if _own_cache:
        shutil.rmtree(_own_cache, ignore_errors=True)


def pytest_report_header():
    if jax.__version_info__[:2] != HABITS_OF:
        return f"xla_habits: left out, they are those of jax {HABITS_OF[0]}.{HABITS_OF[1]}"


def pytest_collection_modifyitems(config, items):
    """First the file that takes longest: with the others beside it, no process waits for it at the end."""
    items.sort(key=lambda item: item.path.name != "test_sharded.py")
    if jax.__version_info__[:2] != HABITS_OF:
        habits = [item for item in items if item.get_closest_marker("xla_habits")]
        config.hook.pytest_deselected(items=habits)
        items[:] = [item for item in items if item not in habits]


def pytest_ignore_collect(collection_path):
    return True if collection_path == SHARDED and jax.config.jax_num_cpu_devices != 8 else None
