"""Products of rows with the weight of each row's group, for rows that lie group by group.

    y[s] = weight[group of s] @ x[s]

The sum over rows of `x[s, d] * weight[group of s, m, d] * y[s, m]` is linear in each of its three arrays, and
each gradient of the product is such a sum over the two other arrays. So one primitive, of any two of the
three, gives forward and reverse mode of every order; a loop of dynamic length has no reverse mode of its own.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.core import ShapedArray
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from mamba2_jax.ops.device import platform
from mamba2_jax.ops.on_cpu.products import contract_last, entry
from mamba2_jax.typing import Array, DTypeLike, Float, Int

_OPERANDS = {"sm": ("sd", "emd"), "sd": ("sm", "emd"), "emd": ("sm", "sd")}
"""Axes of the result -> axes of the operands; `s` counts rows, `e` groups."""


class Groups(NamedTuple):
    """Partition of rows into blocks of equal size, each of one group."""

    of_blocks: Int[Array, " c"]  # group of each block
    blocks: Int[Array, ""]  # number of blocks in use; the product is 0 in all later ones
    sizes: Int[Array, " e"]  # rows of each group, with those that fill its last block


def grouped_product(
    x: Float[Array, "s d"],
    weight: Float[Array, "e m d"],
    groups: Groups,
    *,
    dtype: DTypeLike,
    ragged: bool = False,
) -> Float[Array, "s m"]:
    """Multiply every row by the matrix of its group, in float32 (float64 when `dtype` is).

    Args:
        x: `(s, d)`, rows in the order of their groups.
        weight: `(e, m, d)`, one matrix per group.
        groups: the group of each row.
        dtype: dtype that both operands are cast to before a product, in the backward pass too.
        ragged: use `jax.lax.ragged_dot_general` instead of a loop over the blocks.

    Returns:
        `(s, m)`. A gradient has its operand's dtype and is rounded only once.

    >>> groups = Groups(jnp.array([1, 0, 0]), jnp.array(2), jnp.array([2, 2]))  # blocks of two rows
    >>> grouped_product(jnp.ones((6, 1)), jnp.array([[[2.0]], [[3.0]]]), groups, dtype=jnp.float32)[:, 0]
    Array([3., 3., 2., 2., 0., 0.], dtype=float32)
    """
    narrow, full = jnp.dtype(dtype), jnp.promote_types(dtype, jnp.float32)
    return _grouped.bind(x, weight, *groups, result="sm", narrow=narrow, dtype=full, ragged=ragged)


def _run(a: Array, b: Array, *groups: Array, result: str, narrow: Any, dtype: Any, ragged: bool) -> Array:
    run = _by_ragged_dot if ragged else _by_block
    return run(a, b, Groups(*groups), result, narrow).astype(dtype)


def _by_block(a: Array, b: Array, groups: Groups, result: str, narrow: DTypeLike) -> Array:
    """Loop over the blocks in use; a step slices the rows of a block and the matrix of its group."""
    of_a, of_b = _OPERANDS[result]
    formula = f"{of_a},{of_b}->{result}".replace("e", "")
    count, full = len(groups.of_blocks), jnp.promote_types(narrow, jnp.float32)
    a = a.reshape(count, -1, a.shape[1])  # (c, rows of a block, d or m)
    b = b.reshape(count, -1, b.shape[1]) if of_b[0] == "s" else b

    def step(block: Array, y: Array) -> Array:
        at = {"s": block, "e": groups.of_blocks[block]}
        # Cast here: a cast of the whole weight would read the matrices of unused groups too.
        left, right = entry(a, block).astype(narrow), entry(b, at[of_b[0]]).astype(narrow)
        if result == "emd" and jnp.dtype(narrow).itemsize == 2 and platform() == "cpu":
            terms, left, right = contract_last(formula, left, right)
        else:
            terms = formula
        part = jnp.einsum(terms, left, right, preferred_element_type=full)
        return y.at[block].set(part) if result[0] == "s" else y.at[at["e"]].add(part)

    if result == "emd":
        shape = (len(groups.sizes), a.shape[2], b.shape[2])
    else:
        shape = (*a.shape[:2], b.shape[1 if result == "sm" else 2])
    y = jax.lax.fori_loop(0, groups.blocks, step, opaque_zeros(shape, full, groups, a))
    return y if result == "emd" else y.reshape(-1, shape[2])


def opaque_zeros(shape: tuple[int, ...], dtype: DTypeLike, groups: Groups, a: Array) -> Array:
    """Make zeros that XLA does not know to be 0; `a` is any operand of the loop that starts from them.

    Else XLA makes the zeros of all layers at once, at the start of a training step.
    """
    zero = jnp.where((groups.blocks < 0) | (jnp.abs(a.ravel()[0]) < 0), 1, 0).astype(dtype)
    return jnp.full(shape, zero)


def _by_ragged_dot(a: Array, b: Array, groups: Groups, result: str, narrow: DTypeLike) -> Array:
    contracted = {"sm": (1, 2), "sd": (1, 1), "emd": (0, 0)}[result]  # axis of a, axis of b
    dimensions = jax.lax.RaggedDotDimensionNumbers(
        dot_dimension_numbers=(tuple([axis] for axis in contracted), ([], [])),
        lhs_ragged_dimensions=[0],
        rhs_group_dimensions=[] if result == "emd" else [0],
    )
    full = jnp.promote_types(narrow, jnp.float32)
    operands = a.astype(narrow), b.astype(narrow), groups.sizes
    return jax.lax.ragged_dot_general(*operands, dimensions, preferred_element_type=full)


_grouped = Primitive("mamba2_grouped_product")
_grouped.def_impl(jax.jit(_run, static_argnames=("result", "narrow", "dtype", "ragged")))
mlir.register_lowering(_grouped, mlir.lower_fun(_run, multiple_results=False))


@_grouped.def_abstract_eval
def _shape(a: Any, b: Any, of_blocks: Any, blocks: Any, sizes: Any, *, result: str, dtype: Any, **_: Any):
    of_a, of_b = _OPERANDS[result]
    known = {
        "e": sizes.shape[0],
        **dict(zip(of_a, a.shape, strict=True)),
        **dict(zip(of_b, b.shape, strict=True)),
    }
    return ShapedArray(tuple(known[axis] for axis in result), dtype)


def _transposed(dy: Any, a: Any, b: Any, *groups: Array, result: str, dtype: Any, **options: Any) -> tuple:
    """Compute the gradient of the one undefined operand."""
    terms = _OPERANDS[result]
    which = 0 if ad.is_undefined_primal(a) else 1
    operand, other = ((a, b), (b, a))[which]
    if type(dy) is ad.Zero:
        gradient = ad.Zero(operand.aval)
    else:
        known = {result: dy, terms[1 - which]: other}
        left, right = (known[term] for term in _OPERANDS[terms[which]])
        gradient = _grouped.bind(
            left, right, *groups, result=terms[which], dtype=operand.aval.dtype, **options
        )
    gradients: list[Any] = [None] * (2 + len(groups))
    gradients[which] = gradient
    return tuple(gradients)


def _batched(arrays: Any, axes: Any, **options: Any) -> tuple[Array, int]:
    """Run the mapped axis one by one: each entry has groups of its own."""
    mapped = [
        jnp.moveaxis(array, axis, 0) for array, axis in zip(arrays, axes, strict=True) if axis is not None
    ]

    def one(entries: list[Array]) -> Array:
        rest = iter(entries)
        return _grouped.bind(
            *(array if axis is None else next(rest) for array, axis in zip(arrays, axes, strict=True)),
            **options,
        )

    return jax.lax.map(one, mapped), 0


ad.defjvp(
    _grouped,
    lambda da, a, b, *groups, **options: _grouped.bind(da, b, *groups, **options),
    lambda db, a, b, *groups, **options: _grouped.bind(a, db, *groups, **options),
    *(None, None, None),
)
ad.primitive_transposes[_grouped] = _transposed
batching.primitive_batchers[_grouped] = _batched
