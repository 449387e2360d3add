"""Which implementation of the scan runs: the one place that chooses, and the one import of the kernels."""

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp

from mamba2_jax.ops.device import compute_capability, default_device
from mamba2_jax.ops.scan.chunked import ssd_chunked
from mamba2_jax.ops.scan.decay import finite
from mamba2_jax.ops.scan.recurrent import ssd_recurrent
from mamba2_jax.ops.segments import document_index

if TYPE_CHECKING:
    # Type checkers do not follow setuptools' package-dir.
    from mamba2_jax.pallas import Kernel, Problem  # pyright: ignore[reportMissingImports]

IMPLEMENTATIONS = ("recurrent", "xla", "mosaic_gpu", "triton")


def choose(implementation: str | None, chunk_size: int | None, problem: "Problem") -> Callable:
    """Return the function that runs, with its tuning fixed.

    Args:
        implementation: one of `IMPLEMENTATIONS`, or None for the best that runs here: on Hopper
            `"mosaic_gpu"`, on Ampere and Ada `"triton"`, for 16-bit dtypes and where these can run the
            problem; else `"xla"`.
        chunk_size: tokens per chunk, or None for the implementation's own. Kernels have their own, so
            that with a chunk size and no name, XLA runs.
        problem: where the scan will run, its dtype and sizes; see `describe`.

    Returns:
        A function of `(x, dt, A, B, C, D, initial_state, segment_ids)`.

    Raises:
        NotImplementedError: a kernel asked for by name that cannot run, with the reason and what can.
    """
    if implementation is None:
        implementation = automatic(problem) if chunk_size is None else "xla"
    if implementation == "recurrent":
        return ssd_recurrent
    if implementation == "xla":
        return partial(ssd_chunked, **_xla_tuning(chunk_size, problem.platform))
    reason = kernels()[implementation].unsupported(problem)
    if reason is None and chunk_size is not None:
        reason = "its chunk size is fixed; leave chunk_size=None"
    if reason is not None:
        raise NotImplementedError(
            f"ssd: implementation={implementation!r} cannot run here: {reason}; "
            "use implementation='xla', or None for the best available"
        )
    return partial(_run_kernel, kernels()[implementation].run)


def automatic(problem: "Problem") -> str:
    """Name what runs when nothing is named. Kernels are taken for 16-bit dtypes: for float32, XLA."""
    if problem.dtype.itemsize != 2:
        return "xla"
    for name, kernel in kernels().items():
        if problem.compute_capability in kernel.automatic and kernel.unsupported(problem) is None:
            return name
    return "xla"


def describe(dtype: Any, *sizes: int, D_per_channel: bool = False, device: Any = None) -> "Problem":
    """Put together the problem of a call.

    Args:
        dtype: of x, B and C.
        *sizes: batch, length, num_heads, head_dim, num_groups, state_dim.
        D_per_channel: whether D is `(h, p)`.
        device: a `jax.Device`; None is the one that a call traced now will use.
    """
    from mamba2_jax.pallas import Problem  # pyright: ignore[reportMissingImports]

    device = default_device() if device is None else device
    return Problem(device.platform, compute_capability(device), jnp.dtype(dtype), *sizes, D_per_channel)


def kernels() -> dict[str, "Kernel"]:
    """Return the table of kernels; imported late, because most calls on a CPU do not need it."""
    from mamba2_jax.pallas import KERNELS  # pyright: ignore[reportMissingImports]

    return KERNELS


def _run_kernel(run, x, dt, A, B, C, D, initial_state, segment_ids):
    """Hand over what kernels want: A finite, D in float32, and documents numbered: they only compare."""
    A = finite(A)
    D = None if D is None else D.astype(jnp.float32)
    documents = None if segment_ids is None else document_index(segment_ids)
    return run(x, dt, A, B, C, D, initial_state, documents)


def _xla_tuning(chunk_size: int | None, platform: str) -> dict[str, int]:
    """One chunk of 64 at a time was fastest on CPU; on accelerators all chunks at once, not tuned yet."""
    if platform == "cpu":
        return {"chunk_size": chunk_size or 64, "chunks_per_step": 1}
    return {"chunk_size": chunk_size or 128, "chunks_per_step": 1 << 30}
