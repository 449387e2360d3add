"""A model on a mesh: no number changes, and what is sent is what was meant to be."""

import functools
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from meshes import collectives, mesh_cases, small_config

from mamba2_jax import Mamba2Config, Mamba2ForCausalLM, generate
from mamba2_jax.mesh import BATCH, axis_size, make_mesh
from mamba2_jax.sharding import parameter_shardings

TOLERANCE = 1e-5  # float32 sums in another order
CASES = mesh_cases(
    ("data 8", 2),
    ("fsdp 8", 2),
    ("tensor 8", 8),
    ("tensor 8", 1),
    ("tensor 2 x fsdp 4", 2),
    ("sequence 8", 8),
    ("sequence 2 x tensor 2 x data 2", 1),
)
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


@pytest.mark.parametrize(("sizes", "num_groups"), CASES)
def test_a_model_on_a_mesh_gives_the_numbers_of_one_device(sizes, num_groups, folder):
    path, _ = saved(num_groups, folder)
    mesh = make_mesh(**sizes)
    logits, loss, gradients, tokens = alone(num_groups, folder)

    model = Mamba2ForCausalLM.from_pretrained(path, sharding=mesh)
    weight = model.backbone.layers[0].mixer.in_proj.weight_zx[...]
    assert len(weight.sharding.device_set) == 8
    assert weight.addressable_shards[0].data.size * axis_size(mesh, "fsdp", "tensor") == weight.size
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


def test_parameters_placed_by_hand_leave_the_work_to_the_compiler(folder):
    path, config = saved(2, folder)
    mesh = make_mesh(tensor=2, fsdp=4)

    def place(parameter: str):
        return parameter_shardings([parameter], config, mesh)[parameter]

    model = Mamba2ForCausalLM.from_pretrained(path, sharding=place)
    assert close(model(IDS).logits, alone(2, folder)[0])


def sent(sizes: dict[str, int], config: Mamba2Config, length: int, backward: bool) -> Counter:
    """What a block sends, by name and bytes a device: the difference of models of two and one layers."""

    def of_layers(count: int) -> Counter:
        model = Mamba2ForCausalLM(config.replace(num_hidden_layers=count), rngs=nnx.Rngs(0))
        model.to_mesh(make_mesh(**sizes))
        graph, parameters, rest = nnx.split(model, nnx.Param, ...)
        hidden = jnp.ones((8, length, config.hidden_size))

        def run(parameters, hidden):
            backbone = nnx.merge(graph, parameters, rest).backbone
            return backbone.forward(None, None, None, None, hidden).last_hidden_state

        def summed(hidden, parameters):
            return jnp.square(run(parameters, hidden)).sum()

        if backward:  # by the input alone: gradients of weights are sums of their own
            return Counter(collectives(jax.grad(summed), hidden, parameters))
        return Counter(collectives(run, parameters, hidden))

    one, two = of_layers(1), of_layers(2)
    assert not one - two
    return two - one


@pytest.mark.xla_habits
@pytest.mark.parametrize(("num_groups", "spans"), [(8, False), (2, True), (1, True)])
def test_heads_split_over_devices_are_summed_once_a_block(num_groups, spans):
    config, length = small_config(num_groups), 16
    update = ("all-reduce", 8 * length * config.hidden_size * 4)
    norm = ("all-reduce", 8 * length * num_groups * 4)
    for backward in (False, True):
        want = Counter({update: 1 + backward, **({norm: 1 + backward} if spans else {})})
        assert sent({"tensor": 8}, config, length, backward) == want


@pytest.mark.xla_habits
def test_pieces_of_a_row_send_the_same_whatever_its_length():
    config = small_config(2)
    for backward in (False, True):
        short, long = (sent({"sequence": 8}, config, length, backward) for length in (64, 256))
        assert short == long
        assert short


def test_a_resized_vocabulary_stays_sharded():
    model = Mamba2ForCausalLM(small_config(2), rngs=nnx.Rngs(0))
    want, rows = model(IDS[:1, :8]).logits, model.config.vocab_size
    model.to_mesh(make_mesh(data=1, tensor=2, fsdp=4))
    model.resize_vocabulary(rows + 9, multiple=16)
    path = "backbone.embeddings.weight"
    expected = parameter_shardings([path], model.config, model.backbone.mesh)[path]
    table = model.backbone.embeddings.weight[...]
    assert table.shape[0] % 16 == 0
    assert table.sharding == expected
    assert not table.sharding.is_fully_replicated
    assert np.abs(model(IDS[:1, :8]).logits[..., :rows] - want).max() < TOLERANCE * np.abs(want).max()
