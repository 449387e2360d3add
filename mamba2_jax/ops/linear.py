"""Products with weights: operands in the compute dtype, sums in float32."""

import math

import jax
import jax.numpy as jnp

from mamba2_jax.ops.bilinear import product
from mamba2_jax.ops.on_cpu.products import as_matrix, at_least_two_rows
from mamba2_jax.typing import Array, DTypeLike, Float


def linear(
    x: Float[Array, "*b d"],
    weight: Float[Array, "d *out"],
    bias: Float[Array, "*out"] | None = None,
    *,
    dtype: DTypeLike,
) -> Float[Array, "..."]:
    """`x @ weight + bias` over the last axis of `x`; the weight may have several output axes.

    Args:
        x: `(..., d)`.
        weight: `(d, *out)`.
        bias: `(*out)`.
        dtype: of both operands, in the gradient too.

    Returns:
        `(..., *out)` in float32 (float64 when `dtype` is); the caller narrows it.
    """
    rows, count = _rows(x, dtype)
    y = _product(rows, weight, dtype, over=0)
    y = y[:count].reshape(*x.shape[:-1], *weight.shape[1:])
    return y if bias is None else y + bias.astype(y.dtype)


def vocabulary_logits(
    x: Float[Array, "*b d"], embedding: Float[Array, "v d"], *, dtype: DTypeLike
) -> Float[Array, "*b v"]:
    """Scores of every token, `x @ embedding.T`, in float32.

    Args:
        x: `(..., d)`.
        embedding: `(v, d)`, the head's or the tied embedding's matrix.
        dtype: of both operands, in the gradient too.

    Returns:
        `(..., v)` in float32 (float64 when `dtype` is).
    """
    rows, count = _rows(x, dtype)
    y = _product(rows, embedding, dtype, over=1)
    return y[:count].reshape(*x.shape[:-1], -1)


def _product(rows: Array, weight: Array, dtype: DTypeLike, over: int) -> Array:
    """Sum over axis 1 of `rows (r, d)` and an end axis of `weight`: float32 `(r, *others)`."""
    others = weight.shape[:over] + weight.shape[over + 1 :]
    weight = as_matrix(weight)
    if jnp.dtype(dtype).itemsize == 2:
        # JAX's own gradient would widen one operand of each product to that of the other, the float32
        # gradient of the result: several times as slow, on a GPU as well. It would also round the sum over
        # the rows to half precision.
        of_weight = "dvwxyz"[: weight.ndim] if over == 0 else "vd"
        y = product(f"rd,{of_weight}->r{of_weight.replace('d', '')}", rows, weight, dtype)
    else:
        full = jnp.promote_types(dtype, jnp.float32)
        dims = (((1,), (over,)), ((), ()))
        y = jax.lax.dot_general(rows, weight.astype(dtype), dims, preferred_element_type=full)
    return y.reshape(rows.shape[0], *others)


def _rows(x: Array, dtype: DTypeLike) -> tuple[Array, int]:
    """Fold `x` to `(rows, d)`; and how many of these are its own."""
    rows = x.astype(dtype).reshape(-1, x.shape[-1])
    return at_least_two_rows(rows, dtype), math.prod(x.shape[:-1])
