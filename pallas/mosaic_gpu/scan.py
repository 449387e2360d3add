"""Run the scan on Hopper, forward and backward, as one differentiable function.

    y, final_state = ssd(x, dt, A, B, C, D, initial_state, segment_ids)

The kernels walk strips of 64 channels. Heads of another size are padded with zeros to 64 or 128 channels, and
the results cut, which is exact: channels do not mix, and zeros add nothing to the gradients of B, C, dt, A
and D. It costs the padded size in time, and in memory for the states that the backward pass reads: twice that
of a head_dim of 32, 1.6 times that of 80.

`jax.grad` runs the backward kernels of `backward`. `jax.vmap` folds the mapped axis into the batch; if A or
D, which batch rows share, is mapped, it loops over the axis instead.
"""

import functools
from typing import Any, cast

import jax
import jax.numpy as jnp
from mamba2_jax.pallas.batching import fold_vmap, refuse_checked_shard_map
from mamba2_jax.pallas.mosaic_gpu.backward import backward
from mamba2_jax.pallas.mosaic_gpu.forward import forward
from mamba2_jax.pallas.mosaic_gpu.plan import padded_head_dim, unsupported

__all__ = ["ssd", "unsupported"]

SHARED = (2, 5)  # argument numbers of A and D, which batch rows share


def ssd(
    x: jax.Array,
    dt: jax.Array,
    A: jax.Array,
    B: jax.Array,
    C: jax.Array,
    D: jax.Array | None,
    initial_state: jax.Array,
    segment_ids: jax.Array | None,
    *,
    interpret: Any = None,
) -> tuple[jax.Array, jax.Array]:
    """Run the scan; differentiable in all but `segment_ids`. Shapes and meaning as in `mamba2_jax.ops.ssd`.

    Args:
        x: `(b, l, h, p)`, bfloat16 or float16, p from 32 to 128 (float32 too in the interpreter).
        dt: `(b, l, h)` float32, 0 at padding.
        A: `(h,)` float32.
        B: `(b, l, g, n)` in the dtype of x, n 64, 128 or 256.
        C: `(b, l, g, n)` in the dtype of x.
        D: `(h,)`, `(h, p)` or None.
        initial_state: `(b, h, p, n)` float32.
        segment_ids: `(b, l)` int32 or None.
        interpret: None on a GPU, or what `bridge.interpreter` returned.

    Returns:
        y: `(b, l, h, p)` in the dtype of x.
        final_state: `(b, h, p, n)` float32.

    Raises:
        NotImplementedError: called inside a `jax.shard_map` with `check_vma=True`.
    """
    refuse_checked_shard_map("mosaic_gpu", x, dt, A, B, C, D, initial_state, segment_ids)
    head_dim = x.shape[3]
    missing = padded_head_dim(head_dim) - head_dim
    if missing:
        x, initial_state = _pad(x, 3, missing), _pad(initial_state, 2, missing)
        D = _pad(D, 1, missing) if D is not None and D.ndim == 2 else D
    outputs = _ssd(interpret, x, dt, A, B, C, D, initial_state, segment_ids)
    y, final_state = cast("tuple[jax.Array, jax.Array]", outputs)  # custom_vjp has no types
    return (y[..., :head_dim], final_state[:, :, :head_dim]) if missing else (y, final_state)


def _pad(array: jax.Array, axis: int, count: int) -> jax.Array:
    return jnp.pad(array, [(0, count if i == axis else 0) for i in range(array.ndim)])


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _ssd(interpret, x, dt, A, B, C, D, initial_state, segment_ids) -> Any:
    run = functools.partial(forward, interpret=interpret)
    return fold_vmap(lambda *arrays: run(*arrays)[:2], SHARED)(x, dt, A, B, C, D, initial_state, segment_ids)


def _ssd_forward(interpret, x, dt, A, B, C, D, initial_state, segment_ids):
    run = fold_vmap(functools.partial(forward, save_states=True, interpret=interpret), SHARED)
    y, final_state, saved_states = run(x, dt, A, B, C, D, initial_state, segment_ids)
    return (y, final_state), (x, dt, A, B, C, D, saved_states, segment_ids)


def _ssd_backward(interpret, residuals, cotangents):
    _, _, A, _, _, D, _, _ = residuals
    run = fold_vmap(functools.partial(backward, interpret=interpret), SHARED)
    gradients = run(*residuals, *cotangents)
    dA, dD = gradients.A.sum(0).astype(A.dtype), None
    if D is not None:
        dD = gradients.D.sum(0)
        dD = (dD if D.ndim == 2 else dD.sum(1)).astype(D.dtype)
    return gradients.x, gradients.dt, dA, gradients.B, gradients.C, dD, gradients.initial_state, None


_ssd.defvjp(_ssd_forward, _ssd_backward)
