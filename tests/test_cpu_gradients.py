"""Gradients written for XLA on a CPU against JAX's own, at every order that is promised."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mamba2_jax.ops.on_cpu import gradients as cpu_gradients
from mamba2_jax.ops.on_cpu.gradients import for_every, product

RNG = np.random.default_rng(0)


def draw(*shape, dtype=jnp.float32):
    return jnp.asarray(RNG.normal(size=shape), dtype)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("formula", ["bqn,bnk->bqk", "bqn,bkn->bqk", "bnq,bnk->bqk", "bnq,bkn->bqk"])
def test_products_and_their_gradients(formula, dtype):
    sizes = {"b": 2, "q": 5, "n": 7, "k": 3}
    a, b = (draw(*(sizes[axis] for axis in term), dtype=dtype) for term in formula[:-5].split(","))
    weights = draw(2, 5, 3)

    def loss(einsum):
        return lambda a, b: (einsum(formula, a, b) * weights).sum()

    def own(formula, a, b):
        return jnp.einsum(formula, a, b, preferred_element_type=jnp.float32)

    assert product(formula, a, b).dtype == jnp.float32
    np.testing.assert_array_equal(product(formula, a, b), own(formula, a, b))
    ours, jax_own = (jax.grad(loss(einsum), (0, 1))(a, b) for einsum in (product, own))
    for mine, other, operand in zip(ours, jax_own, (a, b), strict=True):
        assert mine.dtype == operand.dtype
        rounded = 1e-6 if dtype == "float32" else 2**-8
        np.testing.assert_allclose(mine.astype("float32"), other.astype("float32"), rtol=rounded, atol=1e-6)


def test_a_products_gradient_is_not_turned():
    """That is what it is for: JAX's own is."""
    a, b = draw(2, 5, 7), draw(2, 7, 3)

    def transpositions(einsum):
        gradient = jax.grad(lambda a, b: (einsum("bqn,bnk->bqk", a, b) ** 2).sum(), (0, 1))
        return str(jax.make_jaxpr(gradient)(a, b)).count("transpose[")

    assert transpositions(product) == 0
    assert transpositions(jnp.einsum) > 0


def test_repetitions_are_summed_by_halves():
    def sum_of(gradient):
        return jax.vjp(lambda array: for_every((8,), array), jnp.ones(3))[1](gradient)

    assert str(jax.make_jaxpr(sum_of)(jnp.ones((8, 3)))).count(" split[") == 3


@pytest.mark.parametrize("shape", [(), (1,), (2, 6), (1, 5), (8,), (3,)])
def test_one_array_for_every_index(shape):
    array = draw(3, 4)
    expected = jnp.broadcast_to(array, (*shape, 3, 4))
    np.testing.assert_array_equal(for_every(shape, array), expected)
    weights = draw(*expected.shape)
    _, tangent = jax.jvp(lambda array: for_every(shape, array), (array,), (2 * array,))
    np.testing.assert_array_equal(tangent, 2 * expected)
    gradient = jax.grad(lambda array: (for_every(shape, array) * weights).sum())(array)
    np.testing.assert_allclose(gradient, weights.sum(tuple(range(len(shape)))), rtol=1e-5, atol=1e-6)


def test_second_order_and_vmap():
    a, b = draw(2, 4), draw(4, 3)

    def ours(a, b):
        return jnp.sin(product("qn,nk->qk", a, b) * for_every((2,), b[0])).sum()

    def own(a, b):
        return jnp.sin((a @ b) * b[0]).sum()

    for derivative in (jax.grad, lambda f: jax.jacrev(jax.grad(f)), lambda f: jax.jacfwd(jax.grad(f))):
        np.testing.assert_allclose(derivative(ours)(a, b), derivative(own)(a, b), rtol=1e-5, atol=1e-5)
    rows = draw(5, 2, 4)
    np.testing.assert_allclose(
        jax.vmap(jax.grad(ours), (0, None))(rows, b),
        jax.vmap(jax.grad(own), (0, None))(rows, b),
        rtol=1e-5,
        atol=1e-5,
    )


def test_elsewhere_they_are_jaxs_own(monkeypatch):
    monkeypatch.setattr(cpu_gradients, "platform", lambda: "gpu")

    def everything(a, b):
        return product("qn,nk->qk", a, b) + for_every((2,), b[1])

    jaxpr = str(jax.make_jaxpr(everything)(draw(2, 4), draw(4, 3)))
    assert "custom" not in jaxpr
