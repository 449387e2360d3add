"""Granite 4.0: a Mamba-2 or attention mixer in each layer, then an MLP; dense, or with a mixture of experts.

The models without Mamba-2 layers (350M, 1B, Micro) have the same class, with rotary embeddings.

Source: transformers' `modeling_granitemoehybrid.py`; ibm-granite/granite-4.0-h-350m.
"""

from typing import Any

from mamba2_jax.config.experts import ExpertsConfig
from mamba2_jax.config.families.bamba import attention_fields, mixer_fields
from mamba2_jax.config.families.family import COMMON_KEYS, Family
from mamba2_jax.config.families.file import ConfigFile
from mamba2_jax.config.mlp import MLPConfig, Multipliers


def _read(file: ConfigFile) -> dict[str, Any]:
    hidden_size, layers = file.integer("hidden_size", 4096), file.layers(32)
    heads = attention_fields(file, hidden_size, None)
    heads["softmax_scale"] = file.number("attention_multiplier", 1.0)
    rotary = file.rotary(heads["head_dim"])  # the keys are there also where the model does not rotate
    if file.get("position_embedding_type", None) == "rope":
        heads |= rotary
    experts = None
    if count := file.get("num_local_experts", 8):
        experts = ExpertsConfig(
            num_experts=count,
            width=file.integer("intermediate_size", 11008),
            top_k=file.integer("num_experts_per_tok", 2),
            gated=True,
        )
    fields = mixer_fields(file, hidden_size, 1e-6) | file.special_tokens(None, 1, 2)
    fields |= {
        "vocab_size": file.integer("vocab_size", 32000),
        "tie_word_embeddings": file.get("tie_word_embeddings", False),
        "num_hidden_layers": layers,
        "layer_pattern": file.layer_letters("layer_types", "layers_block_type") or "M" * layers,
        "feed_forward": ("experts", "mlp") if experts else ("mlp",),
        "experts_cfg": experts,
        "mlp_cfg": MLPConfig(
            width=file.integer("shared_intermediate_size", 1024), layout="input_output_linear"
        ),
        "attn_cfg": heads,
        "multipliers": Multipliers(
            embedding=file.number("embedding_multiplier", 1.0),
            residual=file.number("residual_multiplier", 1.0),
            logits=1 / file.number("logits_scaling", 1.0),
        ),
    }
    file.refuse_unread(["intermediate_size", "num_experts_per_tok", "router_aux_loss_coef"])
    return fields


GRANITE = Family(
    title="Granite 4.0",
    architecture="GraniteMoeHybridForCausalLM",
    read=_read,
    outside={"backbone.embeddings.": "model.embed_tokens.", "backbone.norm_f.": "model.norm."},
    layers="model.layers.",
    inside={
        "norm.": "input_layernorm.",
        "norm2.": "post_attention_layernorm.",
        "mamba2.": "mamba.",
        "attention.": "self_attn.",
        "mlp.": "shared_mlp.",
        "experts.router.": "block_sparse_moe.router.layer.",
        "experts.up": "block_sparse_moe.input_linear.weight",
        "experts.down": "block_sparse_moe.output_linear.weight",
    },
    write=COMMON_KEYS,
)
