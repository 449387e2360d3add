"""Bamba: a Mamba-2 or attention mixer in each layer, then a gated MLP. Half of each head is rotated.

Source: transformers' `modeling_bamba.py`; ibm-fms/Bamba-9B.
"""

from typing import Any

from mamba2_jax.config.families.family import COMMON_KEYS, Family
from mamba2_jax.config.families.file import ConfigFile
from mamba2_jax.config.mlp import MLPConfig


def mixer_fields(file: ConfigFile, hidden_size: int, eps: float) -> dict[str, Any]:
    """Read the sizes of the Mamba-2 mixer under the keys that Bamba, Granite and Falcon-H1 share."""
    expand, heads = file.integer("mamba_expand", 2), file.integer("mamba_n_heads", 128)
    head_dim = file.get("mamba_d_head", "auto")
    file.want("hidden_act", "silu", "swish")
    for key in ("attention_bias", "mlp_bias"):
        file.want(key, False)
    return {
        "hidden_size": hidden_size,
        "expand": expand,
        "num_heads": heads,
        "head_dim": expand * hidden_size // heads if head_dim in ("auto", None) else head_dim,
        "state_size": file.integer("mamba_d_state", 256),
        "n_groups": file.integer("mamba_n_groups", 1),
        "conv_kernel": file.integer("mamba_d_conv", 4),
        "chunk_size": file.integer("mamba_chunk_size", 256),
        "use_conv_bias": file.get("mamba_conv_bias", True),
        "use_bias": file.get("mamba_proj_bias", False),
        "time_step_limit": file.limits(),
        "layer_norm_epsilon": file.number("rms_norm_eps", eps),
        "residual_in_fp32": False,
        "initializer_range": file.number("initializer_range", 0.02),
    }


def attention_fields(file: ConfigFile, hidden_size: int, key_heads: int | None) -> dict[str, Any]:
    """Read the sizes of the attention mixer; head_dim is a key of its own in some files."""
    heads = file.integer("num_attention_heads", 32)
    return {
        "num_heads": heads,
        "num_heads_kv": file.get("num_key_value_heads", key_heads) or heads,
        "head_dim": file.get("head_dim", None) or hidden_size // heads,
        "qkv_proj_bias": False,
        "out_proj_bias": False,
        "separate": True,
    }


def _read(file: ConfigFile) -> dict[str, Any]:
    hidden_size, layers = file.integer("hidden_size", 4096), file.layers(32)
    pattern = file.layer_letters("layers_block_type", "layer_types")
    if pattern is None:
        attention = file.get("attn_layer_indices", None) or ()
        pattern = "".join("*" if index in attention else "M" for index in range(layers))
    heads = attention_fields(file, hidden_size, 8)
    file.get("attn_layer_indices", None)
    fields = mixer_fields(file, hidden_size, 1e-5) | file.special_tokens(0, 1, 2)
    fields |= {
        "vocab_size": file.integer("vocab_size", 128000),
        "tie_word_embeddings": file.get("tie_word_embeddings", False),
        "num_hidden_layers": layers,
        "layer_pattern": pattern,
        "feed_forward": ("mlp",),
        "mlp_cfg": MLPConfig(width=file.integer("intermediate_size", 14336)),
        "attn_cfg": heads | file.rotary(heads["head_dim"], fraction=0.5),
    }
    file.refuse_unread(["z_loss_coefficient"])
    return fields


BAMBA = Family(
    title="Bamba",
    architecture="BambaForCausalLM",
    read=_read,
    outside={
        "backbone.embeddings.": "model.embed_tokens.",
        "backbone.norm_f.": "model.final_layernorm.",
    },
    layers="model.layers.",
    inside={
        "norm.": "input_layernorm.",
        "norm2.": "pre_ff_layernorm.",
        "mamba2.": "mamba.",
        "attention.": "self_attn.",
        "mlp.": "feed_forward.",
    },
    write=COMMON_KEYS,
)
