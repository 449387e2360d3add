"""Every architecture of the original: logits and gradients against `original.py`."""

import copy
import json

import jax
import numpy as np
import pytest
from flax import nnx
from models import random_ids, relative, torch_model

from mamba2_jax import Mamba2Config, Mamba2ForCausalLM
from mamba2_jax.weights.table import assemble, checkpoint_table

torch = pytest.importorskip("torch")
from original import MLP, Attention, Original, rotate  # noqa: E402
from safetensors.torch import save_file  # noqa: E402
from torch.nn import functional as F  # noqa: E402

TOLERANCE = 2e-5  # float32 sums in another order, through two layers
GRADIENT_TOLERANCE = 1e-4  # sums over all tokens cancel

# state-spaces' own config.json, and its ssm_cfg
SHAPE = {"d_model": 32, "n_layer": 1, "vocab_size": 91, "pad_vocab_size_multiple": 8}
SSM = {"layer": "Mamba2", "headdim": 8, "d_state": 8, "ngroups": 2}
HEADS = {"causal": True, "num_heads": 4, "head_dim": 8}
PUBLISHED_HEADS = HEADS | {
    "d_conv": 4,
    "rotary_emb_dim": 4,
    "qkv_proj_bias": False,
    "out_proj_bias": False,
}


def hybrid(attention: dict, ssm: dict | None = None, **changes) -> dict:
    return {
        **SHAPE,
        "n_layer": 2,
        "ssm_cfg": SSM | (ssm or {}),
        "attn_layer_idx": [1],
        "attn_cfg": attention,
        **changes,
    }


VARIANTS = {
    "plain": {"ssm_cfg": SSM},
    "part of the width": {"ssm_cfg": SSM | {"d_ssm": 32}},
    "D per channel": {"ssm_cfg": SSM | {"D_has_hdim": True}},
    "norm before gate": {"ssm_cfg": SSM | {"norm_before_gate": True}},
    "gate alone": {"ssm_cfg": SSM | {"rmsnorm": False}},
    "MLP": {"ssm_cfg": SSM, "d_intermediate": 40},
    "biases, own head": {"ssm_cfg": SSM | {"bias": True, "ngroups": 1}, "tie_embeddings": False},
    "no convolution bias": {"ssm_cfg": SSM | {"conv_bias": False, "d_conv": 3}},
    "dt limits": {"ssm_cfg": SSM | {"dt_limit": [0.5, 1.5]}},
    "all at once": {
        "ssm_cfg": SSM
        | {
            "d_ssm": 48,
            "D_has_hdim": True,
            "norm_before_gate": True,
            "bias": True,
            "dt_limit": [0.5, 1.5],
        },
        "d_intermediate": 130,
    },
    "hybrid as published": hybrid(PUBLISHED_HEADS),
    "hybrid, grouped keys, interleaved": hybrid(
        PUBLISHED_HEADS | {"num_heads_kv": 2, "rotary_emb_interleaved": True, "rotary_emb_base": 100.0},
        {"ngroups": 1},
    ),
    "hybrid, no convolution, biases, scale, one key head": hybrid(
        HEADS | {"num_heads_kv": 1, "rotary_emb_dim": 8, "softmax_scale": 0.5}, d_intermediate=8
    ),
    "hybrid, MLP beside the heads, no positions": hybrid(HEADS | {"mlp_dim": 9, "d_conv": 2}),
}


@jax.jit
def loss_and_gradient(model, ids):
    def loss(model):
        out = model(ids, labels=ids)
        return out.loss, out.logits

    return jax.grad(loss, has_aux=True)(model)


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_and_gradients(variant, tmp_path):
    file = SHAPE | VARIANTS[variant]
    config = Mamba2Config.from_dict(file)
    theirs = Original(config)
    (tmp_path / "config.json").write_text(json.dumps(file))
    save_file(
        {n: t.float().contiguous() for n, t in theirs.state_dict().items()}, tmp_path / "model.safetensors"
    )
    ours = Mamba2ForCausalLM.from_pretrained(tmp_path)
    assert sum(p.numel() for p in theirs.parameters()) == config.num_parameters()

    ids = random_ids(2, 21, config.real_vocab_size)
    want = theirs(torch.tensor(ids))
    F.cross_entropy(want[:, :-1].flatten(0, 1), torch.tensor(ids)[:, 1:].flatten()).backward()
    gradient, logits = loss_and_gradient(ours, ids)
    assert relative(logits, want.detach()) < TOLERANCE

    leaves = nnx.to_flat_state(nnx.state(gradient))
    arrays = {".".join(map(str, path)): np.asarray(leaf[...]) for path, leaf in leaves}
    gradients = {
        stored.name.replace("embeddings", "embedding"): assemble(stored, arrays)
        for stored in checkpoint_table(config)
        if stored.leaves
    }
    assert set(gradients) == {name for name, _ in theirs.named_parameters()}
    for name, parameter in theirs.named_parameters():
        assert relative(gradients[name], parameter.grad) < GRADIENT_TOLERANCE, name


class TestTheReference:
    """`original.py` against transformers, both in float64: what they share must be the same."""

    @pytest.mark.parametrize(
        "changes", [{}, {"n_groups": 1, "use_bias": True, "time_step_limit": (0.01, 0.06)}], ids=str
    )
    def test_mamba2_is_transformers(self, changes):
        theirs = copy.deepcopy(torch_model(**changes)).double()
        ours = Original(Mamba2Config.from_dict(theirs.config.to_dict()))
        state = {n.replace("embeddings", "embedding"): t for n, t in theirs.state_dict().items()}
        ours.load_state_dict(state)
        ids = torch.tensor(random_ids(2, 33))
        # transformers computes norms and the scan in float32 whatever the model's dtype
        assert relative(ours(ids).detach(), theirs(ids).logits) < 1e-5

    @pytest.mark.parametrize("interleaved", [False, True])
    def test_rotation_is_that_of_gpt_neox_and_gpt_j(self, interleaved):
        from transformers.models.gptj import modeling_gptj
        from transformers.models.llama import modeling_llama

        x = torch.randn(2, 7, 3, 8, dtype=torch.float64)
        angles = torch.outer(torch.arange(7.0), 100.0 ** (-torch.arange(0, 6, 2) / 6)).double()
        if interleaved:
            turned = modeling_gptj.apply_rotary_pos_emb(x[..., :6], angles.sin()[None], angles.cos()[None])
        else:
            double = torch.cat([angles, angles], -1)[None]
            turned, _ = modeling_llama.apply_rotary_pos_emb(
                x[..., :6], x[..., :6], double.cos(), double.sin(), unsqueeze_dim=2
            )
        want = torch.cat([turned, x[..., 6:]], -1)
        assert relative(rotate(x, 6, 100.0, interleaved), want) < 1e-6  # their angles are float32

    def test_attention_with_grouped_keys_is_llamas(self):
        from transformers.models.llama import LlamaConfig, modeling_llama

        heads = HEADS | {
            "num_heads_kv": 2,
            "rotary_emb_dim": 8,
            "qkv_proj_bias": False,
            "out_proj_bias": False,
        }
        config = Mamba2Config.from_dict(hybrid(heads))
        ours = Attention(config).double()
        settings = LlamaConfig(
            hidden_size=32,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
            attn_implementation="eager",
        )
        theirs = modeling_llama.LlamaAttention(settings, 0).double()
        q, k, v = (getattr(theirs, f"{name}_proj").weight for name in "qkv")
        ours.load_state_dict(
            {"in_proj.weight": torch.cat([q, k, v]), "out_proj.weight": theirs.o_proj.weight}
        )
        x = torch.randn(2, 9, 32, dtype=torch.float64)
        places = modeling_llama.LlamaRotaryEmbedding(settings)(x, torch.arange(9)[None])
        mask = torch.full((9, 9), -torch.inf, dtype=torch.float64).triu(1)[None, None]
        want, _ = theirs(x, position_embeddings=places, attention_mask=mask)
        # their softmax and angles are float32
        assert relative(ours(x).detach(), want.detach()) < 1e-5

    def test_mlp_is_llamas(self):
        from transformers.models.llama import LlamaConfig, modeling_llama

        ours = MLP(Mamba2Config.from_dict(SHAPE | {"ssm_cfg": SSM, "d_intermediate": 128})).double()
        theirs = modeling_llama.LlamaMLP(LlamaConfig(hidden_size=32, intermediate_size=128)).double()
        fc1 = torch.cat([theirs.up_proj.weight, theirs.gate_proj.weight])
        ours.load_state_dict({"fc1.weight": fc1, "fc2.weight": theirs.down_proj.weight})
        x = torch.randn(2, 9, 32, dtype=torch.float64)
        assert relative(ours(x).detach(), theirs(x).detach()) < 1e-12
