"""The decoding kernels: interpreted against the float64 recurrence, compiled for an H100, and broken."""

import dataclasses

import aot
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_mixer_step import Case, check, draw, error, want

pytest.importorskip(
    "mamba2_jax.pallas.mosaic_gpu.bridge", reason="the kernels need jax >= 0.11.2", exc_type=ImportError
)
import interpreter
import mixer_programs
import seeding
from mamba2_jax.pallas.mosaic_gpu import mixer, products
from mamba2_jax.pallas.mosaic_gpu import step as mosaic_step
from mamba2_jax.pallas.problem import Problem

KERNEL = Case("kernel", b=2, h=2, p=16, g=1, n=64, d=128)
WHOLE = dataclasses.replace(KERNEL, name="whole", h=8, projected=True, mask=True)


def case(name, of=KERNEL, **changes):
    return dataclasses.replace(of, name=name, **changes)


CASES = [
    (case("float32, head_dim 24 and state_dim 128", b=1, p=24, n=128, D="hp"), "float32"),
    (case("gate alone, a group for each head", g=2, norm=False, bias=False, k=2, mask=True), "bfloat16"),
    (case("with the projections, ended rows", WHOLE, g=2, h=16), "bfloat16"),
    (case("no norm, one row", WHOLE, b=1, norm=False, mask=False, D="hp"), "bfloat16"),
    (case("products left to XLA", WHOLE, h=2, d=36), "bfloat16"),
]
SMOKE = {"with the projections, ended rows"}


def run(interpret, inputs, state, weights, mask, options):
    call = jax.jit(
        lambda *arrays: mixer.mixer_step(
            *arrays, dt_limits=options.dt_limits, eps=options.eps, interpret=interpret
        )
    )
    return call(inputs, state, weights, mask)


@pytest.mark.parametrize(
    ("case", "dtype"),
    [pytest.param(*c, id=str(c[0]), marks=[pytest.mark.smoke] * (str(c[0]) in SMOKE)) for c in CASES],
)
def test_values_equal_the_float64_recurrence(case, dtype):
    arguments = draw(case, dtype)
    check(case, dtype, arguments, interpreter.run(run, **arguments))


def test_tokens_one_after_another_stay_at_the_recurrence():
    arguments = draw(case("decoding", b=1))
    wanted = arguments["state"]
    for token in range(6):
        inputs = draw(case("decoding", b=1), seed=token + 1)["inputs"]
        y, state = interpreter.run(run, **{**arguments, "inputs": inputs})
        wanted_y, wanted = want(**{**arguments, "inputs": inputs, "state": wanted})
        arguments["state"] = state
        assert error(y, wanted_y) < 1e-5
    assert error(state.ssm, wanted.ssm) < 1e-5


@pytest.mark.skipif(aot.missing() is not None, reason=str(aot.missing()))
@pytest.mark.parametrize(
    "program",
    [
        pytest.param(p, id=str(p), marks=[pytest.mark.smoke] * p.smoke + [pytest.mark.slow] * p.slow)
        for p in mixer_programs.PROGRAMS
    ],
)
def test_the_kernels_compile_without_spills(program):
    kernels = aot.compile_kernels("mixer_programs:build", **program.kwargs)
    assert len(kernels) == program.kernels
    for kernel in kernels:
        assert kernel.warpgroups == 1
        assert kernel.spill_bytes == kernel.stack_bytes == 0
        assert not kernel.local_traffic
        assert kernel.atomics == 0
        assert not kernel.serialised_wgmma
    assert min(kernel.blocks_per_sm for kernel in kernels if kernel.name.startswith("mixer_step")) >= 2


@pytest.mark.parametrize("name", ["Codestral, one row", "Codestral, 64 rows", "2.7b, one row"])
def test_the_bytes_are_within_5_per_cent_of_the_floor(name):
    program = next(p for p in mixer_programs.PROGRAMS if p.name == name)
    assert 1.0 < mixer_programs.hbm_bytes(program) / mixer_programs.floor(program) <= 1.05


@pytest.mark.parametrize(
    ("module", "missing", "caller", "found"),
    [
        (products, "barrier_wait", "_", "a barrier|a race"),  # a stage is multiplied before it has arrived
        (products, "commit_smem", "run", "a race"),  # the result leaves before it is written
    ],
)
def test_a_missing_wait_or_commit_is_found(module, missing, caller, found):
    with seeding.without(missing, caller), pytest.raises(interpreter.Found, match=found):
        interpreter.run(run, **draw(case("seeded", WHOLE, b=1, h=16, mask=False), "bfloat16"))


@pytest.mark.parametrize("wrong", ["softplus", "silu"])
def test_a_wrong_formula_shows_in_the_values(monkeypatch, wrong):
    monkeypatch.setattr(mosaic_step, wrong, lambda x: jnp.maximum(x, 0.0))
    arguments = draw(case("seeded", b=1))
    y, _ = interpreter.run(run, **arguments)
    assert error(y, want(**arguments)[0]) > 1e-2


def test_softplus_is_accurate_for_small_results():
    x = np.linspace(-30, 20, 1001)
    got = np.asarray(jax.vmap(mosaic_step.softplus)(jnp.asarray(x, jnp.float32)), np.float64)
    np.testing.assert_allclose(got, np.logaddexp(np.float32(x).astype(np.float64), 0), rtol=5e-7)


@pytest.mark.parametrize(
    ("shape", "rows"),
    [
        ((1, 128, 64, 8, 128), 32),
        ((64, 80, 64, 1, 128), 64),
        ((1, 24, 64, 1, 128), 8),
        ((4, 64, 80, 1, 256), 16),
    ],
)
def test_a_block_owns_as_many_channels_as_leave_no_multiprocessor_idle(shape, rows):
    assert mosaic_step.make_plan(*shape, taps=4).rows == rows


@pytest.mark.parametrize("columns", [(16384, 2048, 128), (4096,), (3072, 256, 24), (10240, 256, 80)])
@pytest.mark.parametrize(("depth", "scales"), [(4096, 0), (8192, 8), (768, 0), (192, 1)])
def test_the_rings_fit_and_divide_the_depth(columns, depth, scales):
    plan = products.make_plan(columns, depth, scales)
    assert plan.steps * plan.step * max(1, scales) >= depth
    assert not scales or plan.steps * plan.step * scales == depth
    assert plan.stages >= 2
    bytes_of_ring = plan.stages * 2 * plan.step * (products.ROWS + plan.width)
    assert bytes_of_ring + 6 * products.ROWS * plan.width <= products.SMEM_LIMIT - 1024


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"compute_capability": (8, 0)}, "needs Hopper"),
        ({"dtype": "float16"}, "in bfloat16 or float32, and the inputs are float16"),
        ({"head_dim": 36}, "a head_dim that is a multiple of 8, not 36"),
        ({"state_dim": 16}, "a state_dim that is a multiple of 64, up to 1024, not 16"),
        ({}, None),
    ],
)
def test_what_the_kernels_refuse(change, reason):
    problem = Problem("gpu", (9, 0), "bfloat16", 1, 1, 8, 64, 2, 128, False)._replace(**change)
    refused = mixer.unsupported(problem)
    assert refused is None if reason is None else reason in refused
