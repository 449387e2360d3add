"""Who chooses an implementation, and what a kernel is handed; with kernels that any machine can run."""

import dataclasses
import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from mamba2_jax.pallas.triton_gpu import call as triton_call
from mamba2_jax.pallas.triton_gpu import scan as triton_gpu
from ssd_cases import Case, draw

from mamba2_jax import ops
from mamba2_jax.ops.scan import dispatch
from mamba2_jax.ops.scan.chunked import ssd_chunked

CASE = Case("dispatch", l=21, h=2, g=1)


@dataclasses.dataclass
class Recorder:
    """A kernel that computes with XLA and keeps what it was called with."""

    automatic: tuple = ()
    reason: str | None = None
    calls: list = dataclasses.field(default_factory=list)

    def unsupported(self, problem):
        return self.reason

    def run(self, *arguments):
        self.calls.append(arguments)
        *arrays, documents = arguments
        return ssd_chunked(*arrays, documents, chunk_size=8, chunks_per_step=1)


@pytest.fixture
def kernel(monkeypatch):
    recorder = Recorder()
    monkeypatch.setattr(
        dispatch, "kernels", lambda: {"mosaic_gpu": recorder, "triton": Recorder(reason="no")}
    )
    return recorder


def gpu(capability, kind="GPU"):
    return SimpleNamespace(platform="gpu", compute_capability=capability, device_kind=kind)


def problem(device, dtype="bfloat16"):
    return dispatch.describe(dtype, 1, 64, 2, 64, 1, 128, device=device)


@pytest.mark.parametrize(
    ("capability", "first", "second", "chosen"),
    [
        ("9.0", None, None, "mosaic_gpu"),
        ("9.0", "not this dtype", None, "xla"),  # triton is not taken unasked there
        ("8.9", None, None, "triton"),
        ("8.9", None, "not this shape", "xla"),
        ("7.5", None, None, "xla"),
        ("10.0", None, None, "xla"),
        ("gfx942", None, None, "xla"),
    ],
)
def test_the_first_kernel_that_is_for_the_device_and_can_run_is_chosen(
    monkeypatch, capability, first, second, chosen
):
    table = {"mosaic_gpu": Recorder(((9, 0),), first), "triton": Recorder(((8, 0), (8, 9)), second)}
    monkeypatch.setattr(dispatch, "kernels", lambda: table)
    asked = problem(gpu(capability))
    assert dispatch.automatic(asked) == chosen
    assert dispatch.automatic(problem(gpu(capability), "float32")) == "xla"  # kernels are for 16 bits
    assert dispatch.choose(None, 64, asked).func is ssd_chunked  # a chunk size is for XLA


@pytest.mark.parametrize("name", ["mosaic_gpu", "triton"])
def test_what_the_table_says_of_a_cpu(name):
    described = problem(jax.devices("cpu")[0])
    assert described.platform == "cpu"
    assert described.compute_capability is None
    assert "needs an NVIDIA GPU, this runs on cpu" in dispatch.kernels()[name].unsupported(described)


def test_an_old_jax_is_a_reason(monkeypatch):
    monkeypatch.setattr(jax, "__version_info__", (0, 10, 2))
    for kernel in dispatch.kernels().values():
        reason = kernel.unsupported(problem(gpu("9.0")))
        assert reason == f"it needs jax >= 0.11.2 (Python >= 3.12), this is jax {jax.__version__}"


@pytest.mark.parametrize(
    ("capability", "dtype", "sizes", "reason"),
    [
        ("7.0", "bfloat16", {}, "compute capability 8.0.*this GPU has 7.0"),
        ("8.0", "float64", {}, "x is float64, it takes bfloat16"),
        ("8.0", "bfloat16", {"head_dim": 256}, "head_dim=256, it takes up to 128"),
        ("8.0", "bfloat16", {"state_dim": 512}, "state_dim=512, it takes up to 256"),
    ],
)
def test_what_triton_refuses(capability, dtype, sizes, reason):
    asked = problem(gpu(capability))._replace(dtype=np.dtype(dtype) if dtype == "float64" else dtype, **sizes)
    assert re.search(reason, triton_gpu.unsupported(asked))


def test_other_versions_of_triton_are_refused_with_what_to_install(monkeypatch):
    monkeypatch.setattr(triton_call, "_version", {"jax": "0.11.2", "triton": "3.7.1"}.get)
    reason = triton_gpu.unsupported(problem(gpu("8.0")))
    assert "jax-triton is not installed, triton is 3.7.1" in reason
    assert "pip install 'jax[cuda13]==0.11.2' 'jax-triton==0.3.1' 'triton==3.6.0'" in reason
    monkeypatch.setattr(triton_call, "_version", triton_call.TESTED.get)
    assert triton_gpu.unsupported(problem(gpu("8.0"))) is None


@pytest.mark.parametrize(
    ("capability", "want"), [("9.0", (9, 0)), ("12.1", (12, 1)), ("", None), ("gfx942", None), (None, None)]
)
def test_compute_capabilities(capability, want):
    assert dispatch.compute_capability(gpu(capability)) == want


def test_named_with_a_reason_or_a_chunk_size_is_refused(kernel):
    kernel.reason = "it is too warm"
    with pytest.raises(NotImplementedError, match="'mosaic_gpu' cannot run here: it is too warm; use impl"):
        ops.ssd(**draw(CASE), implementation="mosaic_gpu")
    kernel.reason = None
    with pytest.raises(NotImplementedError, match="chunk size is fixed; leave chunk_size=None"):
        ops.ssd(**draw(CASE), implementation="mosaic_gpu", chunk_size=64)
    assert not kernel.calls


def test_a_kernel_gets_what_the_table_promises(kernel):
    inputs = draw(dataclasses.replace(CASE, l=50, segments="repeating", D="hp"), dtype=jnp.bfloat16)
    inputs["dt"], inputs["D"] = inputs["dt"].astype(jnp.bfloat16), inputs["D"].astype(jnp.bfloat16)
    inputs["initial_state"] = None
    ops.ssd(**inputs, implementation="mosaic_gpu")
    ((x, dt, A, B, C, D, initial_state, documents),) = kernel.calls
    assert [a.dtype for a in (x, B, C)] == [jnp.bfloat16] * 3
    assert [a.dtype for a in (dt, A, D, initial_state)] == [jnp.float32] * 4
    padding = np.asarray(inputs["segment_ids"]) == 0
    assert padding.any()
    assert not np.asarray(dt)[padding].any()
    for row in np.asarray(documents):  # 5 2 0 2: three documents, the padding one with the second
        assert list(dict.fromkeys(row)) == [1, 2, 3]
        assert (np.diff(row) >= 0).all()


def loss(arrays, implementation):
    y, state = ops.ssd(**arrays, implementation=implementation)
    return jnp.square(y).sum() + jnp.square(state).sum()


def in_a_scan(arrays, name):
    return jax.lax.scan(lambda total, _: (total + loss(arrays, name), None), 0.0, None, length=2)[0]


def in_a_map(arrays, name):
    shared = {"A": arrays["A"], "D": arrays["D"]}
    rows = {key: array[:, None] for key, array in arrays.items() if key not in shared}
    return jax.vmap(lambda row: loss(row | shared, name))(rows).sum()


TRANSFORMATIONS = {
    "grad": loss,
    "remat": jax.checkpoint(loss, static_argnums=1),
    "scan": in_a_scan,
    "vmap": in_a_map,
}


@pytest.mark.parametrize("name", TRANSFORMATIONS)
def test_a_kernel_under_the_transformations(kernel, name):
    arrays, where = draw(CASE), TRANSFORMATIONS[name]
    want = jax.jit(jax.grad(where), static_argnums=1)(arrays, "xla")
    got = jax.jit(jax.grad(where), static_argnums=1)(arrays, "mosaic_gpu")
    assert kernel.calls
    for key in arrays:
        np.testing.assert_allclose(got[key], want[key], rtol=1e-4, atol=1e-4)
