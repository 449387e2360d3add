"""Which implementation of the scan runs: the one place that chooses, and the one import of the kernels."""

from collections.abc import Callable
from functools import partial

import jax

from mamba2_jax.ops.ssd_chunked import ssd_chunked
from mamba2_jax.ops.ssd_recurrent import ssd_recurrent

IMPLEMENTATIONS = ("recurrent", "xla", "mosaic_gpu", "triton")


def choose(implementation: str | None, chunk_size: int | None) -> Callable:
    """Return the function that runs, with its tuning fixed.

    Args:
        implementation: one of `IMPLEMENTATIONS`, or None for the best that runs here.
        chunk_size: tokens per chunk, or None for the platform's own.

    Returns:
        A function of `(x, dt, A, B, C, D, initial_state, segment_ids)`.

    Raises:
        NotImplementedError: a kernel asked for by name that this version does not have.
    """
    if implementation is None:
        implementation = "xla"
    if implementation == "recurrent":
        return ssd_recurrent
    if implementation == "xla":
        return partial(ssd_chunked, **_xla_tuning(chunk_size))
    # Lazy: kernels want a newer jax than the rest. Type checkers do not follow setuptools' package-dir.
    from mamba2_jax.pallas import KERNELS  # pyright: ignore[reportMissingImports]

    if implementation not in KERNELS:
        raise NotImplementedError(
            f"ssd: implementation={implementation!r} is not built in this version of mamba2_jax; "
            "use implementation='xla', or None for the best available"
        )
    return KERNELS[implementation]


def _xla_tuning(chunk_size: int | None) -> dict[str, int]:
    """One chunk of 64 at a time was fastest on CPU; on accelerators all chunks at once, not measured yet."""
    if platform() == "cpu":
        return {"chunk_size": chunk_size or 64, "chunks_per_step": 1}
    return {"chunk_size": chunk_size or 128, "chunks_per_step": 1 << 30}


def platform() -> str:
    """Where a computation traced now will run: `"cpu"`, `"gpu"` or `"tpu"`."""
    device = jax.config.jax_default_device  # pyright: ignore[reportAttributeAccessIssue]
    if device is None:
        return jax.default_backend()
    return device if isinstance(device, str) else device.platform
