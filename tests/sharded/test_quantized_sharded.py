"""Quantized models on a mesh: the numbers and gradients of one device, and shards of values and scales."""

import functools

import jax
import numpy as np
import pytest
from flax import nnx
from meshes import error

from mamba2_jax import Mamba2Config, Mamba2ForCausalLM, generate
from mamba2_jax.lora import LoraConfig, add_lora
from mamba2_jax.mesh import make_mesh
from mamba2_jax.training import split_model
from mamba2_jax.weight_types import WEIGHT_TYPES

TOLERANCE = 1e-5  # float32 sums in another order
FILE = {
    **{"model_type": "granitemoehybrid", "vocab_size": 64, "hidden_size": 128, "num_hidden_layers": 1},
    **{"layer_types": ["mamba"], "num_attention_heads": 4, "num_key_value_heads": 2},
    **{
        "mamba_n_heads": 8,
        "mamba_d_head": 32,
        "mamba_d_state": 16,
        "mamba_n_groups": 2,
        "mamba_chunk_size": 8,
    },
    **{"intermediate_size": 128, "shared_intermediate_size": 128, "num_local_experts": 2},
    **{"num_experts_per_tok": 1, "tie_word_embeddings": True},
}
IDS = np.random.default_rng(0).integers(3, 64, (4, 12))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("floats")
    Mamba2ForCausalLM(Mamba2Config.from_dict(FILE), rngs=nnx.Rngs(0)).save_pretrained(folder)
    return folder


def numbers(model):
    """Logits, loss, and the gradient of every adapter."""
    add_lora(model, LoraConfig(rank=2, targets=("in_proj", "out_proj")), rngs=nnx.Rngs(0))
    structure, trained, frozen = split_model(model)

    @jax.jit
    def run(trained):
        out = structure.merge(trained, frozen)(IDS, labels=IDS)
        return out.loss, out.logits

    return jax.value_and_grad(run, has_aux=True)(trained)


@functools.cache
def alone(folder, kind):
    model = Mamba2ForCausalLM.from_pretrained(folder, quantize=kind)
    tokens = generate(model, IDS, max_new_tokens=4, eos_token_id=()).tokens
    return numbers(model), tokens


@pytest.mark.parametrize("kind", sorted(WEIGHT_TYPES))
def test_a_mesh_gives_the_numbers_of_one_device(folder, kind):
    want, tokens = alone(folder, kind)
    model = Mamba2ForCausalLM.from_pretrained(
        folder, quantize=kind, sharding=make_mesh(data=2, fsdp=2, tensor=2)
    )
    block = model.backbone.layers[0]
    for weight in (block.mixer.out_proj.weight[...], block.experts.up[...], block.experts.down[...]):
        assert weight.values.addressable_shards[0].data.size * 4 == weight.values.size  # over fsdp and tensor
        parts = 4 if weight.scales.shape[-1] > 1 else 2  # one scale per row is on all devices of its input
        assert weight.scales.addressable_shards[0].data.size * parts == weight.scales.size
    moved = Mamba2ForCausalLM.from_pretrained(folder)
    moved.to_mesh(model.backbone.mesh)
    moved.quantize(kind)
    for path, array in moved._arrays().items():
        assert array.sharding.is_equivalent_to(model._arrays()[path].sharding, array.ndim)
        np.testing.assert_array_equal(array, model._arrays()[path])
    got = generate(model, IDS, max_new_tokens=4, eos_token_id=()).tokens
    np.testing.assert_array_equal(got, tokens)
    for one, other in zip(jax.tree.leaves(numbers(model)), jax.tree.leaves(want), strict=True):
        assert error(one, other) < TOLERANCE


def test_groups_that_a_mesh_does_not_divide_stay_whole(folder):
    want, _ = alone(folder, "int4")
    with pytest.warns(UserWarning, match="kept whole on every device, because tensor=8 does not divide"):
        model = Mamba2ForCausalLM.from_pretrained(
            folder, quantize="int4", sharding=make_mesh(data=1, tensor=8)
        )
    with pytest.warns(UserWarning, match="tensor=8 of the mesh does not divide out_proj's 4 scales"):
        got = numbers(model)
    assert error(got[0][1], want[0][1]) < TOLERANCE
