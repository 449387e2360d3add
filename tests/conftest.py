"""Configure pytest: platform, fast XLA compilation with a shared cache, and run-time shape checks."""

import gc
import os
import pathlib
import shutil
import tempfile

import checkout  # noqa: F401
import jax
import pytest
import shapes
from jaxtyping import install_import_hook

# Tests on several devices. JAX fixes the device count once per process, so these need a process of their own:
# `pytest tests/sharded` is one, and test_sharded*.py start two in all other runs.
SHARDED = pathlib.Path(__file__).with_name("sharded")

# Version of jax whose XLA behavior the tests marked xla_habits record; the last for Python 3.11.
HABITS_OF = (0, 10)

_CACHE_EVERYTHING = {
    "persistent_cache_min_compile_time_secs": 0.0,
    "persistent_cache_min_entry_size_bytes": -1,
}
_own_cache = None  # folder of the compilation cache, in the process that created it


def pytest_configure(config):
    if config.getoption("markexpr") == "gpu":  # the only run on the GPU; all others use the CPU
        if jax.default_backend() != "gpu":
            pytest.exit(
                f"pytest -m gpu: no NVIDIA GPU here that jax {jax.__version__} can use (it runs on "
                f"{jax.default_backend()}). Install jax for CUDA, or name a Python that has it: "
                "make gpu PYTHON=/path/to/python",
                returncode=1,
            )
        return  # without shape checks: beartype may be missing there
    jax.config.update("jax_platforms", "cpu")
    install_import_hook(shapes.modules(), "shapes.checked")
    gc.set_threshold(200_000, 20, 100)  # tracing allocates many small objects: a seventh of the tests' time
    if config.getoption("markexpr") != "xla_habits":
        _compile_quickly_and_once()
    paths = [pathlib.Path(config.invocation_params.dir, argument.split("::")[0]) for argument in config.args]
    if paths and all(SHARDED in (path.resolve(), *path.resolve().parents) for path in paths):
        jax.config.update("jax_num_cpu_devices", 8)


def _compile_quickly_and_once():
    """Turn off XLA's optimizations, and share a compilation cache among workers and subprocesses.

    Compilation takes most of the tests' time and is not what they test. Set through the environment, which
    subprocesses (commands, notebooks) inherit.
    """
    global _own_cache
    flags = "--xla_backend_optimization_level=0"
    if jax.__version_info__[:2] == (0, 10):  # unknown to later versions; a third of the time
        flags += " --xla_cpu_use_fusion_emitters=false"
    given = os.environ.get("XLA_FLAGS", "")
    if "xla_backend_optimization_level" not in given:
        os.environ["XLA_FLAGS"] = f"{flags} {given}".strip()
    if "JAX_COMPILATION_CACHE_DIR" in os.environ:  # an xdist worker, or set by the user
        return
    _own_cache = tempfile.mkdtemp(prefix="mamba2-jax-tests-")
    options = {"compilation_cache_dir": _own_cache, **_CACHE_EVERYTHING}
    for name, value in options.items():
        os.environ[f"JAX_{name.upper()}"] = str(value)
        jax.config.update(f"jax_{name}", value)  # jax has already read the environment


def pytest_unconfigure():
    if _own_cache:
        shutil.rmtree(_own_cache, ignore_errors=True)


def pytest_report_header():
    if jax.__version_info__[:2] != HABITS_OF:
        return f"xla_habits: left out, they are those of jax {HABITS_OF[0]}.{HABITS_OF[1]}"


def pytest_collection_modifyitems(config, items):
    """Run the slowest files first, beside the others; deselect xla_habits on other versions of jax."""
    items.sort(key=lambda item: item.path.name not in ("test_sharded.py", "test_sharded_processes.py"))
    if jax.__version_info__[:2] != HABITS_OF:
        habits = [item for item in items if item.get_closest_marker("xla_habits")]
        config.hook.pytest_deselected(items=habits)
        items[:] = [item for item in items if item not in habits]


def pytest_collection_finish():
    gc.collect()
    gc.freeze()  # modules are not searched for garbage again


def pytest_ignore_collect(collection_path):
    return True if collection_path == SHARDED and jax.config.jax_num_cpu_devices != 8 else None


# Every compiled program keeps memory mappings, of which Linux gives a process 65,530; XLA crashes beyond.
_MANY_MAPPINGS = 20_000


@pytest.fixture(autouse=True, scope="module")
def few_compiled_programs():
    """Drop compiled programs after a module if they are many; the cache on disk still has them."""
    yield
    mappings = pathlib.Path("/proc/self/maps")
    if mappings.exists() and mappings.read_bytes().count(b"\n") > _MANY_MAPPINGS:
        jax.clear_caches()
        gc.collect()
