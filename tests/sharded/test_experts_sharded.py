"""A mixture of experts on eight devices against one: values, every gradient, and what is sent."""

import jax
import jax.numpy as jnp
import meshes
import numpy as np
import pytest
from flax import nnx

from mamba2_jax.config.experts import ExpertsConfig
from mamba2_jax.layers.experts import Experts

TOLERANCE = 1e-5  # float32 sums in another order
CONFIG = ExpertsConfig(num_experts=6, width=16, top_k=2, gated=True, router="sigmoid", scale=2.5)
HIDDEN = jnp.asarray(np.random.default_rng(0).normal(size=(8, 16, 24)), jnp.float32)


def compiled(mesh=None, **changes):
    """The graph's parameters, and loss and gradients as a function of them and the hidden states."""
    mixture = Experts(CONFIG, HIDDEN.shape[-1], rngs=nnx.Rngs(0))
    mixture.mesh = mesh
    graph, parameters = nnx.split(mixture)

    @jax.jit
    def run(parameters, hidden):
        def loss(parameters, hidden):
            y = nnx.merge(graph, parameters)(hidden)
            return jnp.sin(3 * y).sum(), y

        return jax.grad(loss, (0, 1), has_aux=True)(parameters, hidden)

    return run, parameters


@pytest.mark.parametrize(
    "sizes",
    [
        {"tensor": 8},
        {"tensor": 2, "fsdp": 4},
        {"sequence": 2, "tensor": 2, "data": 2},
        pytest.param({"fsdp": 8}, marks=pytest.mark.slow),
        pytest.param({"data": 8}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_values_and_every_gradient_equal_one_device(sizes):
    want = compiled()
    got = compiled(meshes.make_mesh(sizes))
    meshes.assert_equal(got[0](got[1], HIDDEN), want[0](want[1], HIDDEN), TOLERANCE)


@pytest.mark.parametrize("batch", [1, 8])
def test_what_the_mesh_does_not_divide_is_whole(batch):
    mesh = meshes.make_mesh({"data": 8})
    want, got = compiled(), compiled(mesh)
    hidden = HIDDEN[:batch, :15]
    meshes.assert_equal(got[0](got[1], hidden), want[0](want[1], hidden), TOLERANCE)


def test_a_forward_over_tensor_sums_the_updates_and_sends_nothing_else():
    mixture = Experts(CONFIG, HIDDEN.shape[-1], rngs=nnx.Rngs(0))
    mixture.mesh = meshes.make_mesh({"tensor": 8})
    graph, parameters = nnx.split(mixture)
    sent = meshes.collectives(lambda parameters: nnx.merge(graph, parameters)(HIDDEN), parameters)
    assert sent == [("all-reduce", HIDDEN.nbytes)]
