"""Products of activations with quantized weights, without a dequantized copy of a whole matrix.

A product is linear in its activations, and its transpose is a product with the same values. So one primitive
gives forward and reverse mode of every order; values and scales are constants for all of them.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import ShapedArray
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jax.sharding import PartitionSpec

from mamba2_jax.ops.checks import check_choice
from mamba2_jax.ops.device import on_device_of, platform
from mamba2_jax.typing import Array, DTypeLike, Float
from mamba2_jax.weight_types import dequantize, type_of

IMPLEMENTATIONS = ("dot", "blocks", "sum")
QUANTIZED_PRODUCTS: list[Primitive] = []
"""The primitives of products with quantized matrices, for remat policies."""

_SMALL_BLOCK, _BLOCK, _GPU_BLOCK = 1 << 15, 1 << 18, 1 << 22  # numbers
_FEW_ROWS = 16


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class QuantizedWeight:
    """A matrix as values and scales, see `mamba2_jax.weight_types`; in many ways like its float32 array.

    Args:
        values: `(..., width)`, divided by the levels that a value holds; the contracted axis is the last.
        scales: `(..., groups)`, float32.
        rows_last: the matrix has the contracted axis first: it is `(width, ...)`.
    """

    values: Array
    scales: Array
    rows_last: bool = field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the matrix."""
        *rows, width = self.values.shape
        width *= type_of(self.values).per_value
        return (width, *rows) if self.rows_last else (*rows, width)

    @property
    def ndim(self) -> int:
        """Number of axes of the matrix."""
        return self.values.ndim

    @property
    def dtype(self) -> jnp.dtype:
        """Dtype of the numbers, float32."""
        return self.scales.dtype

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: Any) -> "QuantizedWeight":
        """Return the rows at an index or at indices of the first axis; `...`: all."""
        if index is ...:
            return self
        if self.rows_last:
            raise ValueError("QuantizedWeight: only a matrix with the contracted axis last has rows to index")
        return QuantizedWeight(self.values[index], self.scales[index], False)

    def reshape_rows(self, *rows: int) -> "QuantizedWeight":
        """Reshape all axes but the contracted one; the contracted axis becomes the last."""
        values, scales = (one.reshape(*rows, one.shape[-1]) for one in (self.values, self.scales))
        return QuantizedWeight(values, scales, False)

    def astype(self, dtype: DTypeLike) -> Array:
        """Dequantize: return the matrix as an array."""
        matrix = dequantize(self.values, self.scales).astype(dtype)
        return jnp.moveaxis(matrix, -1, 0) if self.rows_last else matrix


def input_pieces(weight: Array | QuantizedWeight) -> int:
    """Return into how many pieces the last axis of a matrix may be cut: numbers, or groups of them."""
    groups = weight.scales.shape[-1] if isinstance(weight, QuantizedWeight) else 1
    return weight.shape[-1] if groups == 1 else groups


def spec_of(weight: Array | QuantizedWeight, spec: PartitionSpec) -> PartitionSpec | QuantizedWeight:
    """Return the specs of a matrix with the contracted axis last: of values and scales, or of its array."""
    if not isinstance(weight, QuantizedWeight):
        return spec
    of_scales = spec if weight.scales.shape[-1] > 1 else PartitionSpec(*spec[:-1], None)
    return QuantizedWeight(spec, of_scales, weight.rows_last)  # pyright: ignore[reportArgumentType]


def quantized_product(
    x: Float[Array, "*b d"],
    weight: QuantizedWeight,
    *,
    dtype: DTypeLike,
    implementation: str | None = None,
) -> Float[Array, "..."]:
    """Compute the product of the last axis of `x` with the contracted axis of a quantized matrix.

    Args:
        x: `(..., d)`.
        weight: a matrix with the contracted axis `d` and output axes `*out`.
        dtype: dtype that the operands are cast to, in the backward pass too.
        implementation: `"blocks"`, a loop of products with some rows of the matrix, dequantized; `"dot"`, one
            product, into which the compiler fuses the dequantization if it can; `"sum"`, one loop over the
            values that multiplies and sums, for few rows, with `"blocks"` for its gradient. None: `"blocks"`
            on a CPU; else `"dot"` for a scale per row, which XLA fuses on a GPU, and for groups, which it
            does not, `"sum"` for up to 16 rows and `"blocks"`.

    Returns:
        `(..., *out)` in float32 (float64 when `dtype` is). Its gradient with respect to `x` is that of the
        product with the dequantized matrix; the matrix has none.

    Raises:
        ValueError: an unknown implementation, or sizes that differ.

    >>> values, scales = jnp.array([[1, 2], [3, 4]], jnp.int8), jnp.array([[0.5], [2.0]])
    >>> quantized_product(jnp.ones((1, 2)), QuantizedWeight(values, scales, True), dtype=jnp.float32)
    Array([[ 1.5, 14. ]], dtype=float32)
    """
    op = "quantized_product"
    check_choice(op, "implementation", implementation, (None, *IMPLEMENTATIONS))
    *rows, width = weight.reshape_rows(*weight.values.shape[:-1]).shape
    if x.shape[-1] != width:
        raise ValueError(
            f"{op}: x has shape {x.shape}, and the matrix {weight.shape} contracts {width} numbers"
        )
    with on_device_of(x, weight.values):
        flat = weight.reshape_rows(math.prod(rows))
        y = _product.bind(
            x.astype(dtype).reshape(-1, width),
            flat.values,
            flat.scales,
            narrow=jnp.dtype(dtype),
            dtype=jnp.promote_types(dtype, jnp.float32),
            transposed=False,
            implementation=implementation,
        )
    return y.reshape(*x.shape[:-1], *rows)


def linear_in_first(name: str, run: Callable[..., Array], shape: Callable[..., tuple[int, ...]]) -> Primitive:
    """Make a primitive of a function that is linear in its first array, with all derivatives in that array.

    Args:
        name: name of the primitive.
        run: `run(x, *constants, dtype, transposed, **options)`, the result in `dtype`; `transposed` asks for
            the transpose of the map.
        shape: shape of the result, of the same arguments with abstract arrays.
    """
    primitive = Primitive(name)
    primitive.def_impl(jax.jit(run, static_argnames=("dtype", "transposed", "narrow", "implementation")))
    mlir.register_lowering(primitive, mlir.lower_fun(run, multiple_results=False))
    primitive.def_abstract_eval(
        lambda *arrays, **options: ShapedArray(shape(*arrays, **options), options["dtype"])
    )

    def transpose(dy: Any, x: Any, *constants: Array, dtype: Any, transposed: bool, **options: Any) -> list:
        if type(dy) is ad.Zero:
            return [ad.Zero(x.aval), *(None for _ in constants)]
        dx = primitive.bind(dy, *constants, dtype=x.aval.dtype, transposed=not transposed, **options)
        return [dx, *(None for _ in constants)]

    def batched(arrays: Any, axes: Any, **options: Any) -> tuple[Array, int]:
        whole = [axis is None for axis in axes]
        mapped = [jnp.moveaxis(a, axis, 0) for a, axis in zip(arrays, axes, strict=True) if axis is not None]

        def one(entries: list[Array]) -> Array:
            rest = iter(entries)
            return primitive.bind(
                *(a if w else next(rest) for a, w in zip(arrays, whole, strict=True)), **options
            )

        return jax.lax.map(one, mapped), 0

    ad.primitive_jvps[primitive] = lambda primals, tangents, **options: (
        primitive.bind(*primals, **options),
        ad.Zero(ShapedArray(shape(*primals, **options), options["dtype"]))
        if type(tangents[0]) is ad.Zero
        else primitive.bind(tangents[0], *primals[1:], **options),
    )
    ad.primitive_transposes[primitive] = transpose
    batching.primitive_batchers[primitive] = batched
    QUANTIZED_PRODUCTS.append(primitive)
    return primitive


def multiply(
    x: Array,
    values: Array,
    scales: Array,
    *,
    dtype: DTypeLike,
    transposed: bool,
    narrow: DTypeLike,
    implementation: str | None,
) -> Array:
    """Multiply `x (r, d)` by the transpose of a matrix `(o, d)`; transposed, `x (r, o)` by the matrix."""
    if implementation is None:
        implementation = _choose(x.shape[0], scales.shape[1], transposed)
    if platform() == "cpu":
        # Without bfloat16 instructions a float32 product is faster, and a block of the matrix is small.
        x, narrow = x.astype(narrow), jnp.promote_types(narrow, jnp.float32)
    run = {"dot": _dot, "blocks": _blocks, "sum": _blocks if transposed else _sum}[implementation]
    return run(x, values, scales, narrow, transposed).astype(dtype)


_product = linear_in_first(
    "mamba2_quantized_product",
    multiply,
    lambda x, values, scales, *, transposed, **_: (
        x.shape[0],
        values.shape[1] * type_of(values).per_value if transposed else values.shape[0],
    ),
)


def _choose(rows: int, groups: int, transposed: bool) -> str:
    if platform() == "cpu":
        return "blocks"
    if groups == 1:
        return "dot"
    return "sum" if rows <= _FEW_ROWS and not transposed else "blocks"


def _sum(x: Array, values: Array, scales: Array, narrow: DTypeLike, transposed: bool) -> Array:
    """Multiply and sum in one loop over the values."""
    full, parts = jnp.promote_types(narrow, jnp.float32), type_of(values).unpack(values, scales.shape[1])
    x = x.astype(narrow).astype(full).reshape(len(x), 1, scales.shape[1], len(parts), -1)
    terms = [
        x[:, :, :, index] * part.astype(full) for index, part in enumerate(parts)
    ]  # (r, o, groups, size)
    return (sum(terms[1:], start=terms[0]) * scales[..., None].astype(full)).sum((2, 3))


def _dot(x: Array, values: Array, scales: Array, narrow: DTypeLike, transposed: bool) -> Array:
    """Multiply with a matrix, of which each part of the groups is an operand of a product of its own.

    Put together to one operand the parts would be written to memory, and on a CPU by a slow loop.
    """
    full = jnp.promote_types(narrow, jnp.float32)
    dims = (((1,), (0 if transposed else 1,)), ((), ()))
    product = partial(jax.lax.dot_general, dimension_numbers=dims, preferred_element_type=full)
    (rows, groups), parts = scales.shape, type_of(values).unpack(values, scales.shape[1])
    # A scale per row of the matrix is not rounded to the compute dtype, in which the levels are exact.
    by_row = scales[:, 0].astype(full) if groups == 1 else 1
    matrices = [
        (part if groups == 1 else part.astype(scales.dtype) * scales[..., None])
        .astype(narrow)
        .reshape(rows, -1)
        for part in parts
    ]
    if transposed:
        x = (x * by_row).astype(narrow)
        pieces = [product(x, matrix).reshape(len(x), groups, -1) for matrix in matrices]
        return jnp.stack(pieces, axis=2).reshape(len(x), -1)
    pieces = jnp.split(x.astype(narrow).reshape(len(x), groups, len(parts), -1), len(parts), axis=2)
    terms = [product(x.reshape(len(x), -1), m) for x, m in zip(pieces, matrices, strict=True)]
    return sum(terms[1:], start=terms[0]) * by_row


def _blocks(x: Array, values: Array, scales: Array, narrow: DTypeLike, transposed: bool) -> Array:
    """Loop over blocks of rows of the matrix; only one block is dequantized at a time."""
    full = jnp.promote_types(narrow, jnp.float32)
    rows, width = values.shape[0], values.shape[1] * type_of(values).per_value
    size = min(rows, max(1, _block_size(x.shape[0]) // width))

    def add(at: Array | int, y: Array, size: int) -> Array:
        v, s = (jax.lax.dynamic_slice_in_dim(one, at, size) for one in (values, scales))
        if transposed:
            return y + _dot(jax.lax.dynamic_slice_in_dim(x, at, size, 1), v, s, narrow, True)
        return jax.lax.dynamic_update_slice_in_dim(y, _dot(x, v, s, narrow, False), at, 1)

    y = jnp.zeros((x.shape[0], width if transposed else rows), full)
    y = jax.lax.fori_loop(0, rows // size, lambda index, y: add(index * size, y, size), y)
    return add(rows - rows % size, y, rows % size) if rows % size else y


def _block_size(rows: int) -> int:
    """Return how many numbers of a matrix to dequantize at a time for a product with `rows` rows."""
    if platform() != "cpu":
        return _GPU_BLOCK
    return _SMALL_BLOCK if rows < _FEW_ROWS else _BLOCK
