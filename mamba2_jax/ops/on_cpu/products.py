"""Half-precision products and embedding lookups that XLA on a CPU runs without a float32 copy of the weights.

XLA on a CPU has fast half-precision products, but not where another operation can be fused into an operand:
XLA then widens both operands to float32.
"""

import jax
import jax.numpy as jnp

from mamba2_jax.ops.device import platform
from mamba2_jax.typing import Array, DTypeLike, Float, Int


def contract_last(formula: str, a: Array, b: Array) -> tuple[str, Array, Array]:
    """Transpose the left operand of a weight gradient, `(r, d), (r, e) -> (d, e)`, to `(d, r)`.

    The transpose runs in two halves, which XLA does not fuse into the product. A fused transpose would widen
    both operands to float32, a product five times as slow: loss and gradients of a small model (3 layers of
    width 256, bfloat16, JAX 0.10.2) take 14 per cent longer.
    """
    of_a, of_b, of_y = formula.replace("->", ",").split(",")
    if a.ndim != 2 or b.ndim != 2 or of_a[0] != of_b[0] or of_a[0] in of_y or a.shape[0] % 2:
        return formula, a, b
    if of_a[1] == of_y[0]:
        return f"{of_a[::-1]},{of_b}->{of_y}", _transposed(a), b
    return f"{of_a},{of_b[::-1]}->{of_y}", a, _transposed(b)


def _transposed(rows: Float[Array, "r d"]) -> Float[Array, "d r"]:
    """Transpose in two halves, behind an optimization barrier.

    Without the barrier, XLA merges the reshape into halves with an earlier one, such as `(b, l, d)` to
    `(r, d)`, and compiles the transpose of the merged one to a loop twenty times as slow: a training step of
    a small model takes 20 per cent longer (2 layers of width 256, vocabulary 4096, batch 8 x 512, bfloat16,
    median of 8 steps, JAX 0.10.2).
    """
    rows = jax.lax.optimization_barrier(rows)
    return jnp.moveaxis(rows.reshape(2, -1, rows.shape[1]), 2, 0).reshape(rows.shape[::-1])


def as_matrix(weight: Float[Array, "d *out"]) -> Float[Array, "d *o"]:
    """Flatten the output axes of a weight to one axis on a CPU.

    With several output axes, a gradient contracts several axes: XLA on a CPU fails at that in half precision
    ("Unsupported element type", JAX 0.10.2), and copies the operands first in float32 (loss and gradients of
    a small model take 5 per cent longer).
    """
    return weight.reshape(weight.shape[0], -1) if platform() == "cpu" else weight


def at_least_two_rows(rows: Float[Array, "r d"], dtype: DTypeLike) -> Float[Array, "s d"]:
    """Pad a single half-precision row with a row of zeros on a CPU; return other `rows` unchanged.

    XLA on a CPU turns a half-precision matrix-vector product into a float32 one and hoists the conversion of
    the weights out of the decoding loop: twice the weights' bytes in temporaries. Two rows make a matrix
    product, which reads the half-precision weights directly.
    """
    if rows.shape[0] != 1 or jnp.dtype(dtype).itemsize != 2 or platform() != "cpu":
        return rows
    return jnp.pad(rows, ((0, 1), (0, 0)))


def embedding_lookup(embedding: Float[Array, "v d"], ids: Int[Array, "*b"]) -> Float[Array, "*b d"]:
    """Look up the rows of `embedding` at `ids`, in the embedding's dtype.

    XLA on a CPU looks half-precision rows up in a float32 copy of the table. Fused, the copy costs nothing;
    but XLA hoists the copy out of the decoding loop and keeps it. Out of a `cond` branch XLA cannot hoist it.
    """
    if embedding.dtype.itemsize != 2 or platform() != "cpu":
        return embedding[ids]
    nothing = jnp.zeros((*ids.shape, embedding.shape[1]), embedding.dtype)
    return jax.lax.cond(jnp.any(ids >= 0), lambda: embedding[ids], lambda: nothing)


def entry(array: Array, index: Int[Array, ""]) -> Array:
    """Return `array[index]`, in half precision on a CPU behind an optimization barrier.

    XLA on a CPU slices a half-precision array in float32. In a loop it would hoist the float32 copy of the
    whole array out, and not fuse it into the slice: the experts of one token took 150 times as long.
    """
    if array.dtype.itemsize == 2 and platform() == "cpu":
        array, index = jax.lax.optimization_barrier((array, index))
    return array[index]
