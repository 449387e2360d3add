"""Nemotron-H, Nemotron Nano 2 and Nemotron 3: one module in each layer, a mixer or an MLP with relu squared.

dt is clamped to `time_step_limit` in prefill and in decoding, as in NVIDIA's code. transformers 5.24 ignores
that key, and instead raises dt to `time_step_min` in prefill only, which differs from the published model.

Source: transformers' `modeling_nemotron_h.py`; nvidia/NVIDIA-Nemotron-Nano-9B-v2.
"""

from typing import Any

from mamba2_jax.config.experts import ExpertsConfig
from mamba2_jax.config.families.family import COMMON_KEYS, EACH, Family
from mamba2_jax.config.families.file import ConfigFile
from mamba2_jax.config.mlp import MLPConfig

# Older files have the keys on the right.
_OTHER_KEYS = {
    "n_groups": "mamba_n_groups",
    "conv_kernel": "mamba_d_conv",
    "expand": "mamba_expand",
    "time_step_min": "mamba_dt_min",
    "time_step_max": "mamba_dt_max",
    "time_step_limit": "mamba_dt_limit",
    "time_step_floor": "mamba_dt_init_floor",
    "use_conv_bias": "mamba_conv_bias",
    "chunk_size": "mamba_chunk_size",
    "head_dim": "attention_head_dim",
}
# Ignored by transformers too, or used in training and initialisation only.
_HARMLESS = (
    *("attention_bias", "mamba_proj_bias", "mamba_ssm_cache_dtype", "mlp_hidden_act", "n_shared_experts"),
    *("moe_shared_expert_overlap", "num_hidden_layers", "num_nextn_predict_layers", "partial_rotary_factor"),
    *(
        "mtp_hybrid_override_pattern",
        "mtp_layers_block_type",
        "residual_in_fp32",
        "rms_norm_eps",
        "rope_theta",
    ),
    *("rescale_prenorm_residual", "rope_parameters", "time_step_rank", "norm_eps"),
)
_MOE = (  # unread without experts
    *("moe_intermediate_size", "moe_latent_size", "moe_shared_expert_intermediate_size", "n_group"),
    *("n_routed_experts", "norm_topk_prob", "num_experts_per_tok", "routed_scaling_factor", "topk_group"),
)


def _read(file: ConfigFile) -> dict[str, Any]:
    older = {key: file.content[old] for key, old in _OTHER_KEYS.items() if old in file.content}
    file = ConfigFile({**older, **file.content})
    hidden_size, heads = file.integer("hidden_size", 4096), file.integer("mamba_num_heads", 128)
    head_dim = file.integer("mamba_head_dim", 64)
    for key, values in {"mamba_hidden_act": ("silu", "swish"), "mlp_hidden_act": ("relu2",)}.items():
        file.want(key, *values)
    for key in ("mlp_bias", "sliding_window"):
        file.want(key, False, None)
    pattern = _pattern(file)
    width = file.integer("intermediate_size", 21504)
    fields = file.special_tokens(0, 1, 2) | {
        "hidden_size": hidden_size,
        "vocab_size": file.integer("vocab_size", 131072),
        "tie_word_embeddings": file.get("tie_word_embeddings", False),
        "num_hidden_layers": len(pattern),
        "layer_pattern": pattern,
        "feed_forward": (),
        "expand": file.integer("expand", 2),
        "d_ssm": heads * head_dim,
        "num_heads": heads,
        "head_dim": head_dim,
        "state_size": file.integer("ssm_state_size", 128),
        "n_groups": file.integer("n_groups", 8),
        "conv_kernel": file.integer("conv_kernel", 4),
        "chunk_size": file.integer("chunk_size", 128),
        "use_conv_bias": file.get("use_conv_bias", True),
        "use_bias": file.get("use_bias", False),
        "time_step_limit": file.limits(),
        "time_step_min": file.number("time_step_min", 0.001),
        "time_step_max": file.number("time_step_max", 0.1),
        "time_step_floor": file.number("time_step_floor", 1e-4),
        "layer_norm_epsilon": file.number("layer_norm_epsilon", 1e-5),
        "residual_in_fp32": False,
        "initializer_range": file.number("initializer_range", 0.02),
        "mlp_cfg": MLPConfig(width=width, layout="up_down") if "-" in pattern else None,
        "attn_cfg": {
            "num_heads": file.integer("num_attention_heads", 32),
            "num_heads_kv": file.integer("num_key_value_heads", 8),
            "head_dim": file.integer("head_dim", 128),
            "qkv_proj_bias": False,
            "out_proj_bias": False,
            "separate": True,
        },
    }
    if "E" in pattern:
        fields |= _expert_fields(file)
    file.refuse_unread([*_HARMLESS, *_OTHER_KEYS.values(), *_MOE])
    return fields


def _expert_fields(file: ConfigFile) -> dict[str, Any]:
    """Read the mixture of experts, and the expert that all tokens share."""
    file.want("n_shared_experts", 1)  # transformers ignores the number, others multiply the width by it
    width = file.integer("moe_shared_expert_intermediate_size", 7688)
    experts = ExpertsConfig(
        num_experts=file.integer("n_routed_experts", 8),
        width=file.integer("moe_intermediate_size", 7688),
        top_k=file.integer("num_experts_per_tok", 2),
        gated=False,
        router="sigmoid",
        num_groups=file.integer("n_group", 1),
        groups_kept=file.integer("topk_group", 1),
        normalised=file.get("norm_topk_prob", True),
        scale=file.number("routed_scaling_factor", 1.0),
        latent_size=file.get("moe_latent_size", None) or 0,
    )
    return {"experts_cfg": experts, "shared_mlp_cfg": MLPConfig(width=width, layout="up_down")}


def _pattern(file: ConfigFile) -> str:
    """Return one letter per layer, from the list of transformers 5 or the string of older files."""
    letters = file.layer_letters("layers_block_type", "layer_types")
    pattern = file.get("hybrid_override_pattern", None)
    if letters is None and pattern is None:
        raise ValueError("config: 'nemotron_h' has neither layers_block_type nor hybrid_override_pattern")
    if letters is None and (not isinstance(pattern, str) or set(pattern) - set("M*-E") or not pattern):
        raise ValueError(f"config: hybrid_override_pattern={pattern!r}, wants letters of 'M*-E'")
    return pattern if letters is None else letters


NEMOTRON_H = Family(
    title="Nemotron-H",
    architecture="NemotronHForCausalLM",
    read=_read,
    outside={},
    layers="backbone.layers.",
    inside={
        **dict.fromkeys(("mamba2.", "attention.", "mlp."), "mixer."),
        "shared_expert.": "mixer.shared_experts.",
        "experts.router.weight": "mixer.gate.weight",
        "experts.router.correction": "mixer.gate.e_score_correction_bias",
        "experts.up": f"mixer.experts.{EACH}.up_proj.weight",
        "experts.down": f"mixer.experts.{EACH}.down_proj.weight",
        "experts.fc1_latent.": "mixer.fc1_latent_proj.",
        "experts.fc2_latent.": "mixer.fc2_latent_proj.",
    },
    write=COMMON_KEYS,
    ignored=("mtp.",),
)
