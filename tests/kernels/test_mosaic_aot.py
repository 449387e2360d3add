"""The forward kernel compiled for an H100: no spills beyond the budget, no waits between products."""

import aot
import pytest

pytest.importorskip(
    "mamba2_jax.pallas.mosaic_gpu.bridge", reason="the kernels need jax >= 0.11.2", exc_type=ImportError
)
from forward_programs import PROGRAMS
from mamba2_jax.pallas.mosaic_gpu import plan as mosaic_plan

pytestmark = pytest.mark.skipif(aot.missing() is not None, reason=str(aot.missing()))


def marks(program):
    return [pytest.mark.smoke] * program.smoke + [pytest.mark.slow] * program.slow


@pytest.mark.parametrize("program", [pytest.param(p, id=str(p), marks=marks(p)) for p in PROGRAMS])
def test_the_forward_compiles_within_its_budget(program):
    (kernel,) = aot.compile_kernels("forward_programs:build", **program.kwargs)
    assert kernel.warpgroups == 3
    assert kernel.spill_bytes <= program.spill_budget
    assert kernel.stack_bytes <= program.spill_budget
    assert not kernel.serialised_wgmma
    assert kernel.atomics == 0
    assert kernel.blocks_per_sm == 1
    plan = mosaic_plan.make_plan(
        program.b,
        program.l,
        program.h,
        program.g,
        program.p,
        program.n,
        documents=program.documents,
        save_states=program.save_states,
        pieces=program.pieces,
    )
    counted = mosaic_plan.smem_bytes(program.n, plan.stages, 2, program.documents, program.save_states)
    assert kernel.smem_bytes <= mosaic_plan.SMEM_LIMIT
    assert abs(kernel.smem_bytes - counted) <= 4096  # the rest is alignment
    if kernel.local_traffic is not None:
        assert kernel.local_traffic * 4 <= program.spill_budget
        assert kernel.wgmma >= 20


def test_a_kernel_that_cannot_compile_is_told_from_one_that_can():
    with pytest.raises(RuntimeError, match="did not compile"):
        aot.compile_kernels("forward_programs:build", **{**PROGRAMS[0].kwargs, "dtype": "float32"})


def test_spills_and_waits_are_found_where_registers_are_few():
    wide = next(program for program in PROGRAMS if program.n == 256)
    training = {**wide.kwargs, "documents": True, "save_states": True}
    (kernel,) = aot.compile_kernels("forward_programs:build_starved", **training)
    assert kernel.spill_bytes > wide.spill_budget
    assert kernel.stack_bytes > wide.spill_budget
    assert kernel.serialised_wgmma
    assert kernel.local_traffic is None or kernel.local_traffic * 4 > wide.spill_budget
