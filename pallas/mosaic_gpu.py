"""The scan on Hopper, forward and backward, as one differentiable function.

    y, final_state = ssd(x, dt, A, B, C, D, initial_state, segment_ids)

`jax.grad` runs the backward kernels of `mosaic_backward`. `jax.vmap` folds what it maps over into the batch;
a mapped A or D, which rows of a batch share, makes it run one after the other.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap
from mamba2_jax.pallas.mosaic_backward import backward  # pyright: ignore[reportMissingImports]
from mamba2_jax.pallas.mosaic_forward import forward  # pyright: ignore[reportMissingImports]
from mamba2_jax.pallas.mosaic_plan import unsupported  # pyright: ignore[reportMissingImports]

__all__ = ["ssd", "unsupported"]


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
        x: `(b, l, h, p)`, bfloat16 or float16, p 64 or 128 (float32 too in the interpreter).
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
        NotImplementedError: called inside a `jax.shard_map` that checks how its values vary.
    """
    if any(jax.typeof(array).manual_axis_type.varying for array in (x, dt, A, B, C, initial_state)):
        raise NotImplementedError(
            "ssd: implementation='mosaic_gpu' does not tell jax.shard_map how its values vary over the mesh; "
            "pass check_vma=False to the jax.shard_map around it"
        )
    return _ssd(interpret, x, dt, A, B, C, D, initial_state, segment_ids)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _ssd(interpret, x, dt, A, B, C, D, initial_state, segment_ids):
    run = functools.partial(forward, interpret=interpret)
    return _foldable(lambda *arrays: run(*arrays)[:2])(x, dt, A, B, C, D, initial_state, segment_ids)


def _ssd_forward(interpret, x, dt, A, B, C, D, initial_state, segment_ids):
    run = _foldable(functools.partial(forward, save_states=True, interpret=interpret))
    y, final_state, saved_states = run(x, dt, A, B, C, D, initial_state, segment_ids)
    return (y, final_state), (x, dt, A, B, C, D, saved_states, segment_ids)


def _ssd_backward(interpret, residuals, cotangents):
    _, _, A, _, _, D, _, _ = residuals
    gradients = _foldable(functools.partial(backward, interpret=interpret))(*residuals, *cotangents)
    dA, dD = gradients.A.sum(0).astype(A.dtype), None
    if D is not None:
        dD = gradients.D.sum(0)
        dD = (dD if D.ndim == 2 else dD.sum(1)).astype(D.dtype)
    return gradients.x, gradients.dt, dA, gradients.B, gradients.C, dD, gradients.initial_state, None


_ssd.defvjp(_ssd_forward, _ssd_backward)

SHARED = (2, 5)  # positions of A and D, which the rows of a batch share


def _foldable(run: Callable) -> Callable:
    """Let `jax.vmap` fold its axis into the batch, the first axis of all arguments of `run` but A and D."""
    run_with_rule = custom_vmap(run)

    @run_with_rule.def_vmap
    def rule(axis_size, mapped, *arrays):
        if any(jax.tree.leaves([mapped[i] for i in SHARED])):
            everywhere = jax.tree.map(
                lambda array, is_mapped: _spread(array, is_mapped, axis_size), arrays, tuple(mapped)
            )
            outputs = jax.lax.map(lambda each: run(*each), everywhere)
            return outputs, jax.tree.map(lambda _: True, outputs)

        def fold(array, is_mapped):
            array = _spread(array, is_mapped, axis_size)
            return array.reshape(-1, *array.shape[2:])

        folded = [
            array if i in SHARED else jax.tree.map(fold, array, is_mapped)
            for i, (array, is_mapped) in enumerate(zip(arrays, mapped, strict=True))
        ]
        outputs = _foldable(run)(*folded)
        outputs = jax.tree.map(lambda array: array.reshape(axis_size, -1, *array.shape[1:]), outputs)
        return outputs, jax.tree.map(lambda _: True, outputs)

    return run_with_rule


def _spread(array: jax.Array, is_mapped: bool, axis_size: int) -> jax.Array:
    """Give an array the mapped axis in front, if it has none."""
    return array if is_mapped else jnp.broadcast_to(array, (axis_size, *array.shape))
