"""Test XLA's behaviors on a CPU and the workaround for each; a failure means a workaround is obsolete."""

import timeit

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mamba2_jax.ops.linear import linear
from mamba2_jax.ops.on_cpu.gradients import for_every, product
from mamba2_jax.ops.on_cpu.products import contract_last, embedding_lookup, entry
from mamba2_jax.ops.quantized import QuantizedWeight, quantized_product
from mamba2_jax.training.on_cpu import choose_update, recomputed
from mamba2_jax.weight_types import WEIGHT_TYPES

pytestmark = pytest.mark.xla_habits


def compiled(function, *arguments, **options):
    return jax.jit(function, **options).lower(*arguments).compile()


def temporary_bytes(function, *arguments, **options):
    return compiled(function, *arguments, **options).memory_analysis().temp_size_in_bytes


def test_a_matrix_vector_product_keeps_a_float32_copy_of_the_weights_beside_a_loop():
    x, weight = jnp.ones((1, 512), jnp.bfloat16), jnp.ones((512, 512), jnp.bfloat16)

    def decode(multiply):
        return lambda x, weight: jax.lax.fori_loop(0, 5, lambda _, x: multiply(x, weight), x)

    assert temporary_bytes(decode(lambda x, weight: x @ weight), x, weight) > 1.9 * weight.nbytes
    ours = decode(lambda x, weight: linear(x, weight, dtype=x.dtype).astype(x.dtype))
    assert temporary_bytes(ours, x, weight) < weight.nbytes / 10


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_a_quantized_matrix_is_dequantized_in_blocks_also_beside_a_loop(kind):
    rows = np.random.default_rng(0).standard_normal((1024, 1024)).astype(np.float32)
    weight = QuantizedWeight(*map(jnp.asarray, WEIGHT_TYPES[kind].quantize(rows)), False)

    def decode(multiply):
        return lambda x, weight: jax.lax.fori_loop(0, 5, lambda _, x: multiply(x, weight), x)

    def ours(x, weight):
        return quantized_product(x, weight, dtype=x.dtype).astype(x.dtype)

    x = jnp.ones((1, 1024), jnp.bfloat16)
    whole = decode(lambda x, weight: x @ weight.astype(x.dtype).T)
    assert temporary_bytes(whole, x, weight) > 0.9 * 2 * rows.size  # a copy in bfloat16 at least
    assert temporary_bytes(decode(ours), x, weight) < rows.nbytes / 16
    # With many rows, and in the backward pass: less than a copy in 8 bits, beside the rows themselves.
    x = jnp.ones((64, 1024), jnp.bfloat16)
    both = jax.grad(lambda x, weight: ours(x, weight).sum())
    assert temporary_bytes(both, x, weight) < rows.size + 6 * x.nbytes


def test_a_look_up_keeps_a_float32_copy_of_the_table_beside_a_loop():
    table = jnp.ones((4096, 64), jnp.bfloat16)

    def decode(look_up):
        def step(table, ids):
            return (ids + look_up(table, ids).astype(jnp.float32).sum(-1).astype(ids.dtype)) % len(table)

        return lambda table, ids: jax.lax.fori_loop(0, 5, lambda _, ids: step(table, ids), ids)

    ids = jnp.arange(3)
    assert temporary_bytes(decode(lambda table, ids: table[ids]), table, ids) > 1.9 * table.nbytes
    assert temporary_bytes(decode(embedding_lookup), table, ids) < table.nbytes / 10


def test_a_slice_keeps_a_float32_copy_of_the_array_beside_a_loop():
    weight = jnp.ones((16, 64, 64), jnp.bfloat16)

    def run(take):
        def step(i, x, weight):
            y = jnp.einsum("sd,md->sm", x, take(weight, i), preferred_element_type=jnp.float32)
            return y.astype(x.dtype)

        return lambda x, weight, n: jax.lax.fori_loop(0, n, lambda i, x: step(i, x, weight), x)

    x = jnp.ones((4, 64), jnp.bfloat16)
    assert temporary_bytes(run(lambda weight, i: weight[i]), x, weight, 5) > 1.9 * weight.nbytes
    assert temporary_bytes(run(entry), x, weight, 5) < weight.nbytes / 2


def test_a_product_over_the_rows_widens_half_precision():
    a, b = jnp.ones((64, 32), jnp.bfloat16), jnp.ones((64, 48), jnp.bfloat16)

    def widened(rewrite):
        def gradient(a, b):
            formula, a, b = rewrite("rd,re->de", a, b)
            return jnp.einsum(formula, a, b, preferred_element_type=jnp.float32)

        return "f32[64,32]" in compiled(gradient, a, b).as_text()

    assert widened(lambda *same: same)
    assert not widened(contract_last)


def test_merged_reshapes_slow_a_transpose_down(monkeypatch):
    """A transpose without the barrier takes twenty times as long; the HLO differs in one bitcast only."""
    x = jnp.ones((8, 128, 1024), jnp.bfloat16)

    def transpose(x):
        return contract_last("rd,re->de", x.reshape(-1, x.shape[2]), jnp.ones((1024, 1), x.dtype))[1]

    ours = compiled(transpose, x)
    monkeypatch.setattr(jax.lax, "optimization_barrier", lambda array: array)
    merged = compiled(lambda x: transpose(x), x)  # another function, which is traced again

    def seconds(run):  # the fastest, because others use the processor too
        return min(timeit.repeat(lambda: run(x).block_until_ready(), number=1, repeat=20))

    assert seconds(merged) > 3 * seconds(ours)


def test_half_precision_has_no_gradient_by_a_weight_of_several_axes(monkeypatch):
    """A gradient by rows and weight fails without `as_matrix`."""
    x, weight = jnp.ones((64, 32), jnp.bfloat16), jnp.ones((32, 2, 48))

    def gradient():
        run = jax.grad(lambda x, weight: jnp.sin(linear(x, weight, dtype=x.dtype)).sum(), (0, 1))
        return jax.block_until_ready(jax.jit(run)(x, weight))

    assert jnp.isfinite(gradient()[1]).all()
    monkeypatch.setattr("mamba2_jax.ops.linear.as_matrix", lambda weight: weight)
    with pytest.raises(jax.errors.JaxRuntimeError, match="BF16 x BF16 = F32"):
        gradient()


def test_a_sum_over_a_repeated_axis_calls_a_library():
    def called(expand):
        def gradient(ct):
            return jax.vjp(expand, jnp.ones((16, 32)))[1](jnp.sin(ct))

        return "ynn_fusion" in compiled(gradient, jnp.ones((64, 16, 32))).as_text()

    assert called(lambda array: jnp.broadcast_to(array, (64, 16, 32)))
    assert not called(lambda array: for_every((64,), array))


def test_jax_transposes_a_products_gradient():
    a, b = jnp.ones((2, 5, 7)), jnp.ones((2, 7, 3))

    def transpositions(einsum):
        gradient = jax.grad(lambda a, b: (einsum("bqn,bnk->bqk", a, b) ** 2).sum(), (0, 1))
        return str(jax.make_jaxpr(gradient)(a, b)).count("transpose[")

    assert transpositions(jnp.einsum) > 0
    assert transpositions(product) == 0


def test_what_is_computed_again_for_the_gradient_is_kept_from_the_first_time():
    weights = [jnp.ones((64, 64)) for _ in range(4)]

    def block(x, weight):
        for _ in range(6):
            x = jnp.sin(x @ weight)
        return x

    def gradient(wrap):
        def loss(x, weights):
            for weight in weights:
                x = wrap(block)(x, weight)
            return x.sum()

        return temporary_bytes(jax.grad(loss, (0, 1)), jnp.ones((2048, 64)), weights)

    kept = gradient(lambda block: block)
    assert gradient(jax.checkpoint) > 0.9 * kept
    assert gradient(recomputed) < 0.6 * kept


def test_to_choose_between_old_and_new_arrays_copies_them():
    optimizer = optax.adam(1e-3)
    params = {"a": jnp.ones(2**18), "b": jnp.ones(2**18)}

    def step(in_place):
        def run(old, x):
            gradients = jax.tree.map(lambda a: x * jnp.sin(a), old[0])
            finite = jnp.isfinite(optax.tree.norm(gradients))

            def update(params, moments):
                updates, moments = optimizer.update(gradients, moments, params)
                return optax.apply_updates(params, updates), moments

            return choose_update(finite, update, old, in_place=in_place)

        return temporary_bytes(run, (params, optimizer.init(params)), np.float32(1), donate_argnums=0)

    gradients = 2 * 2**20
    assert step(in_place=True) < 1.1 * gradients < 1.9 * gradients < step(in_place=False)
