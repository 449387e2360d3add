"""Who chooses an implementation, and what a kernel is handed; with kernels that any machine can run."""

import dataclasses
import re
from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from mamba2_jax.pallas.triton_gpu import call as triton_call
from mamba2_jax.pallas.triton_gpu import scan as triton_gpu
from ssd_cases import Case, draw, draw_token

from mamba2_jax import Mamba2ForCausalLM, generate, load_tokenizer, ops, stream
from mamba2_jax.models import mamba2 as models
from mamba2_jax.ops import device
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
        dispatch, "kernels", {"ssd": {"mosaic_gpu": recorder, "triton": Recorder(reason="no")}}.get
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
    monkeypatch.setattr(dispatch, "kernels", {"ssd": table, "other": {}}.get)
    asked = problem(gpu(capability))
    assert dispatch.automatic("ssd", asked) == chosen
    assert dispatch.automatic("ssd", problem(gpu(capability), "float32")) == "xla"  # kernels are for 16 bits
    assert dispatch.automatic("other", asked) == "xla"  # each op has kernels of its own
    assert dispatch.choose_scan(None, 64, asked).func is ssd_chunked  # a chunk size is for XLA


@pytest.mark.parametrize("name", ["mosaic_gpu", "triton"])
def test_what_the_table_says_of_a_cpu(name):
    described = problem(jax.devices("cpu")[0])
    assert described.platform == "cpu"
    assert described.compute_capability is None
    assert "needs an NVIDIA GPU, this runs on cpu" in dispatch.kernels("ssd")[name].unsupported(described)


@pytest.mark.parametrize(("capability", "unasked"), [("8.0", []), ("8.9", []), ("9.0", ["mosaic_gpu"])])
def test_unasked_run_only_kernels_that_have_run_on_such_a_card(capability, unasked):
    """`benchmarks/results` has a run on an H200, and none on Ampere or Ada."""
    asked = problem(gpu(capability))
    names = [n for n, k in dispatch.kernels("ssd").items() if asked.compute_capability in k.automatic]
    assert names == unasked


def test_an_old_jax_is_a_reason(monkeypatch):
    monkeypatch.setattr(jax, "__version_info__", (0, 10, 2))
    for kernel in dispatch.kernels("ssd").values():
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
    monkeypatch.setattr(triton_call, "_version", {"jax": "0.12.0.1", "triton": "3.6.0"}.get)
    reason = triton_gpu.unsupported(problem(gpu("8.0")))
    assert "jax-triton is not installed, triton is 3.6.0" in reason
    assert "pip install 'jax[cuda13]==0.11.2' 'jax-triton==0.4.1' 'triton==3.7.1'" in reason
    for found in ({"jax": "0.11.2", "triton": "3.7.1"}, {"jax": "0.12.3", "triton": "3.9.0"}):
        monkeypatch.setattr(triton_call, "_version", {"jax-triton": "0.4.1", **found}.get)
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


def test_a_kernel_of_the_step_is_chosen_like_one_of_the_scan(monkeypatch):
    recorder = Recorder(automatic=(None,))  # for what has no compute capability: the CPU here
    recorder.run = lambda *arguments: recorder.calls.append(arguments) or ("y", "state")
    monkeypatch.setattr(dispatch, "kernels", {"ssd_step": {"mosaic_gpu": recorder}}.get)
    token = draw_token(CASE, dtype=jnp.bfloat16)
    for implementation in (None, "mosaic_gpu"):
        assert ops.ssd_step(**token, implementation=implementation) == ("y", "state")
    for x, dt, A, B, C, state, D in recorder.calls:
        assert [a.dtype for a in (x, B, C)] == [jnp.bfloat16] * 3
        assert [a.dtype for a in (dt, A, state, D)] == [jnp.float32] * 4
    y, _ = ops.ssd_step(**token, implementation="xla")
    assert y.shape == token["x"].shape
    assert len(recorder.calls) == 2


def array_on(device, committed=True):
    return SimpleNamespace(committed=committed, sharding=SimpleNamespace(addressable_devices=[device]))


def test_arrays_committed_elsewhere_tell_where_a_call_runs(monkeypatch):
    """A model on the CPU of a machine with a GPU, and the other way round."""
    cpu, card = SimpleNamespace(platform="cpu", device_kind="cpu"), gpu("9.0", "H100")
    entered = []
    monkeypatch.setattr(jax, "default_device", lambda device: entered.append(device) or nullcontext())
    for default, other in [(card, cpu), (cpu, card), (card, gpu("8.0", "A100"))]:
        monkeypatch.setattr(device, "default_device", lambda default=default: default)
        device.on_device_of(None, np.ones(3), array_on(other, committed=False), array_on(default))
        assert not entered
        device.on_device_of(None, array_on(default, committed=False), array_on(other))
        assert entered == [other]
        entered.clear()


def test_where_a_traced_array_lies_is_not_known():
    here = jax.device_put(jnp.ones(3), jax.devices()[0])
    assert device.committed_device(here) == jax.devices()[0]
    assert device.committed_device(jnp.ones(3)) is None
    known = []
    jax.jit(lambda array: known.append(device.committed_device(array)))(here)
    assert known == [None]


@pytest.mark.parametrize("call", ["model", "generate", "stream"])
def test_a_model_is_traced_for_the_device_of_its_weights(monkeypatch, call):
    """Each public door enters the context; that the arrays are committed, `jax.device_put` says."""
    model = Mamba2ForCausalLM.from_pretrained()
    asked = []
    monkeypatch.setattr(models, "on_device_of", lambda *arrays: asked.append(arrays) or nullcontext())
    ids = jnp.array([[1, 2, 3]])
    if call == "model":
        model(ids)
        model.backbone(ids)
    elif call == "generate":
        generate(model, ids, max_new_tokens=2)
    else:
        "".join(stream(model, load_tokenizer(), "ab", max_new_tokens=2))
    assert len(asked) == {"model": 2, "generate": 1, "stream": 3}[call]  # the prompt, one token, the others
    assert all(arrays[0] is model.backbone.norm_f.weight[...] for arrays in asked)


def test_the_way_out_is_told_where_the_default_device_is_not_the_one(kernel):
    kernel.reason = "it needs an NVIDIA GPU"
    with pytest.raises(NotImplementedError, match=r"trace the call under `with jax.default_device\(that GPU"):
        jax.jit(partial(ops.ssd, implementation="mosaic_gpu"))(**draw(CASE))


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
