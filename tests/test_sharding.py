"""The table from parameter path to PartitionSpec, and the meshes it is for."""

import warnings

import jax
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AbstractMesh, AxisType, Mesh

from mamba2_jax import Mamba2Config, Mamba2ForCausalLM
from mamba2_jax.lora import LoraConfig, add_lora
from mamba2_jax.mesh import AXES, check_mesh, make_mesh
from mamba2_jax.sharding import parameter_shardings, parameter_spec

SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_heads": 8,
    "head_dim": 8,
    "state_size": 16,
    "n_groups": 2,
    "vocab_size": 96,
}
HYBRID = {"attn_layer_idx": (1,), "attn_cfg": {"num_heads": 4, "num_heads_kv": 2, "head_dim": 8, "d_conv": 4}}
VARIANTS = {
    "plain": {},
    "biases": {"use_bias": True},
    "MLP beside": {"num_heads": 4, "d_ssm": 32, "use_bias": True},
    "MLP after": {"d_intermediate": 8},
    "hybrid": HYBRID,
    "hybrid with an MLP": {**HYBRID, "attn_cfg": {**HYBRID["attn_cfg"], "mlp_dim": 1}},
    "D per channel": {"D_has_hdim": True},
}


def mesh_of(**sizes: int) -> AbstractMesh:
    return AbstractMesh(tuple(sizes.get(axis, 1) for axis in AXES), AXES, (AxisType.Auto,) * 4)


def shapes_of(config: Mamba2Config) -> dict[str, tuple[int, ...]]:
    def make():
        model = Mamba2ForCausalLM(config, rngs=nnx.Rngs(0))
        kinds = ["in_proj", "out_proj", "embeddings", "lm_head", "conv1d"]
        add_lora(
            model,
            LoraConfig(targets=(*kinds, *["fc1", "fc2"] * bool(config.d_intermediate))),
            rngs=nnx.Rngs(1),
        )
        return model

    state = nnx.state(nnx.eval_shape(make), nnx.Param)
    return {".".join(map(str, path)): leaf.shape for path, leaf in nnx.to_flat_state(state)}


@pytest.mark.parametrize(
    "sizes", [{"tensor": 2}, {"tensor": 2, "fsdp": 4}, {"tensor": 8}, {"fsdp": 8}], ids=str
)
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_leaf_is_cut_evenly_and_most_of_the_model_is_cut(variant, sizes):
    config = Mamba2Config(**{**SIZES, **VARIANTS[variant]})
    mesh = mesh_of(**sizes)
    whole = cut = 0
    for path, shape in shapes_of(config).items():
        spec = parameter_spec(path, config, mesh)
        assert len(spec) <= len(shape), path
        for size, axis in zip(shape, spec, strict=False):
            assert axis is None or size % mesh.shape[axis] == 0, path
        devices = np.prod([mesh.shape[axis] for axis in spec if axis is not None])
        whole, cut = whole + np.prod(shape), cut + np.prod(shape) / devices
    if "MLP" not in variant:  # with an MLP beside the heads, the output projection stays whole
        assert cut < whole * (0.75 if sizes == {"tensor": 8} else 0.6)


def test_what_belongs_to_a_head_is_cut_alike():
    config, mesh = Mamba2Config(**SIZES), mesh_of(tensor=2)
    at = "backbone.layers.1.mixer."
    last = {
        name: parameter_spec(at + name, config, mesh)[-1]
        for name in ("in_proj.weight_zx", "in_proj.weight_dt", "conv1d.weight_x", "A_log", "D", "norm.weight")
    }
    assert set(last.values()) == {"tensor"}
    assert parameter_spec(at + "out_proj.weight", config, mesh) == jax.P("tensor", "fsdp")
    assert parameter_spec(at + "in_proj.lora.default.B.weight_zx", config, mesh) == jax.P(
        None, None, "tensor"
    )
    assert parameter_spec(at + "in_proj.lora.default.A", config, mesh) == jax.P("fsdp")
    assert parameter_spec("backbone.norm_f.weight", config, mesh) == jax.P()


def test_what_does_not_divide_is_named_once():
    config = Mamba2Config(**SIZES)
    paths = [f"backbone.layers.{i}.mixer.{name}" for i in (0, 1) for name in ("A_log", "in_proj.weight_BC")]
    mesh = Mesh(np.array(jax.devices() * 1).reshape(1, 1, 1, 1), AXES)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert set(parameter_shardings(paths, config, mesh)) == set(paths)
    odd = mesh_of(tensor=3)
    with pytest.warns(UserWarning, match="kept whole on every device") as caught:
        shardings = parameter_shardings(paths, config, odd)
    assert len(caught) == 1
    message = str(caught[0].message)
    assert "tensor=3 does not divide heads=8: backbone.layers.*.mixer.A_log" in message
    assert "tensor=3 does not divide groups=2" in message
    assert all(sharding.spec in (jax.P(None), jax.P("fsdp", None, None)) for sharding in shardings.values())


def test_fewer_groups_than_devices_is_no_surprise():
    config, mesh = Mamba2Config(**SIZES), mesh_of(tensor=8)
    path = "backbone.layers.0.mixer.in_proj.weight_BC"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        shardings = parameter_shardings([path], config, mesh)
    assert shardings[path].spec == jax.P("fsdp", None, None)


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        (
            {"data": 3},
            r"data 3 makes 3 devices, but there are 1; the sizes must multiply to 1, each one of 1",
        ),
        ({"fsdp": 2}, r"fsdp 2 makes 2 devices"),
        ({"data": -1, "tensor": -1}, r"data and tensor are both -1"),
        ({"tensor": 0}, r"tensor=0 must be a positive integer"),
        ({"tensor": 1.5}, r"tensor=1.5 must be"),
        ({"tensor": True}, r"tensor=True must be"),
    ],
)
def test_impossible_meshes(sizes, words):
    with pytest.raises(ValueError, match=words):
        make_mesh(**sizes, devices=jax.devices()[:1])


def test_meshes_of_others_are_checked():
    check_mesh("f", make_mesh(devices=jax.devices()[:1]))
    one = np.array(jax.devices()[:1])
    with pytest.raises(ValueError, match=r"f: the mesh has axes \('model',\), and lacks data, fsdp"):
        check_mesh("f", Mesh(one, ("model",)))
    with pytest.raises(ValueError, match=r"want AxisType.Auto"):
        check_mesh("f", jax.make_mesh((1,) * 4, AXES, (AxisType.Explicit,) * 4, devices=jax.devices()[:1]))
