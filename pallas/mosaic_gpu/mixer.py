"""Run a Mamba-2 mixer on one token per row on Hopper: three kernels, with the states updated in place.

    hidden --> `products.project` --> zx, BC, dt --> `step` --> gated, sums --> `products.output` --> update
                                          windows of x, SSM state    windows of B and C

Up to 64 rows with 16-bit weights; the products of more rows, or of other weights, are XLA's, as is then the
end of the norm, and the shift of the windows of B and C.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from mamba2_jax.pallas.batching import fold_vmap
from mamba2_jax.pallas.mosaic_gpu import products
from mamba2_jax.pallas.mosaic_gpu.plan import hopper_only
from mamba2_jax.pallas.mosaic_gpu.step import LEAST_ROWS, MOST_ELEMENTS, step
from mamba2_jax.pallas.problem import Problem

__all__ = ["mixer_step", "unsupported"]

COLUMNS = 64  # a state_dim is a multiple of them
DTYPES = ("bfloat16", "float32")
WEIGHTS = 2  # argument number of what rows share


def mixer_step(
    inputs: Any,
    state: Any,
    weights: Any,
    mask: jax.Array | None,
    *,
    dt_limits: tuple[float, float],
    eps: float,
    interpret: Any = None,
) -> tuple[jax.Array, Any]:
    """Advance a mixer by one token. Shapes and meaning as in `mamba2_jax.ops.mixer_step`.

    Args:
        inputs: hidden states, or the results of the input projection.
        state: with `conv_x`, `conv_BC` and a float32 `ssm`.
        weights: with the fields of `mamba2_jax.ops.MixerWeights`.
        mask: `(b,)` or None.
        dt_limits: bounds of dt.
        eps: of the norm.
        interpret: None on a GPU, or what `bridge.interpreter` returned.

    Returns:
        The result, and the state after the token.
    """

    def run(inputs, state, weights, mask):
        return _run(inputs, state, weights, mask, dt_limits, eps, interpret)

    return fold_vmap(run, (WEIGHTS,))(inputs, state, weights, mask)


def _run(inputs, state, weights, mask, dt_limits, eps, interpret):
    zx, BC, dt = inputs if weights.input is None else _project(inputs, weights.input, interpret)
    conv_x, conv_BC, ssm = state.conv_x, state.conv_BC, state.ssm
    gated, sums, conv_x, ssm = step(
        zx, BC, dt, conv_x, conv_BC, ssm, weights, mask, dt_limits=dt_limits, interpret=interpret
    )
    if weights.norm is None:
        sums = None
    matrix = weights.output
    if matrix is not None and _fits(gated, [matrix], None if sums is None else sums.shape[1:]):
        result, conv_BC = products.output(
            gated, matrix, sums, BC, conv_BC, mask, eps=eps, interpret=interpret
        )
        return result, type(state)(conv_x, conv_BC, ssm)

    result = _normed(gated, sums, eps)
    if matrix is not None:
        result = jnp.matmul(result, matrix.astype(result.dtype), preferred_element_type=jnp.float32)
    shifted = jnp.concatenate([conv_BC[:, 1:], BC[:, None].astype(conv_BC.dtype)], axis=1)
    if mask is not None:
        shifted = jnp.where(mask[:, None, None, None], shifted, conv_BC)
    return result, type(state)(conv_x, shifted, ssm)


def _project(hidden: jax.Array, weights: Sequence[jax.Array], interpret: Any) -> list[jax.Array]:
    """Apply the input projection: zx, BC and float32 dt."""
    matrices = [weight.reshape(weight.shape[0], -1) for weight in weights]
    dtypes = [hidden.dtype, hidden.dtype, jnp.float32]
    if _fits(hidden, matrices):
        results = products.project(hidden, matrices, dtypes, interpret=interpret)
    else:
        results = [
            jnp.matmul(hidden, matrix.astype(hidden.dtype), preferred_element_type=jnp.float32).astype(dtype)
            for matrix, dtype in zip(matrices, dtypes, strict=True)
        ]
    return [result.reshape(-1, *weight.shape[1:]) for result, weight in zip(results, weights, strict=True)]


def _normed(gated: jax.Array, sums: jax.Array | None, eps: float) -> jax.Array:
    """Finish the norm: divide each group by the root of its mean square."""
    if sums is None:
        return gated
    batch, groups = gated.shape[0], sums.shape[1]
    grouped = gated.astype(jnp.float32).reshape(batch, groups, -1)
    mean_square = sums[:batch].sum(2, keepdims=True) / grouped.shape[2]
    return (grouped * jax.lax.rsqrt(mean_square + eps)).reshape(gated.shape).astype(gated.dtype)


def _fits(x: jax.Array, matrices: Sequence[jax.Array], sums: Sequence[int] | None = None) -> bool:
    """Tell whether `products` can multiply: few rows, 16 bits, and strides and tiles that TMA takes."""
    rows, depth = x.shape
    groups, each = (1, 8) if sums is None else sums
    columns = [matrix.shape[1] for matrix in matrices]
    widths = products.make_plan(columns, depth).widths
    return (
        rows <= products.ROWS
        and x.dtype.itemsize == 2
        and all(matrix.dtype == x.dtype for matrix in matrices)
        and all(c % 8 == 0 and (c < w or c % w == 0) for c, w in zip(columns, widths, strict=True))
        and depth % (groups * products.DEPTHS[-1]) == 0
        and each % 8 == 0
    )


def unsupported(problem: Problem) -> str | None:
    """Return why the kernels cannot run `problem`, or None if they can: any batch and number of groups."""
    dtype = jnp.dtype(problem.dtype).name
    if (reason := hopper_only(problem)) is not None:
        return reason
    if dtype not in DTYPES:
        # float16 ends at 65504, which a gated value before the norm may exceed
        return f"it computes in bfloat16 or float32, and the inputs are {dtype}"
    if problem.head_dim % LEAST_ROWS:
        return f"it takes a head_dim that is a multiple of {LEAST_ROWS}, not {problem.head_dim}"
    if problem.state_dim % COLUMNS or problem.state_dim * LEAST_ROWS > MOST_ELEMENTS:
        most = MOST_ELEMENTS // LEAST_ROWS
        return f"it takes a state_dim that is a multiple of {COLUMNS}, up to {most}, not {problem.state_dim}"
    return None
