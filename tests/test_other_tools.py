"""What the loaders of other tools want of a checkpoint, transcribed from their sources."""

import json
import math

import jax.numpy as jnp
import pytest
import transformers
from flax import nnx

from mamba2_jax import Mamba2ForCausalLM
from mamba2_jax.config import Mamba2Config
from mamba2_jax.weights import open_checkpoint

SIZES = {"hidden_size": 32, "head_dim": 8, "num_heads": 8, "n_groups": 2, "state_size": 16}
# mlx_lm 0.32.2, models/mamba2.py: fields of `ModelArgs` without a default
MLX_WANTS = {
    *("model_type", "num_heads", "head_dim", "vocab_size", "hidden_size", "intermediate_size", "state_size"),
    *("num_hidden_layers", "layer_norm_epsilon", "conv_kernel", "n_groups", "use_bias", "use_conv_bias"),
    *("tie_word_embeddings", "time_step_limit", "time_step_rank"),
}
# vllm, models/mamba2.py: attributes of the config that transformers loads
VLLM_WANTS = {
    *("hidden_size", "state_size", "conv_kernel", "intermediate_size", "expand", "use_conv_bias", "use_bias"),
    *("n_groups", "num_heads", "head_dim", "layer_norm_epsilon", "hidden_act", "vocab_size"),
    *("num_hidden_layers", "tie_word_embeddings"),
}


@pytest.fixture(scope="module", params=[48, 50])
def folder(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("other") / "model"
    config = Mamba2Config(**SIZES, num_hidden_layers=2, vocab_size=request.param)
    Mamba2ForCausalLM(config, rngs=nnx.Rngs(0), param_dtype=jnp.bfloat16).save_pretrained(folder)
    return folder


def test_mlx(folder):
    file = json.loads((folder / "config.json").read_text())
    assert file.keys() >= MLX_WANTS
    assert file["intermediate_size"] == 64
    assert file["time_step_limit"] == [0.0, math.inf]  # numbers: older ones pass them to mx.clip as they are
    assert file["torch_dtype"] == "bfloat16"  # what its converter keeps


def test_llama_cpp(folder):
    """Its `Mamba2Model` of the converter, as in llama-cpp-python 0.3.36."""
    file = json.loads((folder / "config.json").read_text())
    assert file["architectures"] == ["Mamba2ForCausalLM"]
    assert file["intermediate_size"] == 2 * file["hidden_size"]
    multiple = file.get("pad_vocab_size_multiple", 16)
    with open_checkpoint(folder) as checkpoint:
        rows = checkpoint.tensors["backbone.embeddings.weight"].shape[0]
        assert all(name.startswith(("backbone.", "lm_head.")) for name in checkpoint.tensors)
    assert -(file["vocab_size"] // -multiple) * multiple == rows


def test_vllm_and_transformers(folder):
    config = transformers.AutoConfig.from_pretrained(folder)
    assert all(getattr(config, name) is not None for name in VLLM_WANTS)
    assert config.architectures == ["Mamba2ForCausalLM"]
    assert config.dtype == "bfloat16" or str(config.dtype) == "torch.bfloat16"
    assert tuple(config.time_step_limit) == (0.0, math.inf)
    assert Mamba2Config.from_dict(config.to_dict()) == Mamba2Config.from_pretrained(folder)


def test_no_infinity_is_tagged_as_only_transformers_5_reads_it(tmp_path):
    file = {
        "model_type": "bamba",
        "num_hidden_layers": 1,
        "time_step_limit": [0.0, {"__float__": "Infinity"}],
    }
    assert Mamba2Config.from_dict(file).to_dict()["time_step_limit"] == [0.0, math.inf]
