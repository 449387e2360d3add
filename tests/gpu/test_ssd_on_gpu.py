"""What can run on this GPU, as it runs there, against the recurrence in float64."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from ssd_cases import Case, draw

from mamba2_jax import ops
from mamba2_jax.ops.scan import dispatch

pytestmark = pytest.mark.gpu

IMPLEMENTATIONS = ("xla", "mosaic_gpu", "triton")
# bfloat16: operands and weights are rounded to 2**-9. float16: to 2**-12. float32: Triton takes three TF32
# products for one, which gives float32's own accuracy; XLA takes one unless told otherwise (2**-11).
TOLERANCE = {"bfloat16": 1e-2, "float16": 2e-3, "float32": 1e-5}
XLA_FLOAT32 = 2e-3
# Sums over all tokens of a row that partly cancel.
CANCEL = {"dt": 3, "A": 3, "D": 3}
BASE = Case("base", b=2, l=328, h=4, p=64, g=2, n=128, decay=0.5)


def case(name, **changes):
    return dataclasses.replace(BASE, name=name, **changes)


CASES = [
    (case("groups"), "bfloat16"),
    (case("float16"), "float16"),
    (case("float32", l=150), "float32"),
    (case("three heads in a group, odd length", b=1, l=203, h=3, g=1), "bfloat16"),
    (case("five groups of one head", b=1, l=130, h=5, g=5), "bfloat16"),
    (case("one token", l=1), "bfloat16"),
    (case("shorter than a chunk", l=11, D=None, initial_state=False), "bfloat16"),
    (case("whole chunks", l=512), "bfloat16"),
    (case("long, cut into pieces", b=1, l=1500, h=2, g=1), "bfloat16"),
    (case("head_dim 128, D per channel", p=128, D="hp"), "bfloat16"),
    (case("state_dim 64", n=64), "bfloat16"),
    (case("state_dim 256", n=256, l=200), "bfloat16"),
    (case("state_dim 256, head_dim 128, packed", b=1, n=256, p=128, segments="packed"), "bfloat16"),
    (case("strong decay", decay=60.0), "bfloat16"),
    (case("packed", segments="packed"), "bfloat16"),
    (case("packed, repeating ids", segments="repeating"), "float16"),
    (case("packed, strong decay", segments="packed", decay=60.0), "bfloat16"),
    (case("left padding", segments="left"), "bfloat16"),
    (case("right padding", segments="right"), "bfloat16"),
    (case("all padding", l=75, segments="none"), "bfloat16"),
]


def inputs_of(case, dtype):
    inputs = draw(case, dtype=jnp.dtype(dtype))
    return inputs | {"B": inputs["B"] / case.n**0.5}


def skip_unless_it_runs(implementation, inputs):
    if implementation != "xla":
        sizes = (*inputs["x"].shape, *inputs["B"].shape[2:])
        problem = dispatch.describe(inputs["x"].dtype, *sizes, D_per_channel=np.ndim(inputs.get("D")) == 2)
        if (reason := dispatch.kernels("ssd")[implementation].unsupported(problem)) is not None:
            pytest.skip(f"{implementation}: {reason}")


def tolerance(dtype, implementation):
    return XLA_FLOAT32 if (dtype, implementation) == ("float32", "xla") else TOLERANCE[dtype]


def error(got, want):
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    assert np.isfinite(got).all()
    return np.linalg.norm(got - want) / max(np.linalg.norm(want), 1e-30)


def valid_tokens(inputs):
    ids = inputs.get("segment_ids")
    return np.ones(inputs["x"].shape[:2], bool) if ids is None else np.asarray(ids) != 0


@functools.partial(jax.jit, static_argnames="implementation")
def run(arrays, implementation):
    return ops.ssd(**arrays, implementation=implementation)


@functools.partial(jax.jit, static_argnames="implementation")
def gradients(arrays, segment_ids, cotangents, implementation):
    scan = functools.partial(ops.ssd, segment_ids=segment_ids, implementation=implementation)
    return jax.vjp(lambda arrays: scan(**arrays), arrays)[1](cotangents)[0]


def split_off_ids(inputs):
    return {name: array for name, array in inputs.items() if name != "segment_ids"}, inputs.get("segment_ids")


def cotangents_of(inputs):
    x, valid = inputs["x"], valid_tokens(inputs)
    rng = np.random.default_rng(0)
    dy = rng.normal(size=x.shape) * valid[..., None, None]
    dstate = rng.normal(size=(x.shape[0], *x.shape[2:], inputs["B"].shape[3]))
    return jnp.asarray(dy, x.dtype), jnp.asarray(dstate, jnp.float32)


def exact_gradients(inputs, cotangents):
    """Gradients of the recurrence, in float64 on the CPU."""
    host = jax.tree.map(np.asarray, (inputs, cotangents))
    with jax.enable_x64(True), jax.default_device(jax.devices("cpu")[0]):
        inputs, cotangents = jax.tree.map(
            lambda a: jnp.asarray(a, None if np.issubdtype(a.dtype, np.integer) else np.float64), host
        )
        arrays, ids = split_off_ids(inputs)
        return jax.tree.map(np.asarray, gradients(arrays, ids, cotangents, "recurrent"))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(("case", "dtype"), [pytest.param(*each, id=str(each[0])) for each in CASES])
def test_values_equal_the_float64_recurrence(case, dtype, implementation):
    inputs = inputs_of(case, dtype)
    skip_unless_it_runs(implementation, inputs)
    y, state = run(inputs, implementation)
    want_y, want_state = reference.ssd(**inputs)
    valid = valid_tokens(inputs)
    assert y.dtype == inputs["x"].dtype
    assert state.dtype == jnp.float32
    assert error(np.asarray(y, np.float64)[valid], want_y[valid]) < tolerance(dtype, implementation)
    assert error(state, want_state) < tolerance(dtype, implementation)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(("case", "dtype"), [pytest.param(*each, id=str(each[0])) for each in CASES])
def test_every_gradient_equals_the_float64_recurrence(case, dtype, implementation):
    inputs = inputs_of(case, dtype)
    skip_unless_it_runs(implementation, inputs)
    cotangents = cotangents_of(inputs)
    arrays, ids = split_off_ids(inputs)
    got = gradients(arrays, ids, cotangents, implementation)
    want = exact_gradients(inputs, cotangents)
    assert set(got) == set(want) == set(arrays)
    for name in want:
        assert got[name].dtype == arrays[name].dtype
        assert error(got[name], want[name]) < tolerance(dtype, implementation) * CANCEL.get(name, 1), name


@pytest.mark.parametrize("implementation", ["mosaic_gpu", "triton"])
@pytest.mark.parametrize("length", [9, 64, 67, 130, 259])
def test_no_row_writes_into_the_next(length, implementation):
    """Tiles are clipped at the end of a row. Alone, a row may be cut otherwise: 16-bit roundings differ."""
    inputs = inputs_of(case("tail", b=3, l=length), "bfloat16")
    skip_unless_it_runs(implementation, inputs)
    cotangents = cotangents_of(inputs)
    together = run(inputs, implementation)
    gradients_together = gradients(inputs, None, cotangents, implementation)
    for row in range(3):
        alone = {k: v if k in ("A", "D") else v[row : row + 1] for k, v in inputs.items()}
        for got, want in zip(run(alone, implementation), together, strict=True):
            assert error(got[0], want[row]) < 4e-3
        got = gradients(alone, None, tuple(each[row : row + 1] for each in cotangents), implementation)
        for name in ("x", "dt", "B", "C", "initial_state"):
            assert error(got[name][0], gradients_together[name][row]) < 4e-3, name


@pytest.mark.parametrize("implementation", ["mosaic_gpu", "triton"])
@pytest.mark.parametrize(("heads", "groups", "length"), [(32, 1, 2100), (128, 8, 1024), (2, 1, 4096)])
def test_the_same_inputs_give_the_same_bits(heads, groups, length, implementation):
    inputs = inputs_of(case("bits", b=1, l=length, h=heads, g=groups, segments="packed"), "bfloat16")
    skip_unless_it_runs(implementation, inputs)
    arrays, ids = split_off_ids(inputs)
    cotangents = cotangents_of(inputs)

    def once():
        outputs = run(inputs, implementation), gradients(arrays, ids, cotangents, implementation)
        return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(outputs)]

    first = once()
    for _ in range(4):
        assert once() == first


@pytest.mark.parametrize("implementation", ["mosaic_gpu", "triton"])
def test_what_is_chosen_unasked_is_what_the_table_says(implementation):
    inputs = inputs_of(BASE, "bfloat16")
    skip_unless_it_runs(implementation, inputs)
    capability = dispatch.compute_capability(dispatch.default_device())
    if capability not in dispatch.kernels("ssd")[implementation].automatic:
        pytest.skip(f"{implementation} is not taken unasked on this GPU")
    for got, want in zip(run(inputs, None), run(inputs, implementation), strict=True):
        np.testing.assert_array_equal(np.asarray(got, np.float32), np.asarray(want, np.float32))
