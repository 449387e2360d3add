"""Looking inside: captured values are those of the forward pass, and the implied attention is its matrix."""

import family_models
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import jax_model, random_ids, relative

from mamba2_jax import Mamba2ForCausalLM, inspect
from mamba2_jax.ops import ssd

TOLERANCE = 1e-5  # float32 sums in another order
LENGTH = 18


@pytest.fixture(scope="module")
def ids():
    return random_ids(2, LENGTH)


@pytest.fixture(scope="module")
def mask():
    mask = np.ones((2, LENGTH), int)
    mask[0, :5] = 0
    return mask


@pytest.fixture(scope="module")
def values(ids, mask):
    return inspect(jax_model(), ids, mask, positions=[9, -1, 4])


def test_the_last_states_are_those_of_the_cache(values, ids, mask):
    cache = jax_model()(ids, mask).cache
    for index, layer in values.items():
        assert relative(layer.states[:, 1], cache.ssm[index]) < TOLERANCE


def test_states_in_between_are_those_of_a_shorter_text(values, ids, mask):
    cache = jax_model()(ids[:, :10], mask[:, :10]).cache
    assert relative(values[1].states[:, 0], cache.ssm[1]) < TOLERANCE
    assert not values[1].states[0, 2].any()  # nothing but padding so far


def test_streams_are_the_hidden_states(values, ids, mask):
    out = jax_model()(ids, mask, output_hidden_states=True)
    assert relative(values[1].hidden, out.hidden_states[0]) < TOLERANCE


@pytest.mark.parametrize("head", [0, 3, 7])
def test_attention_is_the_matrix_of_the_scan(values, head):
    layer = values[1]
    y, _ = ssd(layer.x, layer.dt, layer.A, layer.B, layer.C)
    for row in range(2):
        matrix = layer.attention(head, row)
        assert relative(matrix @ layer.x[row, :, head], y[row, :, head]) < TOLERANCE
        assert not np.triu(matrix, 1).any()
    assert not np.asarray(layer.attention(head))[:, :5].any()  # padding is not read


def test_memory_is_the_time_to_decay(values):
    layer = values[0]
    assert ((layer.decay >= 0) & (layer.decay <= 1)).all()
    mean = np.log(np.asarray(layer.decay, np.float64))[0, 5:].mean(0)
    assert relative(layer.memory[0], -1 / mean) < 1e-4  # the logarithm of a rounded exp


def test_inside_a_jit_and_for_one_layer(values, ids, mask):
    run = jax.jit(lambda model, ids, mask: inspect(model, ids, mask, layers=[-1])[1].dt)
    assert relative(run(jax_model(), ids, jnp.asarray(mask)), values[1].dt) < TOLERANCE


def test_layers_without_such_a_mixer_are_left_out(ids):
    model = Mamba2ForCausalLM.from_pretrained(family_models.folder("nemotron"))  # M-M*M-
    ids = ids % 64
    values = inspect(model, ids, positions=[-1])
    assert sorted(values) == [0, 2, 4]
    cache = model(ids).cache
    for index, layer in values.items():
        assert relative(layer.states[:, 0], cache.ssm[index]) < TOLERANCE
    with pytest.raises(ValueError, match=r"layer 3 has no Mamba-2 mixer; those with one are \[0, 2, 4\]"):
        inspect(model, ids, layers=[3])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": [2]}, "layers has 2, outside -2..1"),
        ({"positions": [LENGTH]}, "positions has 18, outside -18..17"),
    ],
)
def test_mistakes_are_named(ids, options, message):
    with pytest.raises(ValueError, match=message):
        inspect(jax_model(), ids, **options)
