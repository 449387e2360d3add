"""Products of two arrays whose derivatives are such products again: their axes in order, in every mode.

JAX's own gradient of a product comes with its axes in another order, to be transposed, and widens a
half-precision operand to the float32 of the gradient it meets. Both follow from how `dot_general` is
transposed, and `jax.custom_vjp` would mend them at the price of forward mode. So the tangent is an operation
of its own here, linear in either operand: JAX derives all modes and orders from that.
"""

from functools import partial
from string import ascii_lowercase
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import ShapedArray
from jax.custom_derivatives import SymbolicZero
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from mamba2_jax.ops.device import platform
from mamba2_jax.ops.on_cpu.products import computed_once, contract_last
from mamba2_jax.typing import Array, DTypeLike


@partial(jax.custom_jvp, nondiff_argnums=(0, 3))
def product(formula: str, a: Array, b: Array, narrow: DTypeLike | None = None) -> Array:
    """`jnp.einsum` of two arrays, summed in float32 (float64 when `a` is), with all its derivatives.

    Args:
        formula: names all axes, each in two of the three terms at least, as in `"bqn,bnk->bqk"`.
        a: `(b, q, n)` there.
        b: `(b, n, k)` there.
        narrow: dtype in which the operands are multiplied, and each gradient with the other operand; None:
            as they are.

    Returns:
        `(b, q, k)` there, float32; a gradient has the dtype of its operand, and is not rounded before.

    >>> a, b = jnp.ones((2, 3)), jnp.ones((3, 4), jnp.bfloat16)
    >>> y, tangent = jax.jvp(lambda a: product("qn,nk->qk", a, b, jnp.bfloat16), (a,), (2 * a,))
    >>> y.dtype.name, float(y[0, 0]), float(tangent[0, 0])
    ('float32', 3.0, 6.0)
    """
    return _einsum(a, b, formula=formula, narrow=narrow, dtype=_sum_dtype(a, narrow))


@partial(product.defjvp, symbolic_zeros=True)
def _product_jvp(
    formula: str, narrow: DTypeLike | None, primals: tuple[Array, Array], tangents: tuple[Any, Any]
) -> tuple[Array, Array]:
    (a, b), (a_dot, b_dot) = primals, tangents
    bind = partial(_bilinear.bind, formula=formula, narrow=narrow, dtype=_sum_dtype(a, narrow))
    # Plain, so that the policies of `jax.checkpoint` that keep products know it for one.
    y = _einsum(a, b, formula=formula, narrow=narrow, dtype=_sum_dtype(a, narrow))
    terms = [] if isinstance(a_dot, SymbolicZero) else [bind(a_dot, b)]
    terms += [] if isinstance(b_dot, SymbolicZero) else [bind(a, b_dot)]
    return y, sum(terms[1:], start=terms[0]) if terms else jnp.zeros_like(y)


def _sum_dtype(a: Array, narrow: DTypeLike | None) -> jnp.dtype:
    return jnp.promote_types(a.dtype if narrow is None else narrow, jnp.float32)


def _einsum(a: Array, b: Array, *, formula: str, narrow: DTypeLike | None, dtype: DTypeLike) -> Array:
    if narrow is not None:
        a, b = a.astype(narrow), b.astype(narrow)
    full = jnp.promote_types(jnp.promote_types(a.dtype, b.dtype), jnp.float32)
    return jnp.einsum(formula, a, b, preferred_element_type=full).astype(dtype)


_bilinear = Primitive("mamba2_product")
_bilinear.def_impl(_einsum)
mlir.register_lowering(_bilinear, mlir.lower_fun(_einsum, multiple_results=False))


@_bilinear.def_abstract_eval
def _shape(a: Any, b: Any, *, formula: str, narrow: DTypeLike | None, dtype: DTypeLike) -> Any:
    of_a, of_b, of_y = _terms(formula)
    sizes = dict(zip(of_a, a.shape, strict=True)) | dict(zip(of_b, b.shape, strict=True))
    return ShapedArray(tuple(sizes[axis] for axis in of_y), jnp.dtype(dtype))


def _gradient_of_a(dy: Array, a: Any, b: Array, *, formula: str, narrow: DTypeLike | None, dtype) -> Array:
    of_a, of_b, of_y = _terms(formula)
    return _gradient(f"{of_y},{of_b}->{of_a}", _narrowed(dy, narrow), b, narrow, a.aval.dtype)


def _gradient_of_b(dy: Array, a: Array, b: Any, *, formula: str, narrow: DTypeLike | None, dtype) -> Array:
    of_a, of_b, of_y = _terms(formula)
    return _gradient(f"{of_a},{of_y}->{of_b}", a, _narrowed(dy, narrow), narrow, b.aval.dtype)


def _gradient(formula: str, a: Array, b: Array, narrow: DTypeLike | None, dtype: DTypeLike) -> Array:
    if narrow is not None and platform() == "cpu":
        formula, a, b = contract_last(formula, a.astype(narrow), b.astype(narrow))
    return _bilinear.bind(a, b, formula=formula, narrow=narrow, dtype=dtype)


def _narrowed(dy: Array, narrow: DTypeLike | None) -> Array:
    return dy if narrow is None else computed_once(dy.astype(narrow))


ad.defbilinear(_bilinear, _gradient_of_a, _gradient_of_b)


def _batched(arrays: Any, axes: Any, *, formula: str, **options: Any) -> tuple[Array, int]:
    new = next(letter for letter in ascii_lowercase if letter not in formula)
    *operands, of_y = _terms(formula)
    of_a, of_b = (
        term if axis is None else f"{term[:axis]}{new}{term[axis:]}"
        for term, axis in zip(operands, axes, strict=True)
    )
    return _bilinear.bind(*arrays, formula=f"{of_a},{of_b}->{new}{of_y}", **options), 0


batching.primitive_batchers[_bilinear] = _batched


def _terms(formula: str) -> list[str]:
    """The axes of both operands and of the result."""
    return formula.replace("->", ",").split(",")
