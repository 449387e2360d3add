"""The backward kernels compiled for an H100, and the bytes of HBM that they touch."""

import aot
import pytest

pytest.importorskip(
    "mamba2_jax.pallas.mosaic_gpu.bridge", reason="the kernels need jax >= 0.11.2", exc_type=ImportError
)
import backward_programs
import forward_programs
import traffic
from backward_programs import PROGRAMS, SHAPES, Program
from mamba2_jax.pallas.mosaic_gpu import plan as mosaic_plan

compiles = pytest.mark.skipif(aot.missing() is not None, reason=str(aot.missing()))


def marks(program):
    return [pytest.mark.smoke] * program.smoke + [pytest.mark.slow] * program.slow


@compiles
@pytest.mark.parametrize("program", [pytest.param(p, id=str(p), marks=marks(p)) for p in PROGRAMS])
def test_the_backward_compiles_within_its_budget(program):
    walk, chunks = aot.compile_kernels("backward_programs:build", **program.kwargs)
    for kernel in (walk, chunks):
        assert kernel.warpgroups == 3
        assert kernel.spill_bytes <= program.budget
        assert kernel.stack_bytes <= program.budget
        assert not kernel.serialised_wgmma
        assert kernel.atomics == 0
        assert kernel.blocks_per_sm == 1
        assert kernel.smem_bytes <= mosaic_plan.SMEM_LIMIT
        if kernel.local_traffic is not None:
            assert kernel.local_traffic * 4 <= program.budget
            assert kernel.wgmma >= 20


@compiles
@pytest.mark.parametrize(
    ("build", "head_dim"),
    [
        ("build_step", 80),
        ("build_step", 32),
        pytest.param("build_sharded", 64, marks=pytest.mark.slow),
    ],
)
def test_gradients_compile_as_a_training_step_takes_them(build, head_dim):
    program = Program("step", b=2, l=512, h=4, g=2, p=head_dim)
    kernels = aot.compile_kernels(f"backward_programs:{build}", **program.kwargs)
    names = {kernel.name.removesuffix("_mosaic_gpu_kernel") for kernel in kernels}
    assert names == {"ssd_forward", "ssd_backward_walk", "ssd_backward_chunks"}


def floor(b, l, h, g, p=64, n=128):
    """x and dy in and dx out, dt in and its gradient out, B and C in and theirs out, all in 16 bits."""
    return b * l * (6 * h * p + 4 * h + 8 * g * n)


@pytest.mark.parametrize("name", SHAPES)
def test_the_backward_touches_at_most_4_2_times_the_floor(name):
    """Half of it states and their gradients: to compute them again was slower, measured on an H200."""
    counted = sum(traffic.hbm_bytes(*backward_programs.traced(Program(name, **SHAPES[name]))).values())

    def forward(**options):
        program = forward_programs.Program(name, **SHAPES[name], **options)
        return sum(traffic.hbm_bytes(*forward_programs.traced(program)).values())

    counted += forward(save_states=True) - forward()  # what the forward writes for the backward only
    assert 1.5 < counted / floor(**SHAPES[name]) <= 4.2
