"""Products of rows with the quantized matrix of each row's group, as `mamba2_jax.ops.grouped` of arrays."""

from typing import Any

import jax
import jax.numpy as jnp

from mamba2_jax.ops.grouped import Groups, opaque_zeros
from mamba2_jax.ops.quantized import QuantizedWeight, linear_in_first, multiply
from mamba2_jax.typing import Array, DTypeLike, Float
from mamba2_jax.weight_types import type_of


def quantized_grouped_product(
    x: Float[Array, "s d"], weight: QuantizedWeight, groups: Groups, *, dtype: DTypeLike
) -> Float[Array, "s m"]:
    """Multiply every row by the quantized matrix of its group, in float32 (float64 when `dtype` is).

    Args:
        x: `(s, d)`, rows in the order of their groups.
        weight: `(e, m, d)`, one matrix per group; a constant in all derivatives.
        groups: the group of each row.
        dtype: dtype that both operands are cast to before a product, in the backward pass too.

    Returns:
        `(s, m)`.
    """
    narrow, full = jnp.dtype(dtype), jnp.promote_types(dtype, jnp.float32)
    options = {"narrow": narrow, "dtype": full, "transposed": False, "implementation": None}
    return _grouped.bind(x, weight.values, weight.scales, *groups, **options)


def _run(x: Array, values: Array, scales: Array, *groups: Array, dtype: DTypeLike, **options: Any) -> Array:
    """Loop over the blocks in use; a step multiplies the rows of a block with the matrix of its group."""
    plan = Groups(*groups)
    full = jnp.promote_types(options["narrow"], jnp.float32)
    blocks = x.reshape(len(plan.of_blocks), -1, x.shape[1])  # (c, rows of a block, d)

    def step(block: Array, y: Array) -> Array:
        group = plan.of_blocks[block]
        part = multiply(blocks[block], values[group], scales[group], dtype=full, **options)
        return y.at[block].set(part)

    width = _shape(x, values, scales, **options)[1]
    y = opaque_zeros((*blocks.shape[:2], width), full, plan, x)
    return jax.lax.fori_loop(0, plan.blocks, step, y).reshape(-1, width).astype(dtype)


def _shape(x: Any, values: Any, scales: Any, *groups: Any, transposed: bool, **_: Any) -> tuple[int, int]:
    width = values.shape[2] * type_of(values).per_value if transposed else values.shape[1]
    return x.shape[0], width


_grouped = linear_in_first("mamba2_quantized_grouped_product", _run, _shape)
