"""The one table of parameters against the modules that hold them, and what is read off it."""

import math

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from mamba2_jax import Mamba2Cache, Mamba2Config, Mamba2ForCausalLM, Mamba2Model
from mamba2_jax.config import ExpertsConfig, MLPConfig
from mamba2_jax.config.kinds import KINDS
from mamba2_jax.config.table import checkpoint_table, leaf_at, role_of, weight_at
from mamba2_jax.layers.kinds import MIXERS, MODULES
from mamba2_jax.layers.state import Rows
from mamba2_jax.lora import LoraConfig, add_lora
from mamba2_jax.lora.targets import adapter_targets
from mamba2_jax.training.optim import decayed, projection

SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_heads": 8,
    "head_dim": 8,
    "state_size": 16,
    "n_groups": 2,
    "vocab_size": 96,
}
HEADS = {"num_heads": 4, "num_heads_kv": 2, "head_dim": 8}
VARIANTS = {
    "plain": {},
    "tied": {"tie_word_embeddings": True},
    "biases": {"use_bias": True},
    "no biases": {"use_conv_bias": False},
    "MLP beside": {"num_heads": 4, "d_ssm": 32, "use_bias": True},
    "MLP after": {"d_intermediate": 8},
    "hybrid": {"attn_layer_idx": (1,), "attn_cfg": {**HEADS, "d_conv": 4}},
    "hybrid, MLPs, no biases": {
        "attn_layer_idx": (0, 2),
        "attn_cfg": {**HEADS, "mlp_dim": 1, "qkv_proj_bias": False, "out_proj_bias": False},
        "d_intermediate": 8,
        "tie_word_embeddings": True,
    },
    "attention alone": {"attn_layer_idx": (0, 1, 2), "attn_cfg": HEADS},
    "D per channel": {"D_has_hdim": True},
    "gate alone": {"rmsnorm": False},
}


def make_config(variant: str) -> Mamba2Config:
    return Mamba2Config(**{**SIZES, **VARIANTS[variant]})


def leaves_of(config: Mamba2Config, head: bool = True):
    return {leaf.path: leaf for stored in checkpoint_table(config, head) for leaf in stored.leaves}


def parameters_of(make) -> dict[str, tuple[int, ...]]:
    state = nnx.state(nnx.eval_shape(make), nnx.Param)
    return {".".join(map(str, path)): leaf.shape for path, leaf in nnx.to_flat_state(state)}


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_table_is_the_model(variant):
    config = make_config(variant)
    parameters = parameters_of(lambda: Mamba2ForCausalLM(config, rngs=nnx.Rngs(0)))
    leaves = leaves_of(config)
    assert {path: leaf.shape for path, leaf in leaves.items()} == parameters
    assert config.num_parameters() == sum(map(math.prod, parameters.values()))
    bare = parameters_of(lambda: Mamba2Model(config, rngs=nnx.Rngs(0)))
    assert {f"backbone.{path}" for path in bare} == leaves_of(config, head=False).keys()


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_leaf_fills_its_rows_and_names_its_axes(variant):
    for stored in checkpoint_table(make_config(variant)):
        row = math.prod(stored.shape[1:])
        ends = [0]
        for leaf in stored.leaves:
            assert len(leaf.axes) == len(leaf.units) == len(leaf.shape), leaf.path
            assert all(size % units == 0 for size, units in zip(leaf.shape, leaf.units, strict=True))
            assert leaf.rows[0] == ends[-1]
            assert leaf.size == (leaf.rows[1] - leaf.rows[0]) * row
            ends.append(leaf.rows[1])
        assert not stored.leaves or ends[-1] == stored.shape[0]


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_leaf_is_found_by_any_path_that_ends_in_it(variant):
    config = make_config(variant)
    for path, leaf in leaves_of(config).items():
        for name in (path, path.removeprefix("backbone."), f"moments.0.{path}"):
            found = leaf_at(config, name)
            assert (found.axes, found.shape, found.rows) == (leaf.axes, leaf.shape, leaf.rows), name
            assert role_of(name) is leaf.role, name
    for name, target in adapter_targets(config).items():
        first = target.stored.leaves[0]
        assert weight_at(config, name).axes == first.axes
        assert target.in_size == first.shape[first.role.input_axis]
    assert leaf_at(config, "backbone.layers.0.mixer.in_proj.lora.default.A") is None


@pytest.mark.parametrize("variant", VARIANTS)
def test_what_decays_and_what_is_orthogonalised(variant):
    config = make_config(variant)

    def make():
        model = Mamba2ForCausalLM(config, rngs=nnx.Rngs(0))
        add_lora(model, LoraConfig(targets=("in_proj", "out_proj", "lm_head")), rngs=nnx.Rngs(1))
        return model

    for path in parameters_of(make):
        *_, module, name = path.split(".")
        is_vector = name.startswith("bias") or module.startswith("norm") or name in ("A_log", "D", "dt_bias")
        assert decayed(path) is not is_vector, path
        is_matrix = name.startswith("weight") and module in ("in_proj", "out_proj", "fc1", "fc2")
        assert projection(path) is is_matrix, path


def with_experts(variant):
    return make_config(variant).replace(
        experts_cfg=ExpertsConfig(num_experts=4, width=24, top_k=2, gated=False, router="sigmoid"),
        shared_mlp_cfg=MLPConfig(width=40, layout="up_down"),
    )


@pytest.mark.parametrize("kind", KINDS)
def test_a_kind_is_its_tensors_its_module_and_its_state(kind):
    assert KINDS.keys() == MODULES.keys()
    config = with_experts("hybrid, MLPs, no biases")
    tensors = KINDS[kind].tensors.stored(config)
    shapes = {leaf.path: leaf.shape for stored in tensors for leaf in stored.leaves}
    assert shapes
    module = nnx.eval_shape(lambda: MODULES[kind](config, rngs=nnx.Rngs(0)))
    flat = nnx.to_flat_state(nnx.state(module))
    assert {".".join(path): leaf.shape for path, leaf in flat} == shapes
    if kind not in MIXERS:
        return

    def step():
        mixer = MIXERS[kind](config, rngs=nnx.Rngs(0))
        state = mixer.empty_state(config, 2, dtype="float32", ssm_dtype="float32", capacity=5)
        zero = jnp.zeros(2, jnp.int32)
        rows = Rows(past=zero, positions=zero[:, None])
        return state, mixer.mix(jnp.zeros((2, 1, config.hidden_size)), state, rows)[1]

    before, after = jax.eval_shape(step)
    assert jax.tree.map(lambda a: (a.shape, a.dtype), before) == jax.tree.map(
        lambda a: (a.shape, a.dtype), after
    )


def test_leaves_of_one_name_are_alike_in_every_kind():
    seen = {}
    for kind in KINDS.values():
        for variant in ("hybrid", "hybrid, MLPs, no biases"):
            for stored in kind.tensors.stored(with_experts(variant)):
                for leaf in stored.leaves:
                    assert seen.setdefault((kind.attributes[0], leaf.path), (leaf.axes, leaf.role)) == (
                        leaf.axes,
                        leaf.role,
                    )


def test_the_kinds_of_layers_decide_what_a_cache_holds():
    config = make_config("hybrid")
    assert config.layer_pattern == "M*M"
    assert config.attends
    assert not make_config("plain").attends
    cache = jax.eval_shape(lambda: Mamba2Cache.zeros(config, 1, capacity=7))
    assert [kept is not None for kept in cache.attention] == [False, True, False]
    assert [state is not None for state in cache.ssm] == [True, False, True]


def test_a_config_with_cached_kinds_is_the_same_config():
    config, other = make_config("hybrid"), make_config("hybrid")
    assert config.layers
    assert config == other
    assert hash(config) == hash(other)
    assert config.replace(num_hidden_layers=2).layer_pattern == "M*"
