"""The Mosaic GPU forward in the interpreter against the float64 recurrence; nothing races, all is written."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from ssd_cases import MIXTURES, Case, draw, own_error

pytest.importorskip(
    "mamba2_jax.pallas.mosaic_gpu.bridge", reason="the kernels need jax >= 0.11.2", exc_type=ImportError
)
import interpreter
from mamba2_jax.pallas.mosaic_gpu import forward as mosaic_forward

# 16 bits: x, B, C and the weights are rounded to 2**-9. float32: sums of a few hundred products.
TOLERANCE = {"bfloat16": 1e-2, "float16": 1e-3, "float32": 1e-5}
KERNEL = Case("kernel", b=1, l=200, h=2, p=64, g=1, n=128)


def kernel_case(name, **changes):
    return dataclasses.replace(KERNEL, name=name, **changes)


CASES = [
    # (case, dtype, options); more chunks than stages, and a tail, unless the name says otherwise
    (kernel_case("a tail, more chunks than stages", l=328), "bfloat16", {}),
    (kernel_case("the same, float32", l=328), "float32", {}),
    (kernel_case("float16", D=None), "float16", {}),
    (kernel_case("rows and groups", b=2, h=4, g=2, initial_state=False), "bfloat16", {}),
    (kernel_case("odd heads in a group", h=3, n=64, l=136), "bfloat16", {}),
    (kernel_case("one head, length not a multiple of 8", h=1, l=75), "bfloat16", {}),
    (kernel_case("shorter than a chunk", l=11, D=None), "bfloat16", {}),
    (kernel_case("one token", l=1), "bfloat16", {}),
    (kernel_case("head_dim 128, D per channel", p=128, n=64, D="hp"), "bfloat16", {}),
    (kernel_case("head_dim 128, float32, groups of one", h=2, g=2, p=128, n=64, D="hp"), "float32", {}),
    (kernel_case("state_dim 256", n=256), "bfloat16", {}),
    (kernel_case("strong decay", decay=60.0), "bfloat16", {}),
    (kernel_case("packed", b=2, l=192, segments="packed"), "bfloat16", {}),
    (kernel_case("packed, float32", b=2, l=150, n=64, segments="packed"), "float32", {}),
    (kernel_case("packed, repeating ids", b=2, segments="repeating"), "bfloat16", {}),
    (kernel_case("left padding", b=2, segments="left"), "bfloat16", {}),
    (kernel_case("right padding", b=2, segments="right"), "bfloat16", {}),
    (kernel_case("all padding", b=2, l=75, n=64, segments="none"), "bfloat16", {}),
    (kernel_case("packed, strong decay, float32", segments="packed", decay=60.0), "float32", {}),
    (kernel_case("three pieces", l=400), "bfloat16", {"pieces": 3}),
    (kernel_case("packed, two pieces", b=2, l=330, segments="packed"), "bfloat16", {"pieces": 2}),
]
SMOKE = {"a tail, more chunks than stages", "packed", "three pieces"}


def arguments(case, dtype):
    """A case as the kernels are called: dt is 0 at padding, and there is always an initial state."""
    inputs = {"D": None, "segment_ids": None, **draw(case, dtype=jnp.dtype(dtype))}
    inputs["B"] = inputs["B"] / case.n**0.5
    inputs.setdefault("initial_state", jnp.zeros((case.b, case.h, case.p, case.n)))
    if inputs["segment_ids"] is not None:
        inputs["dt"] = jnp.where(inputs["segment_ids"][..., None] != 0, inputs["dt"], 0.0)
    return inputs


def error(got, want):
    return np.linalg.norm(np.asarray(got, np.float64) - want) / np.linalg.norm(want)


def valid_tokens(inputs):
    ids = inputs["segment_ids"]
    return np.ones(inputs["x"].shape[:2], bool) if ids is None else np.asarray(ids) != 0


def check_values(inputs, dtype, y, final):
    want_y, want_final = reference.ssd(**inputs)
    valid = valid_tokens(inputs)
    assert y.dtype == inputs["x"].dtype
    assert final.dtype == jnp.float32
    assert error(np.asarray(y)[valid], want_y[valid]) < TOLERANCE[dtype]
    assert error(final, want_final) < TOLERANCE[dtype]


@pytest.mark.parametrize(
    ("case", "dtype", "options"),
    [pytest.param(*c, id=str(c[0]), marks=[pytest.mark.smoke] * (str(c[0]) in SMOKE)) for c in CASES],
)
def test_values_equal_the_float64_recurrence(case, dtype, options):
    inputs = arguments(case, dtype)
    y, final, saved = interpreter.run(mosaic_forward.forward, **inputs, **options)
    assert saved is None
    check_values(inputs, dtype, y, final)


@pytest.mark.parametrize("mixture", [case.mixture for case in MIXTURES[:2]])
def test_every_token_of_a_mixture_of_decays_is_right_at_its_own_scale(mixture):
    inputs = arguments(kernel_case(mixture, mixture=mixture, l=136, h=1, n=64), "bfloat16")
    y, final, _ = interpreter.run(mosaic_forward.forward, **inputs)
    want_y, want_final = reference.ssd(**inputs)
    # Of the worst token, whose parts cancel to a third.
    assert own_error("y", y, want_y) < 2 * TOLERANCE["bfloat16"]
    assert own_error("state", final, want_final) < TOLERANCE["bfloat16"]


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("case", "dtype", "options"), [pytest.param(*c, id=str(c[0])) for c in CASES if c[1] != "float32"]
)
def test_values_on_a_gpu_equal_the_float64_recurrence(case, dtype, options):
    """What no interpreter runs: operands in registers, fences, clipping by the hardware."""
    if getattr(jax.devices()[0], "compute_capability", None) != "9.0":
        pytest.skip("needs an H100 or H200")
    inputs = arguments(case, dtype)
    y, final, _ = jax.jit(functools.partial(mosaic_forward.forward, **options))(**inputs)
    check_values(inputs, dtype, y, final)


@pytest.mark.parametrize("segments", [None, "packed"])
def test_saved_states_are_those_before_every_chunk(segments):
    case = kernel_case("saved", b=1, l=200, h=1, n=64, segments=segments)
    inputs = arguments(case, "bfloat16")
    *_, saved = interpreter.run(mosaic_forward.forward, **inputs, save_states=True, pieces=2)
    assert saved.shape == (1, 4, 1, 64, 64)
    assert saved.dtype == jnp.bfloat16
    np.testing.assert_array_equal(saved[:, 0], inputs["initial_state"].astype(jnp.bfloat16))
    for i, length in ((1, 64), (2, 128), (3, 192)):
        prefix = {k: v[:, :length] if k in ("x", "dt", "B", "C") else v for k, v in inputs.items()}
        if segments:
            prefix["segment_ids"] = inputs["segment_ids"][:, :length]
        assert error(saved[:, i], reference.ssd(**prefix)[1]) < TOLERANCE["bfloat16"]


def test_pieces_change_nothing():
    inputs = arguments(kernel_case("pieces", l=330, h=1, n=64, segments="packed"), "bfloat16")
    whole = interpreter.run(mosaic_forward.forward, **inputs, pieces=1)
    cut = interpreter.run(mosaic_forward.forward, **inputs, pieces=2)
    for a, b in zip(whole[:2], cut[:2], strict=True):
        np.testing.assert_array_equal(a, b)
