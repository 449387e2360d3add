"""Test `ssd_step` of every implementation against the float64 recurrence: values, states, all gradients."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from ssd_cases import STEP_CASES, Case, draw_token

from mamba2_jax import ops

IMPLEMENTATIONS = ["xla"]
GOOD = Case("good")
run = jax.jit(ops.ssd_step, static_argnames="implementation")
# float32: as for the scan. Half precision: inputs are exact, sums float32, and results rounded once.
TOLERANCE = {"float32": 3e-6, "float16": 2**-11, "bfloat16": 2**-8}
every_implementation = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)


def error(got, want):
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    assert np.isfinite(got).all()
    return np.linalg.norm(got - want) / max(np.linalg.norm(want), 1e-30)


def as_a_row(x, dt, A, B, C, state, D=None):
    """Convert arguments of `ops.ssd_step` to those of `ops.ssd`, with a length of 1."""
    row = {"x": x[:, None], "dt": dt[:, None], "A": A, "B": B[:, None], "C": C[:, None]}
    return row | {"initial_state": state} | ({} if D is None else {"D": D})


@every_implementation
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("case", STEP_CASES, ids=str)
def test_values_equal_the_numpy_recurrence(case, dtype, implementation):
    token = draw_token(case, dtype=jnp.dtype(dtype))
    want_y, want_state = reference.ssd(**as_a_row(**token))
    y, state = run(**token, implementation=implementation)
    assert y.dtype == dtype
    assert state.dtype == jnp.float32
    assert error(y, want_y[:, 0]) < TOLERANCE[dtype]
    assert error(state, want_state) < TOLERANCE["float32"]
    if case.segments:
        np.testing.assert_array_equal(state[0], token["state"][0])


@every_implementation
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("case", STEP_CASES, ids=str)
def test_every_gradient_equals_the_float64_recurrence(case, dtype, implementation):
    token = draw_token(case, seed=1, dtype=jnp.dtype(dtype))
    weights = np.random.default_rng(0).normal(size=token["x"].shape)

    def loss(step, full, token):
        y, state = step(**token)
        return (y.astype(full) * weights.astype(full)).sum() + jnp.square(state).sum()

    def recurrence(**token):
        y, state = ops.ssd(**as_a_row(**token), implementation="recurrent")
        return y[:, 0], state

    got = jax.jit(jax.grad(partial(loss, partial(run, implementation=implementation), jnp.float32)))(token)
    with jax.enable_x64(True):
        exact = jax.tree.map(lambda a: a.astype(jnp.float64), token)
        want = jax.jit(jax.grad(partial(loss, recurrence, jnp.float64)))(exact)
    for name in want:
        assert got[name].dtype == token[name].dtype
        # The gradient that enters is rounded to the dtype of y; dA and dD sum over the batch and cancel.
        assert error(got[name], want[name]) < 2 * TOLERANCE[dtype], name


@every_implementation
def test_a_state_keeps_its_dtype(implementation):
    token = draw_token(GOOD)
    _, want = run(**token, implementation=implementation)
    token["state"] = token["state"].astype(jnp.bfloat16)
    _, state = run(**token, implementation=implementation)
    assert state.dtype == jnp.bfloat16
    assert error(state, want) < 2 * TOLERANCE["bfloat16"]  # rounded before and after


@every_implementation
def test_a_step_under_vmap(implementation):
    token = draw_token(GOOD)
    want, _ = run(**token, implementation=implementation)
    shared = {name: token.pop(name) for name in ("A", "D")}
    rows = jax.tree.map(lambda a: a[:, None], token)
    y, _ = jax.vmap(lambda row: run(**row, **shared, implementation=implementation))(rows)
    assert error(y[:, 0], want) < TOLERANCE["float32"]


BAD = {
    "rank of x": ({"x": jnp.ones((2, 4))}, r"x has rank 2"),
    "integers": ({"x": jnp.ones((2, 4, 8), jnp.int32)}, r"x is int32"),
    "dt shape": ({"dt": jnp.ones((2, 5))}, r"dt has shape \(2, 5\), wants \(b=2, h=4\)"),
    "groups": ({"B": jnp.ones((2, 3, 16)), "C": jnp.ones((2, 3, 16))}, r".*a multiple of num_groups=3"),
    "C": ({"C": jnp.ones((2, 2, 8))}, r"C has shape"),
    "D": ({"D": jnp.ones((4, 3))}, r"D has shape"),
    "integer D": ({"D": jnp.ones(4, jnp.int32)}, r"D is int32"),
    "state": ({"state": jnp.ones((2, 4, 8, 15))}, r"state has shape"),
    "implementation": ({"implementation": "cuda"}, r"implementation='cuda' is not one of"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments_are_named(name):
    change, message = BAD[name]
    with pytest.raises(ValueError, match=f"^ssd_step: {message}"):
        ops.ssd_step(**{**draw_token(GOOD), **change})


@pytest.mark.parametrize("name", ["recurrent", "mosaic_gpu", "triton"])
def test_one_named_that_has_no_step_is_an_error_not_a_fallback(name):
    with pytest.raises(NotImplementedError, match=f"^ssd_step: .*{name}.*use implementation='xla'"):
        ops.ssd_step(**draw_token(GOOD), implementation=name)
