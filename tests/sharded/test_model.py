"""A model whose parameters lie on a mesh: the compiler splits the work, and no number changes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from meshes import small_config

from mamba2_jax import Mamba2ForCausalLM, generate
from mamba2_jax.sharding import BATCH, make_mesh, parameter_shardings

TOLERANCE = 1e-5  # float32 sums in another order
CASES = {  # mesh, n_groups
    "data 8": ({"data": 8}, 2),
    "fsdp 8": ({"fsdp": 8}, 2),
    "tensor 8": ({"tensor": 8}, 8),
    "tensor 8, one group": ({"tensor": 8}, 1),
    "tensor 2 x fsdp 4": ({"tensor": 2, "fsdp": 4}, 2),
}
IDS = np.random.default_rng(0).integers(3, 96, (8, 21))


@functools.cache
def saved(num_groups: int, folder: str):
    config = small_config(num_groups)
    model = Mamba2ForCausalLM(config, rngs=nnx.Rngs(0))
    model.save_pretrained(f"{folder}/{num_groups}")
    return f"{folder}/{num_groups}", config


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(tmp_path_factory.mktemp("models"))


@jax.jit
def loss_and_gradients(model, ids):
    graph, parameters, rest = nnx.split(model, nnx.Param, ...)

    def loss(parameters):
        return nnx.merge(graph, parameters, rest)(ids, labels=ids).loss

    return jax.value_and_grad(loss)(parameters)


def close(got, want, factor: int = 1) -> bool:
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    return np.abs(got - want).max() <= factor * TOLERANCE * np.abs(want).max()


@functools.cache
def alone(num_groups: int, folder: str):
    path, _ = saved(num_groups, folder)
    model = Mamba2ForCausalLM.from_pretrained(path)
    loss, gradients = loss_and_gradients(model, jnp.asarray(IDS))
    tokens = generate(model, IDS, max_new_tokens=6, eos_token_id=()).tokens
    return model(IDS).logits, loss, gradients, tokens


@pytest.mark.parametrize("name", CASES)
def test_a_model_on_a_mesh_gives_the_numbers_of_one_device(name, folder):
    sizes, num_groups = CASES[name]
    path, config = saved(num_groups, folder)
    mesh = make_mesh(**sizes)
    logits, loss, gradients, tokens = alone(num_groups, folder)

    def place(parameter: str):
        return parameter_shardings([parameter], config, mesh)[parameter]

    model = Mamba2ForCausalLM.from_pretrained(path, sharding=place)
    weight = model.backbone.layers[0].mixer.in_proj.weight_zx[...]
    assert len(weight.sharding.device_set) == 8
    if name != "data 8":
        assert weight.addressable_shards[0].data.size == weight.size // 8
    ids = jax.device_put(IDS, NamedSharding(mesh, P(BATCH)))
    assert close(model(ids).logits, logits)
    got_loss, got_gradients = loss_and_gradients(model, ids)
    assert close(got_loss, loss)
    for (where, got), want in zip(
        jax.tree_util.tree_leaves_with_path(got_gradients), jax.tree.leaves(gradients), strict=True
    ):
        # Per head, the terms of these sums over all tokens cancel: ten times the rounding of other sums.
        cancels = any(name in str(where) for name in ("'D'", "A_log", "dt_bias"))
        assert close(got, want, 10 if cancels else 1), where
    np.testing.assert_array_equal(generate(model, ids, max_new_tokens=6, eos_token_id=()).tokens, tokens)
