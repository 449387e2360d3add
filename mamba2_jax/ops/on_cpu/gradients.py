"""Gradients that XLA on a CPU computes faster than JAX's own, which are taken on other devices.

Found in profiles of training steps with JAX 0.10 and 0.12. They are the same but for rounding. What each is
worth, in loss and gradients of 3 layers of width 256 and 4 x 512 tokens on two cores, JAX 0.10.2: without
`product` they take 5 to 6 per cent longer, without `repeat` 4 to 6, by the fastest of ten runs; without
`for_every` a quarter more memory.
"""

import math
from functools import partial

import jax
import jax.numpy as jnp

from mamba2_jax.ops import bilinear
from mamba2_jax.ops.device import platform
from mamba2_jax.typing import Array


def product(formula: str, a: Array, b: Array) -> Array:
    """`jnp.einsum` of two arrays, in float32 (float64 when `a` is).

    `formula` names all axes, as in `"bqn,bnk->bqk"`: `a (b, q, n)`, `b (b, n, k)` and the result `(b, q, k)`.

    JAX's gradient of an operand comes with its axes in another order, to be turned. XLA merges that into the
    loop that reads it, which then walks through memory across the rows; a product can write them as wanted.
    """
    if platform() == "cpu":
        return bilinear.product(formula, a, b)
    return jnp.einsum(formula, a, b, preferred_element_type=jnp.promote_types(a.dtype, jnp.float32))


def repeat(array: Array, count: int, axis: int) -> Array:
    """`array (*left, *right)`, `count` times along a new axis: `(*left, count, *right)`, at `axis`.

    The gradient is a sum over that axis. XLA calls a library for it, with operands that have to be written
    first. As a sum of two halves, again and again, it becomes part of the loops around it.
    """
    if platform() == "cpu":
        return _repeat(array, count, axis)
    return _broadcast(array, count, axis)


def _broadcast(array: Array, count: int, axis: int) -> Array:
    axis %= array.ndim + 1
    others = tuple(other for other in range(array.ndim + 1) if other != axis)
    shape = (*array.shape[:axis], count, *array.shape[axis:])
    return jax.lax.broadcast_in_dim(array, shape, others)


@partial(jax.custom_jvp, nondiff_argnums=(1, 2))
def _repeat(array: Array, count: int, axis: int) -> Array:
    return _broadcast(array, count, axis)


@_repeat.defjvp
def _repeat_by_doubling(
    count: int, axis: int, arrays: tuple[Array], tangents: tuple[Array]
) -> tuple[Array, Array]:
    doublings = (count & -count).bit_length() - 1  # as often as two divides it
    tangent = _broadcast(tangents[0], count >> doublings, axis)
    for _ in range(doublings):
        tangent = jnp.concatenate([tangent, tangent], axis)
    return _broadcast(arrays[0], count, axis), tangent


def for_every(shape: tuple[int, ...], array: Array) -> Array:
    """`array (*own)` for each index of `shape`: `(*shape, *own)`; its gradient is taken as that of `repeat`.

    As one axis: a sum over what halving leaves takes XLA thirty times as long beside an axis of size 1.
    """
    if platform() != "cpu":
        return jnp.broadcast_to(array, (*shape, *array.shape))
    return _repeat(array, math.prod(shape), 0).reshape(*shape, *array.shape)
