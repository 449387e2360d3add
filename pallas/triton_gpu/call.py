"""The only module that imports jax_triton: version check and launch of Triton kernels from JAX."""

import importlib
import importlib.metadata
import os
from collections.abc import Sequence
from typing import Any

import jax
from jax import ShapeDtypeStruct

# What the tests compile with, the first of each to be installed; "0.12" stands for each of its releases.
# jax_triton uses private APIs of jax and triton, so that other releases may break. PyTorch 2.13 wants 3.7.1.
TESTED = {"jax": ("0.11.2", "0.12"), "jax-triton": ("0.4.1",), "triton": ("3.7.1", "3.9.0")}


def missing() -> str | None:
    """Return why the packages are unusable (absent or untested versions) and what to install, else None."""
    found = {name: _version(name) for name in TESTED}
    wrong = ", ".join(
        f"{name} is {version or 'not installed'}"
        for name, version in found.items()
        if not any(f"{version}.".startswith(f"{tested}.") for tested in TESTED[name])
    )
    if not wrong:
        return None
    wanted = " ".join(f"'{name}=={versions[0]}'" for name, versions in TESTED.items())
    wanted = wanted.replace("'jax==", "'jax[cuda13]==")
    return f"it needs the versions it was tested with, but {wrong}; pip install {wanted} (Python >= 3.12)"


def launch(
    kernel: Any,
    inputs: Sequence[jax.Array | int],
    outputs: Sequence[ShapeDtypeStruct],
    grid: tuple[int, int, int],
    *,
    num_warps: int,
    num_stages: int,
    **constants: Any,
) -> list[jax.Array]:
    """Launch a Triton kernel on arrays (and int scalars), inside or outside `jit`.

    Args:
        kernel: a `triton.jit` function whose parameters are inputs, then outputs, then constants.
        inputs: the inputs in order.
        outputs: shapes and dtypes of the outputs in order; the kernel must write every element.
        grid: number of programs along the three grid axes.
        num_warps: warps per program.
        num_stages: pipeline stages of loads in loops (prefetch depth).
        **constants: the kernel's `tl.constexpr` arguments.
    """
    return jax_triton().triton_call(
        *inputs,
        kernel=kernel,
        out_shape=list(outputs),
        grid=grid,
        num_warps=num_warps,
        num_stages=num_stages,
        **constants,
    )


def jax_triton() -> Any:
    """Import jax_triton lazily, because the import fails without a GPU build of jaxlib.

    Restores `TRITON_CACHE_DIR`, which the import empties: other Triton kernels of the process, such as
    PyTorch's, would otherwise fail with "Could not create or locate cache dir".
    """
    variable = "TRITON_CACHE_DIR"
    before = os.environ.get(variable)
    module = importlib.import_module("jax_triton")
    if before is None:
        os.environ.pop(variable, None)
    else:
        os.environ[variable] = before
    return module


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
