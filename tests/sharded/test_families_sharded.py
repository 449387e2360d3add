"""Models of the families on a mesh: the numbers of one device, and the shards of `to_mesh` when loaded."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from meshes import error

from mamba2_jax import Mamba2Config, Mamba2ForCausalLM, generate
from mamba2_jax.layers.experts import Experts
from mamba2_jax.mesh import make_mesh

TOLERANCE = 1e-5  # float32 sums in another order
IDS = np.random.default_rng(0).integers(3, 64, (4, 12))
HEADS = {"vocab_size": 64, "hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2}
MIXER = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 16, "mamba_chunk_size": 8}
FILES = {
    "falcon_h1": {
        **{**HEADS, **MIXER, "num_hidden_layers": 1, "intermediate_size": 48, "mamba_d_ssm": 64},
        **{"mamba_n_groups": 1, "ssm_multipliers": [0.3, 0.5, 0.7, 1.1, 1.3], "key_multiplier": 0.4},
    },
    "granitemoehybrid": {
        **{**HEADS, **MIXER, "num_hidden_layers": 2, "layer_types": ["mamba", "attention"]},
        **{"mamba_n_groups": 2, "intermediate_size": 24, "shared_intermediate_size": 40},
        **{"num_local_experts": 4, "num_experts_per_tok": 2, "tie_word_embeddings": True},
        **{"embedding_multiplier": 12.0, "attention_multiplier": 0.25},
    },
    "nemotron_h": {
        **{**HEADS, "head_dim": 16, "hybrid_override_pattern": "ME*", "mamba_num_heads": 10},
        **{"mamba_head_dim": 8, "n_groups": 2, "ssm_state_size": 16, "chunk_size": 8, "n_routed_experts": 4},
        **{"num_experts_per_tok": 2, "moe_intermediate_size": 24, "routed_scaling_factor": 2.5},
        **{"moe_shared_expert_intermediate_size": 40, "moe_latent_size": 16},
    },
}


@functools.cache
def alone(model_type: str) -> Mamba2ForCausalLM:
    """The model on one device, with random numbers where an initialisation has ones or zeros."""
    config = Mamba2Config.from_dict({"model_type": model_type, **FILES[model_type]})
    model = Mamba2ForCausalLM(config, rngs=nnx.Rngs(0))
    parameters = nnx.state(model, nnx.Param)
    keys = iter(jax.random.split(jax.random.key(1), 100))
    for path, leaf in nnx.to_flat_state(parameters):
        if leaf[...].ndim == 1 and not {"A_log", "dt_bias"} & set(path):
            leaf.set_value(leaf[...] + jax.random.uniform(next(keys), leaf.shape, minval=-0.2, maxval=0.2))
    nnx.update(model, parameters)
    return model


@jax.jit
def numbers(model: Mamba2ForCausalLM):
    """Loss, logits, and the gradient of every parameter."""
    graph, parameters, rest = nnx.split(model, nnx.Param, ...)

    def loss(parameters):
        out = nnx.merge(graph, parameters, rest)(jnp.asarray(IDS), labels=jnp.asarray(IDS))
        return out.loss, out.logits

    return jax.value_and_grad(loss, has_aux=True)(parameters)


@pytest.mark.parametrize("model_type", FILES)
def test_a_mesh_gives_the_numbers_of_one_device(model_type, tmp_path):
    model = alone(model_type)
    model.save_pretrained(tmp_path / "model")
    want, tokens = numbers(model), generate(model, IDS, max_new_tokens=5, eos_token_id=()).tokens
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    loaded = Mamba2ForCausalLM.from_pretrained(tmp_path / "model", sharding=mesh)
    moved = Mamba2ForCausalLM.from_pretrained(tmp_path / "model")
    moved.to_mesh(mesh)
    for path, array in moved._arrays().items():
        same_shards(loaded._arrays()[path], array)
    for module in experts_of(loaded):
        assert module.mesh == mesh
        for leaf in (module.up[...], module.down[...]):
            assert leaf.addressable_shards[0].data.size * 4 == leaf.size  # over fsdp and tensor
    got = numbers(loaded)
    for (path, one), other in zip(jax.tree.leaves_with_path(got), jax.tree.leaves(want), strict=True):
        # Per head, the terms of these sums over all tokens cancel: ten times the rounding of other sums.
        cancels = any(name in str(path) for name in ("'D'", "A_log", "dt_bias"))
        assert error(one, other) < (10 if cancels else 1) * TOLERANCE, path
    np.testing.assert_array_equal(generate(loaded, IDS, max_new_tokens=5, eos_token_id=()).tokens, tokens)


def experts_of(model: Mamba2ForCausalLM) -> list[Experts]:
    found = [module for _, module in nnx.iter_modules(model) if isinstance(module, Experts)]
    assert bool(found) == (model.config.experts_cfg is not None)
    return found


def same_shards(one: jax.Array, other: jax.Array) -> None:
    assert one.sharding.is_equivalent_to(other.sharding, one.ndim)
    for here, there in zip(one.addressable_shards, other.addressable_shards, strict=True):
        assert here.device == there.device
        assert here.index == there.index
        np.testing.assert_array_equal(here.data, there.data)
