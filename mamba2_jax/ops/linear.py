"""Matrix products of activations with weights: operands in the compute dtype, accumulation in float32."""

import math

import jax
import jax.numpy as jnp

from mamba2_jax.ops.bilinear import product
from mamba2_jax.ops.on_cpu.products import as_matrix, at_least_two_rows, embedding_lookup
from mamba2_jax.ops.quantized import QuantizedWeight, quantized_product
from mamba2_jax.typing import Array, DTypeLike, Float, Int


def linear(
    x: Float[Array, "*b d"],
    weight: Float[Array, "d *out"] | QuantizedWeight,
    bias: Float[Array, "*out"] | None = None,
    *,
    dtype: DTypeLike,
) -> Float[Array, "..."]:
    """Compute `x @ weight + bias` over the last axis of `x`, for a weight with one or more output axes.

    Args:
        x: `(..., d)`.
        weight: `(d, *out)`, an array or quantized.
        bias: `(*out)`.
        dtype: dtype that both operands are cast to, in the backward pass too.

    Returns:
        `(..., *out)` in float32 (float64 when `dtype` is float64); the caller casts the result down.
    """
    if isinstance(weight, QuantizedWeight):
        y = quantized_product(x, weight, dtype=dtype)
    else:
        rows, count = _rows(x, dtype)
        y = _product(rows, weight, dtype, over=0)
        y = y[:count].reshape(*x.shape[:-1], *weight.shape[1:])
    return y if bias is None else y + bias.astype(y.dtype)


def vocabulary_logits(
    x: Float[Array, "*b d"], embedding: Float[Array, "v d"] | QuantizedWeight, *, dtype: DTypeLike
) -> Float[Array, "*b v"]:
    """Compute the logits of every token id, `x @ embedding.T`, in float32.

    Args:
        x: `(..., d)`.
        embedding: `(v, d)`, the matrix of the head or of the tied embedding, an array or quantized.
        dtype: dtype that both operands are cast to, in the backward pass too.

    Returns:
        `(..., v)` in float32 (float64 when `dtype` is float64).
    """
    if isinstance(embedding, QuantizedWeight):
        return quantized_product(x, embedding, dtype=dtype)
    rows, count = _rows(x, dtype)
    y = _product(rows, embedding, dtype, over=1)
    return y[:count].reshape(*x.shape[:-1], -1)


def vocabulary_lookup(
    embedding: Float[Array, "v d"] | QuantizedWeight, ids: Int[Array, "*b"]
) -> Float[Array, "*b d"]:
    """Look up the rows of an embedding `(v, d)` at token ids; those of a quantized one are float32."""
    if isinstance(embedding, QuantizedWeight):
        return embedding[ids].astype(jnp.float32)
    return embedding_lookup(embedding, ids)


def _product(rows: Array, weight: Array, dtype: DTypeLike, over: int) -> Array:
    """Contract axis 1 of `rows (r, d)` with axis `over` of `weight`: float32 `(r, *others)`."""
    others = weight.shape[:over] + weight.shape[over + 1 :]
    weight = as_matrix(weight)
    if jnp.dtype(dtype).itemsize == 2:
        # JAX's own backward pass would widen the half-precision operand of each product to the float32 of
        # the result's gradient: several times as slow, on a GPU as well. It would also round the sum over
        # the rows to half precision.
        of_weight = "dvwxyz"[: weight.ndim] if over == 0 else "vd"
        y = product(f"rd,{of_weight}->r{of_weight.replace('d', '')}", rows, weight, dtype)
    else:
        full = jnp.promote_types(dtype, jnp.float32)
        dims = (((1,), (over,)), ((), ()))
        y = jax.lax.dot_general(rows, weight.astype(dtype), dims, preferred_element_type=full)
    return y.reshape(rows.shape[0], *others)


def _rows(x: Array, dtype: DTypeLike) -> tuple[Array, int]:
    """Reshape `x` to `(rows, d)`; return the matrix and the number of its rows that are not padding."""
    rows = x.astype(dtype).reshape(-1, x.shape[-1])
    return at_least_two_rows(rows, dtype), math.prod(x.shape[:-1])
