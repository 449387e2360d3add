"""A product of two arrays whose gradients are products of the same kind, with no transposes, in every mode.

JAX's own gradient of an operand needs a transpose, because its axes come in another order, and widens a
half-precision operand to the float32 of the incoming gradient. Both follow from the transpose rule of
`dot_general`. `jax.custom_vjp` would avoid both but has no forward mode. So the tangent is a bilinear
primitive of its own: JAX derives forward and reverse mode of every order from that primitive.
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
from mamba2_jax.ops.on_cpu.products import contract_last
from mamba2_jax.typing import Array, DTypeLike


@partial(jax.custom_jvp, nondiff_argnums=(0, 3))
def product(formula: str, a: Array, b: Array, narrow: DTypeLike | None = None) -> Array:
    """Compute `jnp.einsum` of two arrays in float32 (float64 when `a` is), differentiable in every mode.

    Args:
        formula: einsum formula in which each axis is in at least two of the three terms: `"bqn,bnk->bqk"`.
        a: `(b, q, n)` in that example.
        b: `(b, n, k)` in that example.
        narrow: dtype that the operands are cast to before the product, in the backward pass too; None: the
            operands' own dtypes.

    Returns:
        `(b, q, k)` in that example, float32. A gradient has its operand's dtype and is rounded only once.

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
    # The plain einsum, because remat policies that save products recognise only `dot_general`.
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
    return _gradient(f"{of_y},{of_b}->{of_a}", dy, b, narrow, a.aval.dtype)


def _gradient_of_b(dy: Array, a: Array, b: Any, *, formula: str, narrow: DTypeLike | None, dtype) -> Array:
    of_a, of_b, of_y = _terms(formula)
    return _gradient(f"{of_a},{of_y}->{of_b}", a, dy, narrow, b.aval.dtype)


def _gradient(formula: str, a: Array, b: Array, narrow: DTypeLike | None, dtype: DTypeLike) -> Array:
    if narrow is not None and platform() == "cpu":
        formula, a, b = contract_last(formula, a.astype(narrow), b.astype(narrow))
    return _bilinear.bind(a, b, formula=formula, narrow=narrow, dtype=dtype)


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
    """Split a formula into the axes of the left operand, of the right operand and of the result."""
    return formula.replace("->", ",").split(",")
