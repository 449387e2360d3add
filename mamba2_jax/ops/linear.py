"""Products with weights, operands in the compute dtype and sums in float32; and the embedding's rows."""

import math

import jax
import jax.numpy as jnp

from mamba2_jax.ops.dispatch import platform
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
        dtype: of both operands.

    Returns:
        `(..., *out)` in float32 (float64 when `dtype` is); the caller narrows it.
    """
    rows, count = _rows(x, dtype)
    full = jnp.promote_types(dtype, jnp.float32)
    y = jnp.tensordot(rows, weight.astype(dtype), axes=1, preferred_element_type=full)
    y = y[:count].reshape(*x.shape[:-1], *weight.shape[1:])
    return y if bias is None else y + bias.astype(full)


def vocabulary_logits(
    x: Float[Array, "*b d"], embedding: Float[Array, "v d"], *, dtype: DTypeLike
) -> Float[Array, "*b v"]:
    """Scores of every token, `x @ embedding.T`, in float32.

    Args:
        x: `(..., d)`.
        embedding: `(v, d)`, the head's or the tied embedding's matrix.
        dtype: of both operands.

    Returns:
        `(..., v)` in float32 (float64 when `dtype` is).
    """
    rows, count = _rows(x, dtype)
    full = jnp.promote_types(dtype, jnp.float32)
    y = jnp.einsum("rd,vd->rv", rows, embedding.astype(dtype), preferred_element_type=full)
    return y[:count].reshape(*x.shape[:-1], -1)


def embedding_lookup(embedding: Float[Array, "v d"], ids: Int[Array, "*b"]) -> Float[Array, "*b d"]:
    """The rows of `embedding` at `ids`, in its dtype."""
    if embedding.dtype.itemsize != 2 or platform() != "cpu":
        return embedding[ids]
    # XLA on CPU looks half-precision rows up in a float32 copy of the table. Fused, that costs nothing;
    # but it hoists the copy out of the decoding loop and keeps it. Out of a branch it cannot.
    nothing = jnp.zeros((*ids.shape, embedding.shape[1]), embedding.dtype)
    return jax.lax.cond(jnp.any(ids >= 0), lambda: embedding[ids], lambda: nothing)


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
