"""Shapes in signatures are checked at run time here, in the rooms whose inputs the public doors validate."""

import os
import pathlib

import checkout  # noqa: F401
import jax
import pytest
import shapes
from jaxtyping import install_import_hook

# What needs several devices. JAX fixes their number once, so these tests want a process of their own:
# `pytest tests/sharded` is one, and test_sharded.py starts it for everybody else.
SHARDED = pathlib.Path(__file__).with_name("sharded")


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
    paths = [pathlib.Path(config.invocation_params.dir, argument.split("::")[0]) for argument in config.args]
    if paths and all(SHARDED in (path.resolve(), *path.resolve().parents) for path in paths):
        jax.config.update("jax_num_cpu_devices", 8)
        # LLVM's optimizations are half of these tests' time, and not what they look at.
        flags = os.environ.get("XLA_FLAGS", "")
        os.environ["XLA_FLAGS"] = f"--xla_backend_optimization_level=0 {flags}"


def pytest_collection_modifyitems(items):
    """First the file that takes longest: with the others beside it, no process waits for it at the end."""
    items.sort(key=lambda item: item.path.name != "test_sharded.py")


def pytest_ignore_collect(collection_path):
    return True if collection_path == SHARDED and jax.config.jax_num_cpu_devices != 8 else None
