"""Bugs planted in the Triton kernels, each found where the tests of these kernels look.

There are no waits or commits to leave out: Triton sets its own.
"""

import pytest

pytest.importorskip("triton_interpreter", reason="the Triton kernels need triton")
import jax
import jax.numpy as jnp
import mamba2_jax.pallas.triton_gpu
import numpy as np
import reference
import seeding
import test_triton
from mamba2_jax.pallas.triton_gpu import kernels as triton_kernels
from mamba2_jax.pallas.triton_gpu import scan as triton_gpu
from test_triton import TOLERANCE, error, gradients, small, ssd

from mamba2_jax.ops import ssd as public_ssd

interpreted = test_triton.interpreted
pytestmark = test_triton.pytestmark

# right for every token but one: itself, its neighbour, the last of a row or of a chunk
FORWARD = [
    ("causal = q[:, None] >= q[None, :]", "causal = q[:, None] > q[None, :]"),
    ("causal = q[:, None] >= q[None, :]", "causal = q[:, None] >= q[None, :] - 1"),
    ("row_ptr + tl.maximum(start, 1) - 1", "row_ptr + start"),  # the document before a chunk
    ("tl.minimum(start + Q, length) - 1", "tl.minimum(start + Q, length) - 2"),  # and its last one
]
BACKWARD = [
    ("causal = t[:, None] <= t[None, :]", "causal = t[:, None] < t[None, :]", "x"),
    ("pairs = t[:, None] <= t[None, :]", "pairs = t[:, None] < t[None, :]", "B"),
    ("earlier = (t[None, :] < t[:, None])", "earlier = (t[None, :] <= t[:, None])", "dt"),
    ("tl.where(t[None, :] >= t[:, None], across", "tl.where(t[None, :] > t[:, None], across", "A"),
]
UNWRITTEN = [
    # (right, wrong, the first and the last token without a value)
    ("(q < length - start)[:, None]", "(q < length - start - 1)[:, None]", 39, 39),
    ("y.to(x.dtype), mask=valid)", "y.to(x.dtype), mask=valid & (start + q[:, None] >= 32))", 0, 31),
]


@pytest.fixture
def inputs():
    """A chunk of 32 tokens and 8 more; documents that start at its last token, and just behind it."""
    inputs = test_triton.draw(small("seeded", b=2))
    return inputs | {"segment_ids": jnp.asarray([[1] * 31 + [2] * 9, [1] * 32 + [2] * 8], jnp.int32)}


@pytest.fixture
def plant(monkeypatch, tmp_path):
    """Run with a line of the kernels changed."""

    def plant(old, new):
        changed = seeding.rewritten(triton_kernels, old, new, tmp_path)
        monkeypatch.setattr(mamba2_jax.pallas.triton_gpu, "kernels", changed)
        for name in ("_forward", "_backward"):  # as new functions, which JAX has not traced before
            run = getattr(triton_gpu, name)
            monkeypatch.setattr(triton_gpu, name, lambda *arrays, run=run: run(*arrays))

    return plant


@pytest.mark.smoke
def test_without_a_bug_the_values_are_right(inputs, plant):
    plant("causal", "causal")
    assert error(ssd(inputs)[0], reference.ssd(**inputs)[0]) < TOLERANCE["float32"]


@pytest.mark.parametrize(("right", "wrong"), FORWARD)
def test_a_mask_off_by_one_shows_in_the_values(inputs, plant, right, wrong):
    plant(right, wrong)
    want_y, want_state = reference.ssd(**inputs)
    y, state = ssd(inputs)
    assert max(error(y, want_y), error(state, want_state)) > 1e3 * TOLERANCE["float32"]


@pytest.mark.parametrize(("right", "wrong", "shows_in"), BACKWARD)
def test_a_mask_off_by_one_shows_in_the_gradients(inputs, plant, right, wrong, shows_in):
    plant(right, wrong)
    rng = np.random.default_rng(0)
    cotangents = [rng.normal(size=inputs[name].shape) for name in ("x", "initial_state")]
    recurrence = jax.jit(lambda inputs: public_ssd(**inputs, implementation="recurrent"))
    want = gradients(recurrence, inputs, cotangents)
    assert error(gradients(ssd, inputs, cotangents)[shows_in], want[shows_in]) > 1e3 * TOLERANCE["float32"]


@pytest.mark.parametrize(("right", "wrong", "first", "last"), UNWRITTEN)
def test_an_unwritten_tile_is_found(inputs, plant, right, wrong, first, last):
    plant(right, wrong)
    y, _ = ssd(inputs)
    missing = np.flatnonzero(np.isnan(np.asarray(y)).all((0, 2, 3)))
    assert missing.tolist() == [*range(first, last + 1)]
    with pytest.raises(AssertionError):
        error(y, reference.ssd(**inputs)[0])
