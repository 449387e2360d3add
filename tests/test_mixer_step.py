"""`ops.mixer_step` against the float64 recurrence, alone and with the projections, and who runs it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference

from mamba2_jax import ops
from mamba2_jax.ops.scan import dispatch


@dataclasses.dataclass(frozen=True)
class Case:
    name: str
    b: int = 3
    h: int = 4
    p: int = 8
    g: int = 2
    n: int = 16
    k: int = 4
    d: int = 24
    D: str = "h"
    bias: bool = True
    norm: bool = True
    before: bool = False
    mask: bool = False
    projected: bool = False  # with the projections

    def __str__(self) -> str:
        return self.name


CASES = [
    Case("plain"),
    Case("ended rows", mask=True, g=1),
    Case("with the projections", projected=True, D="hp"),
    Case("gate alone, no biases", norm=False, bias=False, k=2),
    Case("norm before gate, a group for each head", before=True, g=4, projected=True, mask=True),
]
LIMITS = (0.01, 2.0)
# float32: sums of a few dozen products. bfloat16: x, B, C and the normed output are rounded to 2**-9.
TOLERANCE = {"float32": 1e-5, "bfloat16": 1e-2}


def draw(case: Case, dtype="float32", seed: int = 0) -> dict:
    """Arguments of `ops.mixer_step`."""
    keys = iter(jax.random.split(jax.random.key(seed), 20))
    inner, columns = case.h * case.p, case.g * case.n

    def normal(*shape, dtype=dtype):
        return jax.random.normal(next(keys), shape).astype(dtype)

    weights = ops.MixerWeights(
        taps_x=normal(case.k, inner),
        taps_BC=normal(case.k, 2, columns),
        bias_x=normal(inner) if case.bias else None,
        bias_BC=normal(2, columns) if case.bias else None,
        dt_bias=normal(case.h),
        A_log=normal(case.h),
        D=normal(case.h, *([case.p] if case.D == "hp" else [])),
        norm=normal(inner) if case.norm else None,
    )
    reach = case.k - 1
    state = ops.MixerState(
        conv_x=normal(case.b, reach, inner),
        conv_BC=normal(case.b, reach, 2, columns),
        ssm=normal(case.b, case.h, case.p, case.n, dtype=jnp.float32),
    )
    inputs = normal(case.b, 2, inner), normal(case.b, 2, columns), normal(case.b, case.h, dtype=jnp.float32)
    if case.projected:
        into = [normal(case.d, *leaf.shape[1:]) / case.d**0.5 for leaf in inputs]
        weights = weights._replace(
            input=tuple(leaf.astype(dtype) for leaf in into), output=normal(inner, case.d) / inner**0.5
        )
        inputs = normal(case.b, case.d)
    return {
        "inputs": inputs,
        "state": state,
        "weights": weights,
        "mask": jnp.arange(case.b) != 1 if case.mask else None,
        "options": ops.MixerOptions(LIMITS, eps=1e-5, norm_before_gate=case.before),
    }


def silu(x):
    return x / (1 + np.exp(-x))


def want(inputs, state, weights, mask, options):
    """Compute `mixer_step` in float64, by the recurrence and as the formulas say."""
    inputs, state, weights = jax.tree.map(lambda a: np.asarray(a, np.float64), (inputs, state, weights))
    if weights.input is not None:
        inputs = [np.tensordot(inputs, matrix, axes=1) for matrix in weights.input]
    zx, BC, dt = inputs
    batch, heads, head_dim, state_dim = state.ssm.shape
    windows, outputs = [], []
    for new, window, taps, bias in (
        (zx[:, 1], state.conv_x, weights.taps_x, weights.bias_x),
        (BC, state.conv_BC, weights.taps_BC, weights.bias_BC),
    ):
        extended = np.concatenate([window, new[:, None]], axis=1)
        outputs.append(silu((extended * taps).sum(1) + (0 if bias is None else bias)))
        windows.append(extended[:, 1:])
    x = outputs[0].reshape(batch, 1, heads, head_dim)
    B, C = np.moveaxis(outputs[1].reshape(batch, 1, 2, -1, state_dim), 2, 0)
    dt = np.clip(np.logaddexp(dt + weights.dt_bias, 0), *options.dt_limits)[:, None]
    y, ssm = reference.ssd(x, dt, -np.exp(weights.A_log), B, C, D=weights.D, initial_state=state.ssm)

    y, gate = y.reshape(batch, -1), silu(zx[:, 0])
    groups = B.shape[2]

    def normed(value):
        grouped = value.reshape(batch, groups, -1)
        scale = np.sqrt(np.square(grouped).mean(2, keepdims=True) + options.eps)
        return (grouped / scale).reshape(batch, -1) * weights.norm

    if weights.norm is None:
        y = y * gate
    else:
        y = normed(y) * gate if options.norm_before_gate else normed(y * gate)
    if weights.output is not None:
        y = y @ weights.output
    new = ops.MixerState(*windows, ssm)
    if mask is not None:
        alive = np.asarray(mask)
        new = jax.tree.map(lambda n, o: np.where(alive.reshape(-1, *(1,) * (n.ndim - 1)), n, o), new, state)
    return y, new


def error(got, wanted):
    got = np.asarray(got, np.float64)
    return np.linalg.norm(got - wanted) / np.linalg.norm(wanted)


def check(case, dtype, arguments, got):
    y, state = got
    wanted_y, wanted_state = want(**arguments)
    alive = np.ones(case.b, bool) if arguments["mask"] is None else np.asarray(arguments["mask"])
    assert y.dtype == (jnp.float32 if case.projected else dtype)
    assert error(np.asarray(y)[alive], wanted_y[alive]) < TOLERANCE[dtype]
    for name, leaf, wanted in zip(state._fields, state, wanted_state, strict=True):
        assert leaf.dtype == getattr(arguments["state"], name).dtype
        assert error(leaf, wanted) < TOLERANCE[dtype]
        np.testing.assert_array_equal(leaf[~alive], getattr(arguments["state"], name)[~alive])


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_values_equal_the_float64_recurrence(case, dtype):
    arguments = draw(case, dtype)
    check(case, dtype, arguments, ops.mixer_step(**arguments, implementation="xla"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"implementation": "cuda"}, "implementation='cuda' is not one of"),
        ({"mask": jnp.ones(4, bool)}, r"mask has shape \(4,\), wants \(b=3\)"),
        ({"inputs": (jnp.ones((3, 2, 32)), jnp.ones((3, 2, 16)), jnp.ones((3, 4)))}, "BC has shape"),
    ],
)
def test_mistakes_are_named(change, message):
    with pytest.raises(ValueError, match=f"^mixer_step: {message}"):
        ops.mixer_step(**{**draw(CASES[0]), **change})


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({}, "needs an NVIDIA GPU"),
        ({"norm_before_gate": True}, "norm_before_gate=False"),
    ],
)
def test_a_named_kernel_is_never_replaced(monkeypatch, change, reason):
    arguments = draw(CASES[0])
    arguments["options"] = arguments["options"]._replace(**change)
    if change:
        monkeypatch.setattr(dispatch, "kernels", lambda op: {"mosaic_gpu": Kernel()})
        ops.mixer_step(**arguments)  # unasked, XLA runs it
    with pytest.raises(NotImplementedError, match=f"^mixer_step: .*{reason}.*use implementation='xla'"):
        ops.mixer_step(**arguments, implementation="mosaic_gpu")


def test_a_preferred_kernel_runs_where_it_can(monkeypatch):
    arguments = draw(CASES[0])
    wanted, _ = ops.mixer_step(**arguments)
    for preferred in ("triton", "mosaic_gpu", "recurrent"):  # none of these can run here
        np.testing.assert_array_equal(ops.mixer_step(**arguments, preferred=preferred)[0], wanted)
    monkeypatch.setattr(dispatch, "kernels", lambda op: {"mosaic_gpu": Kernel()})
    assert not ops.mixer_step(**arguments, preferred="mosaic_gpu")[0].any()
    assert ops.mixer_step(**arguments, preferred="mosaic_gpu", implementation="xla")[0].any()


class Kernel:
    """A kernel that returns zeros."""

    automatic = ()

    def unsupported(self, problem):
        return None

    def run(self, inputs, state, weights, mask, *, dt_limits, eps):
        assert (dt_limits, eps) == (LIMITS, 1e-5)
        return jnp.zeros_like(inputs[0][:, 0]), state


def test_a_kernel_has_the_derivatives_of_xla(monkeypatch):
    monkeypatch.setattr(dispatch, "kernels", lambda op: {"mosaic_gpu": Kernel()})
    arguments = draw(CASES[1])

    def loss(inputs, implementation):
        y, state = ops.mixer_step(**{**arguments, "inputs": inputs}, implementation=implementation)
        return (y * jnp.arange(y.shape[1])).sum() + state.ssm.sum()

    got, wanted = (jax.grad(loss)(arguments["inputs"], name) for name in ("mosaic_gpu", "xla"))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), got, wanted)
    assert loss(arguments["inputs"], "mosaic_gpu") != loss(arguments["inputs"], "xla")
