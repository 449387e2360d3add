"""Choose the implementation of an op: the only module that chooses, and the only one that imports kernels."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from mamba2_jax.ops.device import compute_capability, default_device
from mamba2_jax.ops.scan.chunked import ssd_chunked
from mamba2_jax.ops.scan.decay import finite
from mamba2_jax.ops.scan.recurrent import ssd_recurrent
from mamba2_jax.ops.scan.step import ssd_one_token
from mamba2_jax.ops.segments import document_index

if TYPE_CHECKING:
    from mamba2_jax.pallas import Kernel, Problem

IMPLEMENTATIONS = ("recurrent", "xla", "mosaic_gpu", "triton")


def choose_scan(implementation: str | None, chunk_size: int | None, problem: "Problem") -> Callable:
    """Return the function that runs `ssd`, with its tuning options bound.

    Args:
        implementation: as for `choose`.
        chunk_size: tokens per chunk, or None for the implementation's default. Kernels have a fixed chunk
            size, so a chunk size without a named implementation selects XLA.
        problem: from `describe`.

    Returns:
        A function of `(x, dt, A, B, C, D, initial_state, segment_ids)`.

    Raises:
        NotImplementedError: as `choose`; also when a chunk size is given for a kernel.
    """
    plain = {
        "recurrent": ssd_recurrent,
        "xla": partial(ssd_chunked, **_xla_tuning(chunk_size, problem.platform)),
    }
    if implementation is None and chunk_size is not None:
        implementation = "xla"
    run = choose("ssd", implementation, problem, plain)
    if run in plain.values():
        return run
    if chunk_size is not None:
        raise _refusal("ssd", implementation, problem, "its chunk size is fixed; leave chunk_size=None")
    return partial(_run_kernel, run)


def choose_step(implementation: str | None, problem: "Problem") -> Callable:
    """Return the function of `(x, dt, A, B, C, state, D)` that runs `ssd_step`. Arguments as for `choose`."""
    return choose("ssd_step", implementation, problem, {"xla": ssd_one_token})


def choose_mixer_step(
    implementation: str | None,
    preferred: str | None,
    problem: "Problem",
    plain: Callable,
    options: Any,
    ssm_dtype: Any,
) -> Callable:
    """Return the function of `(inputs, state, weights, mask)` that runs `mixer_step`.

    Args:
        implementation: as for `choose`.
        preferred: the default if it is a kernel that can run, otherwise ignored.
        problem: from `describe`.
        plain: the implementation of XLA, whose derivatives every kernel has.
        options: `MixerOptions`.
        ssm_dtype: dtype of the SSM state.

    Raises:
        NotImplementedError: as `choose`; also when the options or the state are not those of the kernel.
    """
    reason = None
    if options.norm_before_gate:
        reason = "it has norm_before_gate=False"
    elif options.own_groups is not None or options.combine is not None:
        reason = "a group of channels spans several devices"
    elif jnp.dtype(ssm_dtype) != jnp.float32:
        reason = f"its SSM state is float32, and this is {jnp.dtype(ssm_dtype).name}"
    if implementation is None and reason is not None:
        return plain
    if implementation is None and preferred is not None:
        kernel = kernels("mixer_step").get(preferred)
        if kernel is not None and kernel.unsupported(problem) is None:
            implementation = preferred
    run = choose("mixer_step", implementation, problem, {"xla": plain})
    if run is plain:
        return plain
    if reason is not None:
        raise _refusal("mixer_step", implementation, problem, reason)
    kernel = jax.custom_jvp(partial(run, dt_limits=options.dt_limits, eps=options.eps))
    kernel.defjvp(lambda primals, tangents: jax.jvp(plain, primals, tangents))
    return kernel


def choose(
    op: str, implementation: str | None, problem: "Problem", plain: Mapping[str, Callable]
) -> Callable:
    """Return the function that runs an op with the named or the best implementation.

    Args:
        op: name of the op in the table of kernels.
        implementation: one of `IMPLEMENTATIONS`, or None for the choice of `automatic`.
        problem: device, dtype and sizes of the call.
        plain: the implementations that run on every device, by name; `"xla"` is one of them.

    Raises:
        NotImplementedError: the named implementation cannot run; the message says why, and what can.
    """
    if implementation is None:
        implementation = automatic(op, problem)
    if implementation in plain:
        return plain[implementation]
    kernel = kernels(op).get(implementation)
    reason = f"there is none of {op}" if kernel is None else kernel.unsupported(problem)
    if kernel is None or reason is not None:
        raise _refusal(op, implementation, problem, reason)
    return kernel.run


def automatic(op: str, problem: "Problem") -> str:
    """Name the default implementation: the first kernel meant for the device that supports the problem.

    Kernels are the default for 16-bit dtypes only; for float32 the default is XLA.
    """
    if problem.dtype.itemsize != 2:
        return "xla"
    for name, kernel in kernels(op).items():
        if problem.compute_capability in kernel.automatic and kernel.unsupported(problem) is None:
            return name
    return "xla"


def describe(dtype: Any, *sizes: int, D_per_channel: bool = False, device: Any = None) -> "Problem":
    """Build the `Problem` of a call: device, dtype and sizes.

    Args:
        dtype: of x, B and C.
        *sizes: batch, length, num_heads, head_dim, num_groups, state_dim.
        D_per_channel: whether D is `(h, p)`.
        device: a `jax.Device`; None: the device that a call traced now will use.
    """
    from mamba2_jax.pallas import Problem

    device = default_device() if device is None else device
    return Problem(
        device.platform, compute_capability(device), jnp.dtype(dtype), *sizes, D_per_channel=D_per_channel
    )


def kernels(op: str) -> dict[str, "Kernel"]:
    """Return the kernels of an op by name; imports them lazily, since most calls on a CPU need none."""
    from mamba2_jax.pallas import KERNELS

    return KERNELS[op]


def _refusal(op: str, implementation: str | None, problem: "Problem", reason: str | None) -> Exception:
    """Build the error that says why a named implementation cannot run, and what to use instead."""
    elsewhere = ""
    if problem.platform != "gpu":
        elsewhere = "; if the arrays lie on a GPU, trace the call under `with jax.default_device(that GPU)`"
    return NotImplementedError(
        f"{op}: implementation={implementation!r} cannot run here: {reason}; "
        f"use implementation='xla', or None for the best available{elsewhere}"
    )


def _run_kernel(run, x, dt, A, B, C, D, initial_state, segment_ids):
    """Call a kernel with finite A, float32 D, and document indices, which kernels only compare."""
    A = finite(A)
    D = None if D is None else D.astype(jnp.float32)
    documents = None if segment_ids is None else document_index(segment_ids)
    return run(x, dt, A, B, C, D, initial_state, documents)


def _xla_tuning(chunk_size: int | None, platform: str) -> dict[str, int]:
    """Return XLA's chunking: one chunk of 64 per step, fastest on a CPU; elsewhere all chunks, untuned."""
    if platform == "cpu":
        return {"chunk_size": chunk_size or 64, "chunks_per_step": 1}
    return {"chunk_size": chunk_size or 128, "chunks_per_step": 1 << 30}
