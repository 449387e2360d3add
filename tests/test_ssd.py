"""Every implementation of the scan against a float64 recurrence: values, states, every gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from ssd_cases import CASES, Case, draw

from mamba2_jax import ops
from mamba2_jax.ops.scan.chunked import ssd_chunked

IMPLEMENTATIONS = ["recurrent", "xla"]
run = jax.jit(ops.ssd, static_argnames=("chunk_size", "implementation"))
# float32 rounding: a sum of a few hundred products, each exact to 6e-8.
TOLERANCE = {"float32": 3e-6, "bfloat16": 1e-2}


def error(got, want):
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    assert np.isfinite(got).all()
    return np.linalg.norm(got - want) / max(np.linalg.norm(want), 1e-30)


def valid_rows(inputs):
    ids = inputs.get("segment_ids")
    return np.ones(inputs["x"].shape[:2], bool) if ids is None else np.asarray(ids) != 0


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_values_equal_the_numpy_recurrence(case, implementation):
    inputs = draw(case)
    want_y, want_state = reference.ssd(**inputs)
    y, state = run(**inputs, chunk_size=case.chunk_size, implementation=implementation)
    valid = valid_rows(inputs)
    tolerance = TOLERANCE["float32"]
    assert np.isfinite(np.asarray(y)).all()
    assert error(np.asarray(y)[valid], want_y[valid]) < tolerance
    assert error(state, want_state) < tolerance
    assert state.dtype == jnp.float32


@pytest.mark.parametrize("case", [c for c in CASES if c.name != "chunk of one"], ids=str)
def test_every_gradient_equals_the_float64_recurrence(case):
    inputs = draw(case, seed=1)
    ids = inputs.pop("segment_ids", None)
    valid = valid_rows({**inputs, "segment_ids": ids})
    weights = np.random.default_rng(0).normal(size=(2, *inputs["x"].shape)) * valid[..., None, None]

    def loss(arrays, implementation, dtype):
        y, state = ops.ssd(
            **arrays, segment_ids=ids, chunk_size=case.chunk_size, implementation=implementation
        )
        return (y * weights[0].astype(dtype)).sum() + jnp.square(state).sum()

    gradient = jax.jit(jax.grad(loss), static_argnums=(1, 2))
    with jax.enable_x64(True):
        exact = jax.tree.map(lambda a: a.astype(jnp.float64), inputs)
        want = gradient(exact, "recurrent", np.float64)
    got = gradient(inputs, "xla", np.float32)
    for name in want:
        # Sums over the sequence cancel in dA and dD: allow them ten times the rounding of values.
        assert error(got[name], want[name]) < 10 * TOLERANCE["float32"], name


@pytest.mark.parametrize("chunk_size", [1, 7, 16, 37, 64])
@pytest.mark.parametrize("chunks_per_step", [1, 2, 1000])
def test_the_split_into_chunks_and_steps_changes_nothing(chunk_size, chunks_per_step):
    inputs = draw(Case("packed", segments="packed"))
    want = reference.ssd(**inputs)
    inputs["dt"] = jnp.where(inputs["segment_ids"][..., None] != 0, inputs["dt"], 0)
    got = ssd_chunked(*inputs.values(), chunk_size=chunk_size, chunks_per_step=chunks_per_step)
    valid = valid_rows(inputs)
    assert error(np.asarray(got[0])[valid], want[0][valid]) < TOLERANCE["float32"]
    assert error(got[1], want[1]) < TOLERANCE["float32"]


def test_bfloat16_operands_keep_a_float32_state():
    inputs = draw(Case("bf16", l=200, n=64), dtype=jnp.bfloat16)
    want_y, want_state = reference.ssd(**inputs)
    y, state = ops.ssd(**inputs)
    assert y.dtype == jnp.bfloat16
    assert state.dtype == jnp.float32
    assert error(y, want_y) < TOLERANCE["bfloat16"]
    assert error(state, want_state) < TOLERANCE["bfloat16"]


def test_float64_when_enabled():
    with jax.enable_x64(True):
        inputs = {k: np.asarray(v, np.float64) for k, v in draw(CASES[4]).items()}
        y, state = ops.ssd(**{k: jnp.asarray(v) for k, v in inputs.items()}, chunk_size=8)
        want_y, want_state = reference.ssd(**inputs)
        assert y.dtype == state.dtype == jnp.float64
        assert error(y, want_y) < 1e-13
        assert error(state, want_state) < 1e-13


def test_strong_decay_is_finite_and_right_with_its_gradients():
    case = Case("very strong", l=64, chunk_size=64, decay=60.0)
    inputs = draw(case)
    total = (inputs["dt"] * inputs["A"]).sum(1)
    assert total.max() < -500  # within one chunk
    test_every_gradient_equals_the_float64_recurrence(case)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_pieces_joined_by_the_state_equal_the_whole(implementation):
    inputs = draw(Case("whole", l=41))
    y, state = run(**inputs, implementation=implementation)
    parts, carried = [], inputs["initial_state"]
    for start, end in [(0, 1), (1, 20), (20, 41)]:
        piece = {k: v[:, start:end] if k in {"x", "dt", "B", "C"} else v for k, v in inputs.items()}
        part, carried = run(**{**piece, "initial_state": carried}, implementation=implementation)
        parts.append(part)
    assert error(jnp.concatenate(parts, 1), y) < TOLERANCE["float32"]
    assert error(carried, state) < TOLERANCE["float32"]


def test_vmap_and_jit_agree_with_the_plain_call():
    inputs = draw(Case("vmap", D=None, initial_state=False))
    y, _ = ops.ssd(**inputs)
    stacked = {k: jnp.stack([v, v]) if k != "A" else v for k, v in inputs.items()}
    mapped = jax.vmap(lambda x, dt, B, C: ops.ssd(x, dt, inputs["A"], B, C)[0])
    both = jax.jit(mapped)(stacked["x"], stacked["dt"], stacked["B"], stacked["C"])
    assert error(both[1], y) < TOLERANCE["float32"]


BAD = {
    "rank of x": ({"x": jnp.ones((2, 3, 4))}, r"x has rank 3"),
    "empty length": ({"x": jnp.ones((2, 0, 4, 8))}, r"x has shape .* axis l is empty"),
    "empty batch": ({"x": jnp.ones((0, 37, 4, 8))}, r"x has shape .* axis b is empty"),
    "integers": ({"x": jnp.ones((2, 37, 4, 8), jnp.int32)}, r"x is int32"),
    "dt shape": ({"dt": jnp.ones((2, 37, 5))}, r"dt has shape \(2, 37, 5\), wants \(b=2, l=37, h=4\)"),
    "groups": (
        {"B": jnp.ones((2, 37, 3, 16)), "C": jnp.ones((2, 37, 3, 16))},
        r".*a multiple of num_groups=3",
    ),
    "C": ({"C": jnp.ones((2, 37, 2, 8))}, r"C has shape"),
    "D": ({"D": jnp.ones((4, 3))}, r"D has shape"),
    "state": ({"initial_state": jnp.ones((2, 4, 8, 15))}, r"initial_state has shape"),
    "segments dtype": ({"segment_ids": jnp.ones((2, 37))}, r"segment_ids is float32"),
    "segments shape": ({"segment_ids": jnp.ones((2, 36), jnp.int32)}, r"segment_ids has shape"),
    "chunk": ({"chunk_size": 0}, r"chunk_size=0"),
    "implementation": ({"implementation": "cuda"}, r"implementation='cuda' is not one of"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments_are_named(name):
    change, message = BAD[name]
    with pytest.raises(ValueError, match=f"^ssd: {message}"):
        ops.ssd(**{**draw(Case("good")), **change})


@pytest.mark.parametrize("kernel", ["mosaic_gpu", "triton"])
def test_a_kernel_named_but_absent_is_an_error_not_a_fallback(kernel):
    with pytest.raises(NotImplementedError, match=f"{kernel}.*use implementation='xla'"):
        ops.ssd(**draw(Case("good")), implementation=kernel)


def test_forward_mode_by_the_recurrence_is_the_transpose_of_reverse_mode():
    """Two implementations, each by another mode."""
    keys = iter(jax.random.split(jax.random.key(0), 4))
    x, dx, dy = (jax.random.normal(next(keys), (1, 20, 2, 4)) for _ in range(3))
    dt, B = jnp.full((1, 20, 2), 0.1), jax.random.normal(next(keys), (1, 20, 1, 8))

    def scan(implementation):
        return lambda x: ops.ssd(x, dt, -jnp.ones(2), B, B, implementation=implementation)[0]

    _, forward = jax.jvp(scan("recurrent"), (x,), (dx,))
    (reverse,) = jax.vjp(scan("xla"), x)[1](dy)
    np.testing.assert_allclose(jnp.vdot(forward, dy), jnp.vdot(dx, reverse), rtol=1e-5)
