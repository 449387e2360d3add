"""The convolution against float64 numpy: padding, packing, carried state, several channel axes."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from ssd_cases import segment_ids

from mamba2_jax import ops

TOLERANCE = 1e-6  # four float32 products and a silu


def draw(b=2, l=23, channels=(6,), taps=4, seed=0):
    keys = jax.random.split(jax.random.key(seed), 4)
    return {
        "x": jax.random.normal(keys[0], (b, l, *channels)),
        "weight": jax.random.normal(keys[1], (taps, *channels)),
        "bias": jax.random.normal(keys[2], channels),
        "initial_state": jax.random.normal(keys[3], (b, taps - 1, *channels)),
    }


def close(got, want):
    np.testing.assert_allclose(got, want, atol=TOLERANCE * 10, rtol=TOLERANCE * 10)


@pytest.mark.parametrize("segments", [None, "packed", "repeating", "left", "right", "none"])
@pytest.mark.parametrize("channels", [(6,), (2, 3)])
def test_equals_numpy(segments, channels):
    inputs = draw(channels=channels)
    ids = None if segments is None else segment_ids(segments, 2, 23)
    want_y, want_state = reference.causal_conv1d(**inputs, segment_ids=ids)
    y, state = ops.causal_conv1d(**inputs, segment_ids=None if ids is None else jnp.asarray(ids))
    valid = np.ones((2, 23), bool) if ids is None else ids != 0
    close(np.asarray(y)[valid], want_y[valid])
    close(state, want_state)


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("side", ["left", "right", "none"])
def test_a_boolean_mask_is_one_document(side, rows):
    inputs = {name: value if value.ndim < 3 else value[:rows] for name, value in draw(channels=(6,)).items()}
    mask = segment_ids(side, 2, 23)[:rows] != 0
    y, state = ops.causal_conv1d(**inputs, segment_ids=jnp.asarray(mask))
    want_y, want_state = ops.causal_conv1d(**inputs, segment_ids=jnp.asarray(mask, jnp.int32))
    assert (y[mask] == want_y[mask]).all()
    assert (state == want_state).all()


@pytest.mark.parametrize("taps", [2, 3, 4])
@pytest.mark.parametrize("length", [1, 2, 5])
def test_short_rows_without_bias_or_activation(taps, length):
    inputs = draw(l=length, taps=taps)
    del inputs["bias"]
    want_y, want_state = reference.causal_conv1d(**inputs, silu=False)
    y, state = ops.causal_conv1d(**inputs, activation=None)
    close(y, want_y)
    close(state, want_state)


def test_in_half_precision_a_gradient_is_rounded_once():
    """The taps' parts of it are added up in float32."""
    inputs = draw(channels=(64,), l=64)
    x = inputs["x"].astype(jnp.bfloat16)

    def gradient(x):
        y, pull = jax.vjp(lambda x: ops.causal_conv1d(x, inputs["weight"], inputs["bias"])[0], x)
        return pull(jnp.ones_like(y))[0]

    once = gradient(x.astype(jnp.float32)).astype(jnp.bfloat16)
    # Those that differ lie between two bfloat16 numbers, as near to one as to the other; rounding every tap's
    # part leaves 45 % of them different.
    assert (gradient(x) == once).mean() > 0.98


def test_step_by_step_and_piece_by_piece_equal_the_whole():
    inputs = draw()
    y, state = ops.causal_conv1d(**inputs)
    first, middle = ops.causal_conv1d(**{**inputs, "x": inputs["x"][:, :9]})
    outputs, carried = [first], middle
    for t in range(9, 23):
        out, carried = ops.causal_conv1d_step(inputs["x"][:, t], inputs["weight"], inputs["bias"], carried)
        outputs.append(out[:, None])
    close(jnp.concatenate(outputs, 1), y)
    np.testing.assert_array_equal(carried, state)


def test_no_gradient_leaks_across_documents_or_out_of_padding():
    inputs = draw()
    ids = jnp.asarray(segment_ids("packed", 2, 23))

    def last_document(x):
        y, _ = ops.causal_conv1d(x, inputs["weight"], inputs["bias"], segment_ids=ids)
        return (y * (ids == 3)[..., None]).sum()

    gradient = jax.grad(last_document)(inputs["x"])
    assert jnp.abs(gradient[ids == 3]).max() > 0
    assert jnp.abs(gradient[ids != 3]).max() == 0


BAD = {
    "x": ({"x": jnp.ones((2, 6))}, "x wants a non-empty"),
    "empty": ({"x": jnp.ones((2, 0, 6))}, "x wants a non-empty"),
    "weight": ({"weight": jnp.ones((4, 5))}, "weight has shape"),
    "one tap": ({"weight": jnp.ones((1, 6))}, "weight has shape"),
    "bias": ({"bias": jnp.ones(5)}, "bias has shape"),
    "state": ({"initial_state": jnp.ones((2, 4, 6))}, "initial_state has shape"),
    "activation": ({"activation": "relu"}, "activation='relu'"),
    "segments": ({"segment_ids": jnp.ones((2, 22), jnp.int32)}, "segment_ids has shape"),
    "dtype": ({"x": jnp.ones((2, 23, 6), jnp.int32)}, "x is int32"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments_are_named(name):
    change, message = BAD[name]
    with pytest.raises(ValueError, match=f"causal_conv1d: {message}"):
        ops.causal_conv1d(**{**draw(), **change})


def test_no_gradient_of_one_row_is_a_sum_beside_an_axis_of_size_1():
    """XLA on CPU takes thirty times as long for one."""

    def loss(weight, bias, x):
        return ops.causal_conv1d(x, weight, bias)[0].sum()

    x, weight = jnp.ones((1, 60, 3)), jnp.ones((4, 3))
    jaxpr = str(jax.make_jaxpr(jax.grad(loss, (0, 1)))(weight, weight[0], x))
    sums = re.findall(r":f32\[([\d,]*)\] = reduce_sum\[\s*axes=\(([^)]*)\)", jaxpr)
    assert [result for result, axes in sums if axes == "0,"] == ["3"] * 5, sums  # four taps and the bias
    assert len(sums) == 6, sums  # and the loss
