"""Products with weights: values and gradients in every dtype, and what they multiply in half precision."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mamba2_jax.ops.linear import linear, vocabulary_logits

SHAPES = [(2, 9), (1, 1), (6,), (2, 3, 4)]  # of what stands before the channels: odd, even, one row


def plain(x, weight):
    return jnp.tensordot(x, weight, axes=1)


def plain_logits(x, embedding):
    return x @ embedding.T


def draw(*shapes, dtype):
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes]


@pytest.mark.parametrize("lead", SHAPES)
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-6), ("bfloat16", 1e-2), ("float16", 2e-3)])
@pytest.mark.parametrize(
    ("product", "reference", "shape"),
    [(linear, plain, (8, 5)), (linear, plain, (8, 2, 3)), (vocabulary_logits, plain_logits, (11, 8))],
    ids=["matrix", "pair", "logits"],
)
def test_values_and_gradients(product, reference, shape, dtype, tolerance, lead):
    x, weight = draw((*lead, 8), shape, dtype=jnp.float32)
    x = x.astype(dtype)
    y, backward = jax.vjp(lambda x, weight: product(x, weight, dtype=dtype), x, weight)
    (dy,) = draw(y.shape, dtype=jnp.float32)
    want, reference_backward = jax.vjp(reference, x.astype(jnp.float32), weight)
    assert y.dtype == jnp.float32
    for got, wanted, like in zip(
        (y, *backward(dy)), (want, *reference_backward(dy)), (y, x, weight), strict=True
    ):
        assert got.dtype == like.dtype
        np.testing.assert_allclose(got, wanted, rtol=0, atol=tolerance * float(jnp.abs(wanted).max()))


@pytest.mark.parametrize(("product", "shape"), [(linear, (8, 2, 3)), (vocabulary_logits, (11, 8))])
def test_half_precision_multiplies_half_precision_and_sums_in_float32(product, shape):
    x, weight = draw((4, 8), shape, dtype=jnp.bfloat16)

    def loss(x, weight):
        return product(x, weight, dtype=jnp.bfloat16).astype(jnp.bfloat16).sum()

    program = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(x, weight).as_text()
    types = re.findall(
        r"stablehlo.dot_general .*: \(tensor<\w*x(\w+)>, tensor<\w*x(\w+)>\) -> tensor<\w*x(\w+)>", program
    )
    assert len(types) >= 2
    assert set(types) == {("bf16", "bf16", "f32")}


def test_a_float32_weight_gets_the_gradient_unrounded():
    """512 rows whose sum half precision cannot hold."""
    x, weight = jnp.ones((512, 4), jnp.bfloat16), jnp.ones((4, 3))
    gradient = jax.grad(lambda weight: (linear(x, weight, dtype=jnp.bfloat16) * dy).sum())
    dy = jnp.where(jnp.arange(512) == 0, 1.0, 1 / 128)[:, None]
    assert float(gradient(weight)[0, 0]) == 1 + 511 / 128


def test_forward_mode_in_float32():
    x, weight = draw((3, 8), (8, 2, 3), dtype=jnp.float32)
    y, dy = jax.jvp(lambda x: linear(x, weight, dtype=jnp.float32), (x,), (x,))
    np.testing.assert_allclose(dy, y, rtol=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_remat_policy_dots_keeps_the_product(dtype, capsys):
    x, weight = draw((4, 8), (8, 2, 3), dtype=jnp.float32)
    kept = jax.checkpoint(
        lambda x: jnp.sin(linear(jnp.sin(x), weight, dtype=dtype)).sum(),
        policy=jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    )
    jax.ad_checkpoint.print_saved_residuals(kept, x)
    assert "f32[4,6] output of dot_general" in capsys.readouterr().out
