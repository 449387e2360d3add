"""The Triton kernels in Triton's interpreter, against the float64 recurrence: values, states, gradients."""

import jax
import pytest

# before anything else of triton: it reads the environment when it is imported
pytest.importorskip("triton_interpreter", reason="the Triton kernels need triton")
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import reference
import triton_interpreter
from jax.sharding import PartitionSpec
from mamba2_jax.pallas.triton_gpu import call as triton_call
from mamba2_jax.pallas.triton_gpu import scan as triton_gpu
from ssd_cases import MIXTURES, Case, degenerate, draw
from ssd_mixtures import errors, prepare, results

from mamba2_jax.ops import ssd as public_ssd
from mamba2_jax.ops.scan import dispatch

pytestmark = pytest.mark.skipif(jax.__version_info__ < (0, 11, 2), reason="the kernels need jax >= 0.11.2")

# float32 rounding of a few hundred products; at strong decay, of values, also of exponents, differences of
# sums near -1000, where one unit in the last place is 6e-5: but pairs so far apart weigh little. float16 has
# 11 bits.
TOLERANCE = {"float32": 3e-6, "strong": 1e-5, "float16": 2e-3}
small = partial(Case, b=1, h=2, g=1, p=16, n=16, l=40)
CASES = [
    small("plain", D=None, initial_state=False),
    small("one token", l=1),
    small("two tokens, groups", l=2, h=4, g=2, D="hp"),
    small("whole chunks", l=64),
    small("one over", l=33, b=2),
    small("D per channel, wide state", D="hp", n=64),
    small("sizes that are padded", p=24, n=20, l=40),
    small("two blocks of channels", p=128, h=1, l=40),
    small("strong decay", decay=60.0),
    small("packed", segments="packed", b=2),
    small("packed, repeating ids", segments="repeating", b=2),
    small("left padding", segments="left", b=2),
    small("right padding", segments="right"),
    small("all padding", segments="none", b=2, l=40),
    small("packed, strong decay", segments="packed", decay=60.0),
]
WITH_GRADIENTS = ["one over", "two blocks of channels", "strong decay", "packed", "two tokens, groups"]
WITH_GRADIENTS += ["sizes that are padded", "packed, strong decay"]


@pytest.fixture(autouse=True)
def interpreted(monkeypatch):
    """Launches run in the interpreter, and the dispatch believes that an A100 with all it needs is here."""
    monkeypatch.setattr(triton_call, "launch", triton_interpreter.launch)
    monkeypatch.setattr(triton_call, "missing", lambda: None)
    a100 = SimpleNamespace(platform="gpu", compute_capability="8.0")
    monkeypatch.setattr(dispatch, "default_device", lambda: a100)


def ssd(inputs):
    return public_ssd(**inputs, implementation="triton")


def error(got, want):
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    assert np.isfinite(got).all()
    return np.linalg.norm(got - want) / max(np.linalg.norm(want), 1e-30)


def valid_rows(inputs):
    ids = inputs.get("segment_ids")
    return np.ones(inputs["x"].shape[:2], bool) if ids is None else np.asarray(ids) != 0


def tolerance(case):
    return TOLERANCE["strong" if case.decay > 1 else "float32"]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_values_equal_the_recurrence(case):
    inputs = draw(case)
    want_y, want_state = reference.ssd(**inputs)
    y, state = ssd(inputs)
    valid = valid_rows(inputs)
    assert np.isfinite(np.asarray(y)).all()
    assert error(np.asarray(y)[valid], want_y[valid]) < tolerance(case)
    assert error(state, want_state) < tolerance(case)


def gradients(run, inputs, cotangents):
    """Of every array, with cotangents for y and the state."""
    ids = {name: inputs[name] for name in ("segment_ids",) if name in inputs}
    arrays = {name: value for name, value in inputs.items() if name not in ids}

    def loss(arrays):
        y, state = run({**arrays, **ids})
        dy, dstate = (jnp.asarray(c, y.dtype) for c in cotangents)
        return (y * dy).astype(state.dtype).sum() + (state * dstate.astype(state.dtype)).sum()

    return jax.grad(loss)(arrays)


def check_gradients(case, got_from=ssd):
    inputs = draw(case, seed=1)
    shapes = inputs["x"].shape, (case.b, case.h, case.p, case.n)
    dy, dstate = (np.random.default_rng(0).normal(size=shape) for shape in shapes)
    dy *= valid_rows(inputs)[..., None, None]
    with jax.enable_x64(True):
        exact = {k: v if k == "segment_ids" else v.astype(jnp.float64) for k, v in inputs.items()}
        recurrence = jax.jit(lambda inputs: public_ssd(**inputs, implementation="recurrent"))
        want = gradients(recurrence, exact, (dy, dstate))
    got = gradients(got_from, inputs, (dy, dstate))
    assert got.keys() == want.keys()
    for name in want:
        assert error(got[name], want[name]) < tolerance(case), name


@pytest.mark.parametrize("case", [c for c in CASES if c.name in WITH_GRADIENTS], ids=str)
def test_every_gradient_equals_the_float64_recurrence(case):
    check_gradients(case)


@pytest.mark.parametrize("case", MIXTURES, ids=str)
def test_every_token_of_a_mixture_of_decays_is_right_at_its_own_scale(case):
    case = replace(case, l=75, h=2, g=1, p=16)
    inputs, want, of_recurrence = prepare(case)
    for part, allowed in zip(errors(results(*inputs, "triton"), want), of_recurrence, strict=True):
        for name, error in part.items():
            assert error < max(1e-5, 3 * allowed[name]), name


def test_steps_and_A_without_bounds_give_finite_numbers():
    inputs = degenerate(small("degenerate", h=4, g=2))
    weights = [jnp.ones_like(inputs[name]) for name in ("x", "initial_state")]
    want, got = (results(inputs, None, weights, name) for name in ("recurrent", "triton"))
    for part, others in zip(got, want, strict=True):
        for name, array in part.items():
            assert np.isfinite(array).all(), name
            assert error(array, others[name]) < TOLERANCE["strong"], name


@pytest.mark.parametrize("segments", [None, "packed"])
def test_rows_cut_into_pieces_are_the_same(segments, monkeypatch):
    monkeypatch.setattr(triton_gpu, "num_pieces", lambda *_: 3)
    case = small("pieces", l=90, segments=segments)
    inputs = draw(case)
    want_y, want_state = reference.ssd(**inputs)
    y, state = ssd(inputs)
    valid = valid_rows(inputs)
    assert error(np.asarray(y)[valid], want_y[valid]) < TOLERANCE["float32"]
    assert error(state, want_state) < TOLERANCE["float32"]
    check_gradients(case)


def test_how_many_pieces():
    assert triton_gpu.num_pieces(8, 80, 64) == 1  # enough rows and heads
    assert triton_gpu.num_pieces(1, 80, 4096) == 4
    assert triton_gpu.num_pieces(1, 24, 64) == 8  # short pieces would not pay
    assert triton_gpu.num_pieces(1, 1, 3) == 1


def test_float16_operands_keep_a_float32_state():
    inputs = draw(small("float16", n=64), dtype=jnp.float16)
    want_y, want_state = reference.ssd(**inputs)
    y, state = ssd(inputs)
    assert y.dtype == jnp.float16
    assert state.dtype == jnp.float32
    assert error(y, want_y) < TOLERANCE["float16"]
    assert error(state, want_state) < TOLERANCE["float16"]


def test_gradients_in_float16():
    inputs = draw(small("float16", l=70, n=64), dtype=jnp.float16)
    inputs["B"] = inputs["B"] / 8
    cotangents = [np.random.default_rng(0).normal(size=inputs[name].shape) for name in ("x", "initial_state")]
    with jax.enable_x64(True):
        exact = {name: array.astype(jnp.float64) for name, array in inputs.items()}
        recurrence = jax.jit(lambda inputs: public_ssd(**inputs, implementation="recurrent"))
        rounded = [np.asarray(jnp.asarray(c, jnp.float16), np.float64) for c in cotangents]
        want = gradients(recurrence, exact, rounded)
    got = gradients(ssd, inputs, cotangents)
    for name in want:
        assert got[name].dtype == inputs[name].dtype
        assert error(got[name], want[name]) < 2 * TOLERANCE["float16"], name


def test_the_same_bits_every_time():
    inputs = draw(small("packed", segments="packed"))
    cotangents = [np.ones(s) for s in (inputs["x"].shape, inputs["initial_state"].shape)]
    first, second = (gradients(ssd, inputs, cotangents) for _ in range(2))
    for name in first:
        np.testing.assert_array_equal(first[name], second[name])


def test_under_jit_remat_scan_and_vmap_over_a_batch():
    inputs = draw(small("row", l=40, D="h"))
    mapped = ("x", "dt", "B", "C", "initial_state")

    def loss(row, shared):
        y, state = ssd({**row, **shared})
        return jnp.square(y).sum() + jnp.square(state).sum()

    row = {name: inputs[name] for name in mapped}
    shared = {name: inputs[name] for name in ("A", "D")}
    want, want_gradient = jax.value_and_grad(loss)(row, shared)
    rows = jax.tree.map(lambda a: jnp.stack([a, a]), row)

    value_and_gradient = jax.value_and_grad(jax.checkpoint(loss))
    over_rows = jax.jit(jax.vmap(value_and_gradient, in_axes=(0, None)))
    got, gradient = over_rows(rows, shared)
    np.testing.assert_allclose(got, [want, want], rtol=1e-6)
    for name in mapped:
        assert error(gradient[name][1], want_gradient[name]) < 1e-6, name

    _, (scanned, gradient) = jax.lax.scan(lambda c, r: (c, value_and_gradient(r, shared)), 0, rows)
    np.testing.assert_allclose(scanned, [want, want], rtol=1e-6)
    assert error(gradient["dt"][0], want_gradient["dt"]) < 1e-6


def test_vmap_over_what_rows_share_runs_once_per_entry():
    inputs = draw(small("row", l=40))
    A = jnp.stack([inputs["A"], 2 * inputs["A"]])
    y, _ = jax.vmap(lambda A: ssd({**inputs, "A": A}))(A)
    assert error(y[1], reference.ssd(**{**inputs, "A": A[1]})[0]) < TOLERANCE["float32"]


@pytest.mark.parametrize("check_vma", [False, True])
def test_inside_shard_map(check_vma):
    """As the layers call it, unchecked: values and gradients. Checked, it says what to do."""
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    rows, everywhere = PartitionSpec("data"), PartitionSpec()
    inputs = draw(small("rows", b=2, l=40))
    specs = {name: everywhere if name in ("A", "D") else rows for name in inputs}
    sharded = jax.shard_map(ssd, mesh=mesh, in_specs=(specs,), out_specs=(rows, rows), check_vma=check_vma)
    if check_vma:
        with pytest.raises(NotImplementedError, match="implementation='triton'.*check_vma=False"):
            jax.eval_shape(sharded, inputs)
        return
    want_y, want_state = reference.ssd(**inputs)
    y, state = sharded(inputs)
    assert error(y, want_y) < TOLERANCE["float32"]
    assert error(state, want_state) < TOLERANCE["float32"]
    cotangents = [np.ones(array.shape) for array in (y, state)]
    want = gradients(ssd, inputs, cotangents)
    for name, gradient in jax.jit(lambda inputs: gradients(sharded, inputs, cotangents))(inputs).items():
        assert error(gradient, want[name]) < 1e-6, name
