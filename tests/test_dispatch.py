"""Who runs the scan: by device, dtype, size and version; a name is never replaced by another."""

import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import mamba2_jax.pallas
import pytest
from mamba2_jax.pallas import Kernel, triton_call, triton_gpu
from ssd_cases import Case, draw

from mamba2_jax import ops
from mamba2_jax.cli import main
from mamba2_jax.ops import dispatch

SIZES = (2, 64, 4, 64, 1, 128)


def gpu(capability):
    return SimpleNamespace(platform="gpu", compute_capability=capability, device_kind=f"GPU {capability}")


def problem(device, dtype=jnp.bfloat16, sizes=SIZES):
    return dispatch.describe(dtype, *sizes, device=device)


@pytest.fixture
def all_can(monkeypatch):
    monkeypatch.setattr(Kernel, "unsupported", lambda self, problem: None)


@pytest.mark.usefixtures("all_can")
@pytest.mark.parametrize(
    ("device", "dtype", "wanted"),
    [
        (gpu("9.0"), "bfloat16", "mosaic_gpu"),
        (gpu("9.0"), "float32", "xla"),
        (gpu("8.0"), "bfloat16", "triton"),
        (gpu("8.6"), "float16", "triton"),
        (gpu("8.9"), "bfloat16", "triton"),
        (gpu("8.9"), "float32", "xla"),
        (gpu("7.5"), "float16", "xla"),
        (gpu("10.0"), "bfloat16", "xla"),
        (gpu("gfx942"), "bfloat16", "xla"),
        (SimpleNamespace(platform="tpu"), "bfloat16", "xla"),
        (jax.devices("cpu")[0], "bfloat16", "xla"),
    ],
)
def test_automatic_choice(device, dtype, wanted):
    assert dispatch.automatic(problem(device, dtype)) == wanted


def test_a_kernel_that_cannot_is_passed_over(monkeypatch):
    monkeypatch.setattr(Kernel, "unsupported", lambda self, problem: "no")
    assert dispatch.automatic(problem(gpu("9.0"))) == "xla"
    with pytest.raises(NotImplementedError, match="'mosaic_gpu' cannot run here: no; use .*'xla'"):
        dispatch.choose("mosaic_gpu", None, problem(gpu("9.0")))


def test_a_chunk_size_is_for_xla(all_can):
    assert dispatch.choose(None, 32, problem(gpu("9.0"))).func is dispatch.ssd_chunked
    with pytest.raises(NotImplementedError, match="chunk size is fixed; leave chunk_size=None"):
        dispatch.choose("triton", 32, problem(gpu("8.0")))


def test_the_kernel_gets_document_numbers_and_a_float32_D(all_can, monkeypatch):
    seen = {}

    def run(x, dt, A, B, C, D, initial_state, segment_ids):
        seen.update(D=D.dtype, dt=dt, documents=segment_ids)
        return x, initial_state

    monkeypatch.setattr(Kernel, "run", property(lambda self: run))
    inputs = draw(Case("packed", segments="repeating", b=1))
    ops.ssd(**{**inputs, "D": inputs["D"].astype(jnp.bfloat16)}, implementation="triton")
    assert seen["D"] == jnp.float32
    padding = inputs["segment_ids"] == 0
    assert (seen["dt"][padding] == 0).all()
    assert seen["documents"][0, 0] == 1
    assert seen["documents"].max() == 3  # the 2 comes again after padding: another document
    assert (jnp.diff(seen["documents"]) >= 0).all()


@pytest.mark.parametrize(
    ("device", "dtype", "sizes", "reason"),
    [
        (gpu("7.0"), "bfloat16", SIZES, "compute capability 8.0.*this GPU has 7.0"),
        (gpu("8.0"), "float64", SIZES, "x is float64, it takes bfloat16"),
        (gpu("8.0"), "bfloat16", (1, 8, 2, 256, 1, 64), "head_dim=256, it takes up to 128"),
        (gpu("8.0"), "bfloat16", (1, 8, 2, 64, 1, 512), "state_dim=512, it takes up to 256"),
    ],
)
def test_what_triton_refuses(device, dtype, sizes, reason):
    p = dispatch.describe("bfloat16", *sizes, device=device)._replace(dtype=jnp.dtype(dtype))
    assert re.search(reason, triton_gpu.unsupported(p))


def test_other_versions_are_refused_with_what_to_install(monkeypatch):
    monkeypatch.setattr(triton_call, "_version", {"jax": "0.11.2", "triton": "3.7.1"}.get)
    reason = triton_gpu.unsupported(problem(gpu("8.0")))
    assert "jax-triton is not installed, triton is 3.7.1" in reason
    assert "pip install 'jax[cuda13]==0.11.2' 'jax-triton==0.3.1' 'triton==3.6.0'" in reason
    monkeypatch.setattr(triton_call, "_version", triton_call.TESTED.get)
    assert triton_gpu.unsupported(problem(gpu("8.0"))) is None


def test_an_old_jax_is_told_apart(monkeypatch):
    monkeypatch.setattr(jax, "__version_info__", (0, 10, 2))
    kernel = mamba2_jax.pallas.KERNELS["triton"]
    assert "it needs jax >= 0.11.2" in kernel.unsupported(problem(gpu("8.0")))
    assert "it needs an NVIDIA GPU, this runs on cpu" in kernel.unsupported(problem(jax.devices("cpu")[0]))


def test_info_tells_what_would_run(capsys, monkeypatch):
    devices = [jax.devices("cpu")[0], gpu("8.9")]
    monkeypatch.setattr(jax, "devices", lambda *_: devices)
    monkeypatch.setattr(triton_call, "missing", lambda: None)
    unsupported = Kernel.unsupported

    def any_jax(kernel, problem):
        here = problem.platform == "gpu" and kernel.module.endswith("triton_gpu")
        return triton_gpu.unsupported(problem) if here else unsupported(kernel, problem)

    monkeypatch.setattr(Kernel, "unsupported", any_jax)
    assert main(["info", "--kernels"]) == 0
    cpu, gpu_table = capsys.readouterr().out.split("the scan on ")[1:]
    assert "it needs an NVIDIA GPU, this runs on cpu" in cpu
    assert gpu_table.startswith("gpu: GPU 8.9, compute capability 8.9")
    assert " ".join(gpu_table.split()).count("runs unasked") == 1
    assert "bfloat16 runs" in gpu_table
    assert "runs with implementation='triton'" in gpu_table
