"""Quantized weights and their products against the dequantized matrix in float64."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import relative

from mamba2_jax.models.calibrate import quantize_by_gram
from mamba2_jax.ops import experts, quantized
from mamba2_jax.ops.linear import linear, vocabulary_logits, vocabulary_lookup
from mamba2_jax.ops.quantized import QuantizedWeight, quantized_product
from mamba2_jax.weight_types import WEIGHT_TYPES, dequantize

TYPES = sorted(WEIGHT_TYPES)
RNG = np.random.default_rng(0)
ROWS = RNG.standard_normal((40, 192)).astype(np.float32) * np.exp(RNG.standard_normal((40, 1)))
ROWS = ROWS.astype(np.float32)
ROWS[7] = 0
ROUNDING = {"float32": 1e-6, "bfloat16": 2**-7}  # sums in another order; operands with 8 bits


def quantize(kind: str, matrix=ROWS, rows_last: bool = False) -> QuantizedWeight:
    return QuantizedWeight(*map(jnp.asarray, WEIGHT_TYPES[kind].quantize(matrix)), rows_last)


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("width", [192, 48])
def test_every_number_gets_the_nearest_level(kind, width):
    own = WEIGHT_TYPES[kind]
    values, scales = own.quantize(ROWS[:, :width])
    step = np.repeat(np.abs(scales), width // scales.shape[1], axis=1)
    error = np.abs(dequantize(values, scales) - ROWS[:, :width])
    low, high = own.levels
    # A number beyond the outermost level, which only the side without the largest number can have, gets that.
    beyond = np.abs(ROWS[:, :width]) > (min(-low, high) + 0.5) * step
    assert (error <= np.where(beyond, 1.0, 0.5) * step * (1 + 1e-6)).all()
    assert (values[7] == own.quantize(np.zeros((1, width), np.float32))[0]).all()
    assert (dequantize(values, scales)[7] == 0).all()


@pytest.mark.parametrize("kind", TYPES)
def test_numpy_and_xla_quantize_to_the_same_bits(kind):
    for dtype in (np.float32, jnp.bfloat16):
        rows = RNG.standard_normal((64, 256)).astype(dtype)
        ours = WEIGHT_TYPES[kind].quantize(rows)
        for host, device in zip(ours, jax.jit(WEIGHT_TYPES[kind].quantize)(rows), strict=True):
            assert host.dtype == device.dtype
            assert np.array_equal(host, device)


def test_rows_that_groups_do_not_divide_are_refused():
    with pytest.raises(ValueError, match="rows of 40 numbers are not a multiple of 16.*use int8"):
        WEIGHT_TYPES["int4"].quantize(ROWS[:, :40])


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("dtype", sorted(ROUNDING))
@pytest.mark.parametrize("implementation", quantized.IMPLEMENTATIONS)
@pytest.mark.parametrize("platform", ["cpu", "gpu"])
def test_a_product_is_that_of_the_dequantized_matrix(kind, dtype, implementation, platform, monkeypatch):
    monkeypatch.setattr(quantized, "platform", lambda: platform)
    monkeypatch.setattr(quantized, "_SMALL_BLOCK", 192 * 16)  # two blocks, and a shorter one
    weight, run = quantize(kind), partial(quantized_product, dtype=dtype, implementation=implementation)
    exact = np.asarray(dequantize(weight.values, weight.scales), np.float64)
    for count in (1, 5):
        x = jnp.asarray(RNG.standard_normal((count, 192)), dtype)
        dy = jnp.asarray(RNG.standard_normal((count, 40)), jnp.float32)
        y, pullback = jax.vjp(lambda x: run(x, weight), x)
        assert y.dtype == jnp.float32
        assert relative(y, np.asarray(x, np.float64) @ exact.T) < ROUNDING[dtype]
        (dx,) = pullback(dy)
        assert dx.dtype == x.dtype
        assert relative(dx, np.asarray(dy, np.float64) @ exact) < ROUNDING[dtype]
        tangent = jax.jvp(lambda x: run(x, weight), (x,), (2 * x,))[1]
        assert relative(tangent, 2 * np.asarray(y)) < ROUNDING[dtype]
        batched = jax.vmap(lambda row: run(row[None], weight)[0])(x)
        assert relative(batched, y) < ROUNDING[dtype]


def test_it_goes_through_linear_the_head_and_the_embedding():
    matrix = np.moveaxis(ROWS.reshape(2, 20, 192), -1, 0)  # (d, 2, m), as a projection has it
    weight = quantize("int4", ROWS.reshape(2, 20, 192), rows_last=True)
    assert weight.shape == matrix.shape
    full = weight.astype(jnp.float32)
    assert relative(full, matrix) < 0.1
    x, bias = jnp.asarray(RNG.standard_normal((2, 3, 192)), jnp.float32), jnp.ones((2, 20))
    want = linear(x, full, bias, dtype=jnp.float32)
    assert relative(linear(x, weight, bias, dtype=jnp.float32), want) < 1e-6
    table = quantize("int8")
    full = table.astype(jnp.float32)
    want = vocabulary_logits(x, full, dtype=jnp.float32)
    assert relative(vocabulary_logits(x, table, dtype=jnp.float32), want) < 1e-6
    ids = jnp.array([[3, 39], [0, 3]])
    assert np.array_equal(vocabulary_lookup(table, ids), full[ids])


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("activation", ["silu_gated", "relu2"])
def test_experts_are_those_of_the_dequantized_matrices(kind, activation):
    pair = (2,) if activation == "silu_gated" else ()
    up = quantize(kind, RNG.standard_normal((4, *pair, 32, 64)).astype(np.float32) / 8)
    down = quantize(kind, RNG.standard_normal((4, 64, 32)).astype(np.float32) / 6)
    ids = jnp.asarray(RNG.permuted(np.tile(np.arange(4), (9, 1)), axis=1)[:, :2])
    x, gates, dy = (jnp.asarray(RNG.standard_normal((9, size)), jnp.float32) for size in (64, 2, 64))
    run = partial(experts, activation=activation, dtype=jnp.float32)

    def value_and_gradients(up, down):
        y, pullback = jax.vjp(lambda x, gates: run(x, up, down, ids, gates), x, gates)
        return y, pullback(dy)

    got = value_and_gradients(up, down)
    want = value_and_gradients(*(weight.astype(jnp.float32) for weight in (up, down)))
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert relative(one, other) < 3e-6
    with pytest.raises(ValueError, match="has no form for quantized"):
        run(x, up, down, ids, gates, implementation="ragged_dot")
    with pytest.raises(ValueError, match="quantize both"):
        run(x, up, down.astype(jnp.float32), ids, gates)


def test_wrong_arguments_are_named():
    weight = quantize("int8")
    with pytest.raises(ValueError, match="x has shape .*contracts 192"):
        quantized_product(jnp.ones((1, 64)), weight, dtype=jnp.float32)
    with pytest.raises(ValueError, match="implementation='fast'"):
        quantized_product(jnp.ones((1, 192)), weight, dtype=jnp.float32, implementation="fast")


@pytest.mark.parametrize("kind", TYPES)
def test_rounding_by_the_inputs_of_a_text_keeps_the_outputs(kind):
    own = WEIGHT_TYPES[kind]
    inputs = RNG.standard_normal((400, 24)) @ RNG.standard_normal((24, 192)) + 0.1 * RNG.standard_normal(
        (400, 192)
    )
    rows = jnp.asarray(RNG.standard_normal((40, 192)), jnp.float32)

    def error(values, scales):
        return np.linalg.norm(inputs @ (np.asarray(dequantize(values, scales)) - np.asarray(rows)).T)

    by_gram = quantize_by_gram(rows, jnp.asarray(inputs.T @ inputs, jnp.float32), own)
    assert [one.shape for one in by_gram] == [one.shape for one in own.quantize(rows)]
    assert error(*by_gram) < 0.6 * error(*own.quantize(rows))
    # Inputs that are independent of one another cannot make up for an error.
    for one, other in zip(quantize_by_gram(rows, jnp.eye(192), own), own.quantize(rows), strict=True):
        assert np.array_equal(one, other)
