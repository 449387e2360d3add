"""Products with weights, operands in the compute dtype and sums in float32; and the embedding's rows."""

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from mamba2_jax.ops.device import platform
from mamba2_jax.typing import Array, DTypeLike, Float, Int


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
        dtype: of both operands, in the gradient too; in half precision that has reverse mode only.

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
        dtype: of both operands, in the gradient too; in half precision that has reverse mode only.

    Returns:
        `(..., v)` in float32 (float64 when `dtype` is).
    """
    rows, count = _rows(x, dtype)
    y = _product(rows, embedding, dtype, over=1)
    return y[:count].reshape(*x.shape[:-1], -1)


def embedding_lookup(embedding: Float[Array, "v d"], ids: Int[Array, "*b"]) -> Float[Array, "*b d"]:
    """The rows of `embedding` at `ids`, in its dtype."""
    if embedding.dtype.itemsize != 2 or platform() != "cpu":
        return embedding[ids]
    # XLA on CPU looks half-precision rows up in a float32 copy of the table. Fused, that costs nothing;
    # but it hoists the copy out of the decoding loop and keeps it. Out of a branch it cannot.
    nothing = jnp.zeros((*ids.shape, embedding.shape[1]), embedding.dtype)
    return jax.lax.cond(jnp.any(ids >= 0), lambda: embedding[ids], lambda: nothing)


def _product(rows: Array, weight: Array, dtype: DTypeLike, over: int) -> Array:
    """Sum over axis 1 of `rows (r, d)` and an end axis of `weight`: float32 `(r, *others)`."""
    others = weight.shape[:over] + weight.shape[over + 1 :]
    if platform() == "cpu" and over == 0:  # a gradient with more axes is copied first
        weight = weight.reshape(weight.shape[0], -1)
    half = jnp.dtype(dtype).itemsize == 2
    y: Any = _half_product(rows, weight, over) if half else _dot(rows, weight.astype(dtype), (1,), (over,))
    return y.reshape(rows.shape[0], *others)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _half_product(rows: Array, weight: Array, over: int) -> Array:
    """`_product` in half precision, whose gradient's products are in half precision, too.

    JAX's own would widen one operand of each to that of the other, the float32 gradient of `y`: several
    times as slow, on a GPU as well. It would also round the sum over the rows to half precision.
    """
    return _dot(rows, weight.astype(rows.dtype), (1,), (over,))


def _half_product_forward(rows: Array, weight: Array, over: int) -> tuple[Array, tuple[Array, Array]]:
    return _dot(rows, weight.astype(rows.dtype), (1,), (over,)), (rows, weight)


def _half_product_backward(over: int, kept: tuple[Array, Array], dy: Array) -> tuple[Array, Array]:
    rows, weight = kept
    dy = dy.astype(rows.dtype)
    if platform() == "cpu":
        # A softmax's gradient would be computed inside the transposition below, ten times slower.
        dy = jax.lax.optimization_barrier(dy)
    others = tuple(axis for axis in range(weight.ndim) if axis != over)
    d_rows = _dot(dy, weight.astype(rows.dtype), tuple(range(1, dy.ndim)), others)
    left, right = (rows, dy) if over == 0 else (dy, rows)
    d_weight = _dot(_transposed(left), right, (1,), (0,))
    return d_rows.astype(rows.dtype), d_weight.astype(weight.dtype)


_half_product.defvjp(_half_product_forward, _half_product_backward)


def _transposed(rows: Array) -> Array:
    """Transpose, on a CPU in a way that XLA does not take into the product.

    Otherwise it would widen both operands to float32, and multiply five times as slowly.
    """
    if len(rows) % 2 or platform() != "cpu":
        return rows.T
    return jnp.moveaxis(rows.reshape(2, -1, rows.shape[1]), 2, 0).reshape(rows.shape[::-1])


def _dot(a: Array, b: Array, over_a: tuple[int, ...], over_b: tuple[int, ...]) -> Array:
    full = jnp.promote_types(a.dtype, jnp.float32)
    return jax.lax.dot_general(a, b, ((over_a, over_b), ((), ())), preferred_element_type=full)


def _rows(x: Array, dtype: DTypeLike) -> tuple[Array, int]:
    """Fold `x` to `(rows, d)`, and a single half-precision row on CPU to two.

    XLA on CPU turns a half-precision matrix-vector product into a float32 one and hoists the conversion
    of the weights out of the decoding loop: twice the weights' bytes in temporaries. Two rows are a
    matrix product, which reads the weights as they are.
    """
    rows = x.astype(dtype).reshape(-1, x.shape[-1])
    count = math.prod(x.shape[:-1])
    if count == 1 and jnp.dtype(dtype).itemsize == 2 and platform() == "cpu":
        rows = jnp.pad(rows, ((0, 1), (0, 0)))
    return rows, count
