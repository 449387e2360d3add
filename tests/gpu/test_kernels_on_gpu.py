"""The kernels on a real GPU, against the float64 recurrence: values, final state, every gradient.

Their fast paths cannot be run by an interpreter. `make gpu` runs this; elsewhere everything here is skipped.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ssd_cases import Case, draw

from mamba2_jax import ops
from mamba2_jax.ops import dispatch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs an NVIDIA GPU"),
]
# bfloat16 operands carry 8 bits, float16 11; float32 only in Triton, as three TF32 products
TOLERANCE = {"bfloat16": 1e-2, "float16": 3e-3, "float32": 1e-5}
CASES = [
    Case("one chunk", b=2, l=64, h=4, p=64, g=1, n=128),
    Case("odd length", b=2, l=203, h=4, p=64, g=2, n=128),
    Case("short", b=1, l=5, h=2, p=64, g=1, n=128),
    Case("long, few heads", b=1, l=2048, h=2, p=64, g=1, n=128),
    Case("no D, no state", b=1, l=256, h=8, p=64, g=1, n=64, D=None, initial_state=False),
    Case("wide heads, D per channel", b=1, l=130, h=2, p=128, g=1, n=128, D="hp"),
    Case("wide state", b=1, l=130, h=2, p=64, g=1, n=256),
    Case("strong decay", b=1, l=200, h=2, p=64, g=1, n=128, decay=60.0),
    Case("packed", b=2, l=203, h=4, p=64, g=2, n=128, segments="packed"),
    Case("repeating ids", b=2, l=203, h=4, p=64, g=2, n=128, segments="repeating"),
    Case("left padding", b=2, l=100, h=2, p=64, g=1, n=128, segments="left"),
    Case("right padding", b=2, l=100, h=2, p=64, g=1, n=128, segments="right"),
    Case("all padding", b=2, l=100, h=2, p=64, g=1, n=128, segments="none"),
]


def error(got, want):
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    assert np.isfinite(got).all()
    return np.linalg.norm(got - want) / max(np.linalg.norm(want), 1e-30)


def values_and_gradients(inputs, implementation, dy, dstate):
    ids = inputs.get("segment_ids")
    arrays = {name: value for name, value in inputs.items() if name != "segment_ids"}

    def run(arrays):
        return ops.ssd(**arrays, segment_ids=ids, implementation=implementation)

    (y, state), pull = jax.vjp(run, arrays)
    (gradients,) = pull((jnp.asarray(dy, y.dtype), jnp.asarray(dstate, state.dtype)))
    return {"y": y, "state": state, **{f"gradient of {name}": g for name, g in gradients.items()}}


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("kernel", ["mosaic_gpu", "triton"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_values_and_gradients_equal_the_recurrence(case, kernel, dtype):
    sizes = (case.b, case.l, case.h, case.p, case.g, case.n)
    problem = dispatch.describe(dtype, *sizes, D_per_channel=case.D == "hp")
    reason = dispatch.kernels()[kernel].unsupported(problem)
    if reason is not None:
        pytest.skip(reason)
    inputs = draw(case, dtype=jnp.dtype(dtype))
    ids = inputs.get("segment_ids")
    valid = np.ones((case.b, case.l), bool) if ids is None else np.asarray(ids) != 0
    random = np.random.default_rng(0)
    dy = random.normal(size=inputs["x"].shape) * valid[..., None, None]
    dstate = random.normal(size=(case.b, case.h, case.p, case.n))
    dy = np.asarray(jnp.asarray(dy, dtype), np.float64)
    got = values_and_gradients(inputs, kernel, dy, dstate)
    again = values_and_gradients(inputs, kernel, dy, dstate)
    with jax.enable_x64(True), jax.default_device(jax.devices("cpu")[0]):
        exact = {
            k: np.asarray(v) if k == "segment_ids" else np.asarray(v, np.float64) for k, v in inputs.items()
        }
        want = values_and_gradients(jax.tree.map(jnp.asarray, exact), "recurrent", dy, dstate)
    for name in want:
        rows = valid if name == "y" else slice(None)
        # exponents near -1000 lose four digits; sums over the sequence cancel in the gradients of A and D
        scale = (20 if case.decay > 1 and dtype == "float32" else 1) * (3 if name in _SUMS else 1)
        assert (
            error(np.asarray(got[name], np.float64)[rows], np.asarray(want[name])[rows])
            < scale * TOLERANCE[dtype]
        ), name
        np.testing.assert_array_equal(np.asarray(got[name]), np.asarray(again[name]), err_msg=name)


_SUMS = ("gradient of A", "gradient of D", "gradient of dt")
