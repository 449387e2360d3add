"""The scan on eight devices against one: values, states, every gradient, and what is sent."""

import sys
from functools import partial

import jax
import jax.numpy as jnp
import meshes
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.sharding import PartitionSpec as P
from ssd_cases import MIXTURES
from ssd_mixtures import assert_exact

from mamba2_jax import ops
from mamba2_jax.ops.scan.recurrent import ssd_recurrent
from mamba2_jax.ops.scan.sharded import ssd_sharded

# float32, both sides alike, but the state that enters a device is summed in another order. dA and dD are
# sums over all rows and tokens, which cancel.
TOLERANCE = 1e-5


def draw(b=8, l=64, h=8, p=4, g=2, n=8):
    """Arguments of a scan, every other head decaying fast; and random cotangents of y and state."""
    rng = np.random.default_rng(0)
    shapes = {
        "x": (b, l, h, p),
        "B": (b, l, g, n),
        "C": (b, l, g, n),
        "D": (h,),
        "initial_state": (b, h, p, n),
    }
    inputs = {name: rng.normal(size=shape) for name, shape in shapes.items()}
    inputs["dt"] = np.log1p(np.exp(rng.normal(size=(b, l, h)) - 2))
    inputs["A"] = -rng.uniform(1, 4, h) * np.where(np.arange(h) % 2, 60, 1)
    weights = [rng.normal(size=shapes[name]) for name in ("x", "initial_state")]
    return jax.tree.map(np.float32, (inputs, weights))


def compiled(op, **options):
    """Gradients, y and state of an operator, as a function of `(arrays, ids, weights)`."""

    def loss(arrays, ids, weights):
        y, state = op(**arrays, segment_ids=ids, chunk_size=8, **options)
        if ids is not None:  # at padding y means nothing
            y = jnp.where((ids != 0)[..., None, None], y, 0)
        return (y * weights[0]).sum() + (state * weights[1]).sum(), (y, state)

    return jax.jit(jax.grad(loss, has_aux=True))


on_one_device = compiled(ops.ssd)


@pytest.mark.parametrize("groups", [1, 2, 8])
@pytest.mark.parametrize("sizes", meshes.SIZES)
def test_values_and_every_gradient_equal_one_device(sizes, groups):
    on_the_mesh = compiled(ssd_sharded, mesh=meshes.make_mesh(meshes.SIZES[sizes]))
    inputs, weights = draw(g=groups)
    rng = np.random.default_rng(1)
    whole_devices = np.repeat(meshes.random_rows(rng, 8), 8, axis=1)
    for ids in [meshes.awkward_rows(64), whole_devices, *(meshes.random_rows(rng, 64) for _ in range(4))]:
        got, want = (run(inputs, ids, weights) for run in (on_the_mesh, on_one_device))
        meshes.assert_equal(got, want, TOLERANCE)


@pytest.mark.parametrize("sizes", [{"sequence": 4, "tensor": 2}, {"tensor": 2}], ids=str)
@pytest.mark.parametrize("case", MIXTURES, ids=str)
def test_every_token_is_right_at_its_own_scale(case, sizes):
    assert_exact(case, "xla", 64, scan=ssd_sharded, mesh=meshes.make_mesh(sizes))


@pytest.mark.parametrize("given", ["nothing", "all"])
def test_a_length_that_does_not_divide_is_padded_exactly(given):
    inputs, weights = draw(l=61)
    if given == "all":
        ids, inputs["D"] = meshes.awkward_rows(61), inputs["x"][0, 0]  # (h, p)
    else:
        ids = None
        del inputs["D"], inputs["initial_state"]
    on_the_mesh = compiled(ssd_sharded, mesh=meshes.make_mesh({"sequence": 4, "tensor": 2}))
    got, want = (run(inputs, ids, weights) for run in (on_the_mesh, on_one_device))
    meshes.assert_equal(got, want, TOLERANCE)


@pytest.mark.parametrize("devices", [5, 6, 7])
def test_sequence_axes_that_are_no_power_of_two(devices):
    inputs, _ = draw(b=2, l=4 * devices)
    inputs["A"] /= 60  # every device is still felt in the last
    mesh = meshes.make_mesh({"sequence": devices})
    got = jax.jit(partial(ssd_sharded, implementation="recurrent", mesh=mesh))(**inputs)
    want = jax.jit(partial(ops.ssd, implementation="recurrent"))(**inputs)
    meshes.assert_equal(got, want, TOLERANCE)


def test_bfloat16_rounds_no_more_than_on_one_device():
    inputs, _ = draw()
    narrow = {name: inputs[name].astype(jnp.bfloat16) for name in ("x", "B", "C")}
    exact = jax.jit(ops.ssd)(**inputs | {name: array.astype(np.float32) for name, array in narrow.items()})
    got = jax.jit(partial(ssd_sharded, mesh=meshes.make_mesh({"sequence": 8})))(**inputs | narrow)
    one_device = jax.jit(partial(ops.ssd, chunk_size=8))(**inputs | narrow)
    for ours, theirs, truth in zip(got, one_device, exact, strict=True):
        assert ours.dtype == theirs.dtype
        assert meshes.error(ours, truth) < 1.2 * meshes.error(theirs, truth) < 1e-2


def scan_kernel(x, dt, A, B, C, initial_state, y, state):
    """One head of one row, token by token."""
    carried = initial_state[0, 0]
    for t in range(x.shape[1]):
        carried = carried * jnp.exp(dt[0, t, 0] * A[0]) + dt[0, t, 0] * x[0, t, 0][:, None] * B[0, t, 0][None]
        y[0, t, 0] = carried @ C[0, t, 0]
    state[0, 0] = carried


@jax.custom_vjp
def pallas_scan(x, dt, A, B, C, initial_state):
    b, l, h, p = x.shape
    n, per_group = B.shape[3], h // B.shape[2]
    head = pl.BlockSpec((1, l, 1, p), lambda i, j: (i, 0, j, 0))
    group = pl.BlockSpec((1, l, 1, n), lambda i, j: (i, 0, j // per_group, 0))
    states = pl.BlockSpec((1, 1, p, n), lambda i, j: (i, j, 0, 0))
    step = pl.BlockSpec((1, l, 1), lambda i, j: (i, 0, j))
    return tuple(
        pl.pallas_call(
            scan_kernel,
            grid=(b, h),
            in_specs=[head, step, pl.BlockSpec((1,), lambda i, j: (j,)), group, group, states],
            out_specs=[head, states],
            out_shape=[jax.ShapeDtypeStruct(a.shape, a.dtype) for a in (x, initial_state)],
            interpret=True,
        )(x, dt, A, B, C, initial_state)
    )


def recurrence(x, dt, A, B, C, initial_state):
    return ssd_recurrent(x, dt, A, B, C, None, initial_state, None)


pallas_scan.defvjp(
    lambda *arguments: (pallas_scan(*arguments), arguments),
    lambda arguments, cotangents: jax.vjp(recurrence, *arguments)[1](cotangents),
)


@pytest.mark.parametrize("sizes", ["sequence 2, tensor 2, data 2", "tensor 8"])
def test_a_pallas_kernel_with_its_own_gradient_runs_inside(sizes, monkeypatch):
    def choose(*_):
        return lambda x, dt, A, B, C, D, state, segment_ids: pallas_scan(x, dt, A, B, C, state)

    inputs, weights = draw(l=16)
    del inputs["D"]
    want = on_one_device(inputs, None, weights)
    monkeypatch.setattr(sys.modules["mamba2_jax.ops.scan.api"], "choose_scan", choose)
    on_the_mesh = compiled(ssd_sharded, mesh=meshes.make_mesh(meshes.SIZES[sizes]))
    assert "pallas_call" in str(on_the_mesh.trace(inputs, None, weights).jaxpr)
    meshes.assert_equal(on_the_mesh(inputs, None, weights), want, TOLERANCE)


@pytest.mark.xla_habits
@pytest.mark.parametrize("sizes", ["sequence 8", "sequence 2, tensor 2, data 2"])
def test_what_is_sent_does_not_grow_with_the_length(sizes):
    mesh = meshes.make_mesh(meshes.SIZES[sizes])
    specs = dict.fromkeys(("x", "dt", "B", "C"), P("data", "sequence", "tensor"))
    specs |= {"A": P("tensor"), "D": P("tensor"), "ids": P("data", "sequence")}

    def train(arrays, ids):
        return jnp.square(ssd_sharded(**arrays, segment_ids=ids, mesh=mesh)[0]).sum()

    def sent(length):
        inputs, _ = draw(l=length)
        del inputs["initial_state"]
        placed = meshes.place(mesh, inputs | {"ids": np.ones((8, length), np.int32)}, specs)
        ids = placed.pop("ids")
        return meshes.collectives(jax.grad(train), placed, ids)

    found = sent(64)
    pieces, rows, heads = mesh.shape["sequence"], 8 // mesh.shape["data"], 8 // mesh.shape["tensor"]
    rounds = pieces.bit_length() - 1
    message = ("collective-permute", 4 * rows * heads * (4 * 8 + 1))  # float32 left (p, n) and kept
    marks = ("all-gather", 4 * 2 * pieces * rows)  # int32
    sums = ("all-reduce", 4 * 2 * heads)  # dA and dD
    assert found == sorted([marks, sums, *[message] * 2 * rounds])
    assert sent(256) == found


BAD = {
    "rows": ({"data": 8}, {"b": 6}, "batch=6 is not a multiple of the mesh's data x fsdp = 8"),
    "heads": ({"tensor": 8}, {"h": 4}, "num_heads=4 is not a multiple of the mesh's tensor = 8"),
    "groups": ({"tensor": 2}, {"h": 6, "g": 3}, "num_groups=3 and the mesh's tensor = 2"),
}


@pytest.mark.parametrize("name", BAD)
def test_sizes_that_do_not_divide_are_named(name):
    sizes, change, message = BAD[name]
    with pytest.raises(ValueError, match=f"^ssd_sharded: {message}"):
        ssd_sharded(**draw(**change)[0], mesh=meshes.make_mesh(sizes))


def test_other_bad_arguments_are_named():
    inputs, _ = draw()
    with pytest.raises(ValueError, match=r"^ssd_sharded: the mesh has axes \('data',\), and lacks fsdp"):
        ssd_sharded(**inputs, mesh=jax.make_mesh((8,), ("data",)))
    inputs["D"] = np.ones(5, np.float32)
    with pytest.raises(ValueError, match=r"^ssd_sharded: D has shape \(5,\), wants \(h=8\)"):
        ssd_sharded(**inputs, mesh=meshes.make_mesh({"sequence": 8}))
