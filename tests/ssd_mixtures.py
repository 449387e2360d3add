"""Run the scan where tokens that wipe the state are mixed with slow ones, against the float64 recurrence."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from ssd_cases import draw, own_error

from mamba2_jax import ops

STATIC = ("scan", "implementation", "chunk_size", "mesh")


@functools.partial(jax.jit, static_argnames=STATIC)
def results(arrays, ids, weights, implementation, chunk_size=None, scan=ops.ssd, **mesh):
    """Return y and state, and every gradient, each by name."""

    def loss(arrays):
        options = {"implementation": implementation, "chunk_size": chunk_size, **mesh}
        y, state = scan(**arrays, segment_ids=ids, **options)
        if ids is not None:
            y = jnp.where((ids != 0)[..., None, None], y, 0)
        dy, dstate = (weight.astype(y.dtype) for weight in weights)
        return (y * dy).sum() + (state * dstate).sum(), {"y": y, "state": state}

    gradients, values = jax.grad(loss, has_aux=True)(arrays)
    return values, gradients


@functools.cache
def prepare(case):
    """Return the inputs, the float64 recurrence's results, and the float32 recurrence's errors."""
    arrays = draw(case)
    ids = arrays.pop("segment_ids", None)
    rng = np.random.default_rng(0)
    weights = [rng.normal(size=arrays[name].shape).astype(np.float32) for name in ("x", "initial_state")]
    with jax.enable_x64(True):
        exact = jax.tree.map(lambda a: a.astype(jnp.float64), arrays)
        want = jax.tree.map(np.asarray, results(exact, ids, weights, "recurrent"))
    return (arrays, ids, weights), want, errors(results(arrays, ids, weights, "recurrent"), want)


def assert_exact(case, *options, **mesh) -> None:
    """Check each token's error: below 1e-5 or, where a sum cancels, 3 times the float32 recurrence's."""
    inputs, want, of_recurrence = prepare(case)
    got = errors(results(*inputs, *options, **mesh), want)
    for part, allowed in zip(got, of_recurrence, strict=True):
        for name, error in part.items():
            assert error < max(1e-5, 3 * allowed[name]), name


def errors(got, want):
    return [{name: own_error(name, got[i][name], want[i][name]) for name in want[i]} for i in (0, 1)]
