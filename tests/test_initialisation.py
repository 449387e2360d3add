"""New models begin as the original's: `_init_weights` and the constructors of mamba_ssm and PyTorch."""

import math

import numpy as np
import pytest
from flax import nnx

from mamba2_jax import Mamba2Config, Mamba2ForCausalLM

LAYERS, WIDTH, TAPS = 3, 64, 4
BRANCHES = 2 * LAYERS  # a mixer and an MLP per layer


@pytest.fixture(scope="module")
def arrays():
    config = Mamba2Config.preset("mamba2-130m").replace(
        hidden_size=WIDTH, num_hidden_layers=LAYERS, num_heads=128, head_dim=1, vocab_size=512,
        unpadded_vocab_size=None,        tie_word_embeddings=False, d_intermediate=128, attn_layer_idx=(1,),
        attn_cfg={"num_heads": 4, "head_dim": 16, "d_conv": TAPS, "causal": True},
    )  # fmt: skip
    flat = nnx.to_flat_state(nnx.state(Mamba2ForCausalLM(config, rngs=nnx.Rngs(0)), nnx.Param))
    return {".".join(map(str, path)): np.asarray(leaf[...]) for path, leaf in flat}


def is_uniform(array, low, high):
    """Whether the values fill the range and have its mean and deviation, within five standard errors."""
    error = (high - low) / math.sqrt(12 * array.size)
    return (
        low <= array.min() <= low + 0.1 * (high - low)
        and high - 0.1 * (high - low) <= array.max() <= high
        and abs(array.mean() - (low + high) / 2) < 5 * error
        and abs(array.std() - (high - low) / math.sqrt(12)) < 5 * error
    )


MIXER = "backbone.layers.0.mixer."
BOUNDS = {
    **{f"{MIXER}in_proj.weight_{part}": 1 / math.sqrt(WIDTH) for part in ("zx", "BC", "dt")},
    **{
        f"{MIXER}conv1d.{part}": 1 / math.sqrt(TAPS)
        for part in ("weight_x", "weight_BC", "bias_x", "bias_BC")
    },
    f"{MIXER}out_proj.weight": 1 / math.sqrt(2 * WIDTH * BRANCHES),
    "backbone.layers.0.mlp.fc1.weight": 1 / math.sqrt(WIDTH),
    "backbone.layers.0.mlp.fc2.weight": 1 / math.sqrt(128 * BRANCHES),
    "backbone.layers.1.mixer.in_proj.weight_q": 1 / math.sqrt(WIDTH),
    "backbone.layers.1.mixer.out_proj.weight": 1 / math.sqrt(WIDTH * BRANCHES),
    "lm_head.weight": 1 / math.sqrt(WIDTH),
}


@pytest.mark.parametrize("name", BOUNDS)
def test_matrices_and_taps_are_uniform_as_a_linear_layer(arrays, name):
    assert is_uniform(arrays[name], -BOUNDS[name], BOUNDS[name])


def test_the_step_and_the_decay_are_those_of_the_paper(arrays):
    dt = np.log1p(np.exp(arrays[f"{MIXER}dt_bias"].astype(np.float64)))
    assert is_uniform(np.log(dt), math.log(0.001), math.log(0.1))
    assert is_uniform(np.exp(arrays[f"{MIXER}A_log"]), 1, 16)
    assert (arrays[f"{MIXER}D"] == 1).all()


def test_embeddings_are_normal_norms_one_and_biases_zero(arrays):
    table = arrays["backbone.embeddings.weight"]
    assert abs(table.std() - 0.02) < 5 * 0.02 / math.sqrt(2 * table.size)
    assert np.abs(table).max() > 3.5 * 0.02  # not uniform
    norms = [array for name, array in arrays.items() if "norm" in name]
    assert len(norms) == 2 * LAYERS + 1 + 2  # of the blocks, of the end, and gated
    assert all((array == 1).all() for array in norms)
    assert not arrays["backbone.layers.1.mixer.in_proj.bias_q"].any()


def test_a_layer_alone_is_not_rescaled():
    sizes = {"hidden_size": WIDTH, "num_hidden_layers": 2, "num_heads": 2, "vocab_size": 16}
    config = Mamba2Config(**sizes, n_groups=1, rescale_prenorm_residual=False)
    model = Mamba2ForCausalLM(config, rngs=nnx.Rngs(0))
    weight = np.asarray(model.backbone.layers[0].mixer.out_proj.weight[...])
    assert is_uniform(weight, -1 / math.sqrt(2 * WIDTH), 1 / math.sqrt(2 * WIDTH))
