"""Norms against numpy, and the grouped gated norm against its definition."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mamba2_jax import ops


def draw(shape, seed=0):
    return np.asarray(jax.random.normal(jax.random.key(seed), shape)) * 3


def norm(x, eps):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps)


def test_plain():
    x, weight = draw((2, 5, 12)), draw((12,), 1)
    got = ops.rms_norm(jnp.asarray(x), jnp.asarray(weight), eps=0.1)
    np.testing.assert_allclose(got, norm(x, 0.1) * weight, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("before", [False, True])
def test_gated_by_groups(groups, before):
    y, z, weight = draw((2, 5, 12)), draw((2, 5, 12), 1), draw((12,), 2)
    silu = z / (1 + np.exp(-z))
    split = lambda a: a.reshape(2, 5, groups, -1)  # noqa: E731
    want = norm(split(y), 1e-5) * split(silu) if before else norm(split(y * silu), 1e-5)
    got = ops.gated_rms_norm(
        jnp.asarray(y), jnp.asarray(z), jnp.asarray(weight), num_groups=groups, norm_before_gate=before
    )
    np.testing.assert_allclose(got, want.reshape(2, 5, 12) * weight, rtol=1e-5, atol=1e-5)


def test_bfloat16_is_computed_in_float32():
    x = jnp.asarray(draw((4, 256)), jnp.bfloat16)
    weight = jnp.asarray(draw((256,), 1), jnp.bfloat16)
    want = norm(np.asarray(x, np.float64), 1e-5) * np.asarray(weight, np.float64)
    got = ops.rms_norm(x, weight)
    assert got.dtype == jnp.bfloat16
    # One rounding to bfloat16 at the end: half a unit in the last of 8 bits.
    np.testing.assert_allclose(np.asarray(got, np.float64), want, rtol=2**-8)


def test_bad_arguments_are_named():
    x = jnp.ones((2, 6))
    with pytest.raises(ValueError, match="rms_norm: weight has shape"):
        ops.rms_norm(x, jnp.ones(5))
    with pytest.raises(ValueError, match="rms_norm: x is int32"):
        ops.rms_norm(x.astype(jnp.int32), jnp.ones(6))
    with pytest.raises(ValueError, match="non-empty"):
        ops.rms_norm(jnp.ones((0, 6)), jnp.ones(6))
    with pytest.raises(ValueError, match="gated_rms_norm: z has shape"):
        ops.gated_rms_norm(x, jnp.ones((2, 5)), jnp.ones(6))
    with pytest.raises(ValueError, match="num_groups=4"):
        ops.gated_rms_norm(x, x, jnp.ones(6), num_groups=4)
