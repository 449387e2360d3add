"""Test the scan where tokens that wipe the state are mixed with slow ones, and for unbounded dt and A."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from jax.test_util import check_grads
from ssd_cases import MIXTURES, Case, degenerate, own_error
from ssd_mixtures import assert_exact, results

from mamba2_jax import ops
from mamba2_jax.ops.scan.decay import log_decay, log_decays

DEGENERATE = Case("degenerate", l=70)
# Tolerance of a token where A is 0: y is a cancelling sum over a state that accumulated steps of 10000.
GATHERED = 1e-4


@pytest.mark.parametrize("chunk_size", [64, 256])
@pytest.mark.parametrize("case", MIXTURES, ids=str)
def test_every_token_is_right_at_its_own_scale(case, chunk_size):
    assert_exact(case, "xla", chunk_size)


@pytest.mark.parametrize("implementation", ["recurrent", "xla"])
def test_steps_and_A_without_bounds_give_finite_numbers(implementation):
    inputs = degenerate(DEGENERATE)
    weights = [jnp.ones_like(inputs[name]) for name in ("x", "initial_state")]
    (values, gradients) = results(inputs, None, weights, implementation)
    bounded = {**inputs, "A": jnp.maximum(inputs["A"], -1e30)}
    for name, want in zip(("y", "state"), reference.ssd(**bounded), strict=True):
        assert own_error(name, values[name], want) < GATHERED
    for name, gradient in gradients.items():
        assert np.isfinite(gradient).all(), name
    assert (gradients["A"][:2] == 0).all()


def test_steps_one_by_one_equal_the_scan_where_A_is_infinite():
    inputs = degenerate(DEGENERATE)
    y, state = ops.ssd(**inputs, implementation="xla")
    carried = inputs["initial_state"]
    for t in range(DEGENERATE.l):
        token = {name: inputs[name][:, t] for name in ("x", "dt", "B", "C")}
        y_t, after = ops.ssd_step(**token, A=inputs["A"], D=inputs["D"], state=carried)
        if t % 3 == 0:  # dt = 0
            np.testing.assert_array_equal(after, carried)
        assert own_error("y", y[:, t], y_t) < GATHERED
        carried = after
    assert own_error("state", state, carried) < 1e-5


@pytest.mark.parametrize("size", [1, 7, 64, 256])
@pytest.mark.parametrize("smallest", [1e-9, 1e-3])
def test_sums_of_decays_are_exact_and_never_positive(size, smallest):
    rng = np.random.default_rng(0)
    dt = np.float32(10 ** rng.uniform(np.log10(smallest), 3, (4, size)))
    a = log_decay(jnp.asarray(dt), jnp.float32(-1))
    got = jax.jit(log_decays)(a)
    sums = np.cumsum(np.asarray(a, np.float64), -1)
    between = np.minimum(sums[:, :, None] - sums[:, None, :], 0)
    for one, want in zip(got, (sums, sums[:, -1:] - sums, between), strict=True):
        assert (one <= 0).all()
        np.testing.assert_allclose(one, want, rtol=2e-7, atol=1e-7)


def test_derivatives_of_the_sums_of_decays():
    """First and second order, forward and reverse, against finite differences in float64."""
    with jax.enable_x64(True):
        a = -jax.random.uniform(jax.random.key(0), (2, 5), jnp.float64)

        def weigh(a):
            sums = log_decays(jnp.asarray(a))  # finite differences hand in numpy arrays
            lower = jnp.tril(jnp.exp(sums.between))
            return lower.sum(-1) + jnp.exp(sums.from_start) + jnp.exp(2 * sums.to_end)

        check_grads(weigh, (a,), order=2)
