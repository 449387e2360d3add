"""The convolution on eight devices against one: values, states, every gradient, and what is sent."""

from functools import partial

import jax
import jax.numpy as jnp
import meshes
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from mamba2_jax import ops
from mamba2_jax.ops.conv.sharded import causal_conv1d_sharded

TOLERANCE = 3e-6  # the same float32 sums; those over all tokens, for weight and bias, in another order


def draw(length, channels=(8,), taps=4):
    rng = np.random.default_rng(0)
    shapes = {
        "x": (8, length, *channels),
        "weight": (taps, *channels),
        "bias": channels,
        "initial_state": (8, taps - 1, *channels),
    }
    inputs = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    weights = [rng.normal(size=shapes[name]).astype(np.float32) for name in ("x", "initial_state")]
    return inputs, weights


def compiled(op, **options):
    """Gradients, y and state of an operator, as a function of `(arrays, ids, weights)`."""

    def loss(arrays, ids, weights):
        y, state = op(**arrays, segment_ids=ids, **options)
        if ids is not None:  # at padding y means nothing
            y = jnp.where((ids != 0).reshape(*ids.shape, *(1,) * (y.ndim - 2)), y, 0)
        return (y * weights[0]).sum() + (state * weights[1]).sum(), (y, state)

    return jax.jit(jax.grad(loss, has_aux=True))


on_one_device = compiled(ops.causal_conv1d)


@pytest.mark.parametrize(
    ("sizes", "channels", "channel_axis"),
    [
        *((sizes, (8,), -1) for sizes in meshes.SIZES),
        ("sequence 4, tensor 2", (8, 2), 0),
        ("sequence 2, tensor 2, data 2", (2, 3), None),
    ],
)
def test_values_and_every_gradient_equal_one_device(sizes, channels, channel_axis):
    mesh = meshes.make_mesh(meshes.SIZES[sizes])
    on_the_mesh = compiled(causal_conv1d_sharded, mesh=mesh, channel_axis=channel_axis)
    inputs, weights = draw(24, channels)  # three tokens a device: as many as the taps reach back
    rng = np.random.default_rng(1)
    for ids in [meshes.awkward_rows(24), *(meshes.random_rows(rng, 24) for _ in range(8))]:
        got, want = (run(inputs, ids, weights) for run in (on_the_mesh, on_one_device))
        meshes.assert_equal(got, want, TOLERANCE)


@pytest.mark.parametrize("length", [29, 32])
def test_one_document_of_any_length_and_no_state(length):
    inputs, weights = draw(length)
    del inputs["initial_state"], inputs["bias"]
    on_the_mesh = compiled(causal_conv1d_sharded, mesh=meshes.make_mesh({"sequence": 8}))
    got, want = (run(inputs, None, weights) for run in (on_the_mesh, on_one_device))
    meshes.assert_equal(got, want, TOLERANCE)


def test_a_mask_of_booleans_is_a_valid_segment_ids():
    inputs, weights = draw(24)
    mask = meshes.awkward_rows(24) == 1
    on_the_mesh = compiled(causal_conv1d_sharded, mesh=meshes.make_mesh({"sequence": 8}))
    got, want = (run(inputs, mask, weights) for run in (on_the_mesh, on_one_device))
    meshes.assert_equal(got, want, TOLERANCE)


@pytest.mark.xla_habits
@pytest.mark.parametrize("packed", [False, True])
def test_what_is_sent_does_not_grow_with_the_length(packed):
    mesh = meshes.make_mesh({"sequence": 4, "tensor": 2})
    specs = {"x": P(None, "sequence", "tensor"), "weight": P(None, "tensor"), "bias": P("tensor")}
    specs |= {"ids": P(None, "sequence")}

    def train(arrays, ids):
        y, _ = causal_conv1d_sharded(**arrays, segment_ids=ids, mesh=mesh)
        return jnp.square(y).sum()

    def sent(length):
        inputs, _ = draw(length)
        del inputs["initial_state"]
        inputs["ids"] = np.ones((8, length), np.int32)
        placed = meshes.place(mesh, inputs, specs)
        ids = placed.pop("ids")
        return meshes.collectives(jax.grad(train), placed, ids if packed else None)

    found = sent(64)
    halo = ("collective-permute", 4 * 8 * 3 * 4)  # float32, rows, taps back, channels on a device
    sums = ("all-reduce", 4 * (4 + 1) * 4)  # of weight and bias
    marks = ("all-gather", 4 * 2 * 4 * 8)  # int32, two, devices, rows
    assert found == sorted([halo, halo, sums, *[marks] * packed])
    assert sent(256) == found


def test_sizes_that_do_not_fit_are_named():
    inputs, _ = draw(16)
    run = partial(causal_conv1d_sharded, mesh=meshes.make_mesh({"sequence": 8}))
    message = r"length=16 over the mesh's sequence = 8 leaves 2 tokens a device, and 4 taps reach 3 back"
    with pytest.raises(ValueError, match=f"^causal_conv1d_sharded: {message}"):
        run(**inputs)
    message = r"channel_axis=1 is neither None nor among the 1 axes of channels, \(8,\)"
    with pytest.raises(ValueError, match=f"^causal_conv1d_sharded: {message}"):
        run(**inputs, channel_axis=1)
    inputs["initial_state"] = inputs["initial_state"][:, 1:]
    with pytest.raises(ValueError, match=r"^causal_conv1d_sharded: initial_state has shape \(8, 2, 8\)"):
        run(**inputs)
    inputs, _ = draw(16, (6,))
    message = r"channels\[-1\]=6 is not a multiple of the mesh's tensor = 8"
    with pytest.raises(ValueError, match=f"^causal_conv1d_sharded: {message}"):
        causal_conv1d_sharded(**inputs, mesh=meshes.make_mesh({"tensor": 8}))
