"""Config files of published models of the families, as far as they set sizes, for the benchmarks.

From the published descriptions of the models; constants that change no cost are left at their defaults.
"""

from typing import Any

from mamba2_jax import Mamba2Config

_GRANITE = {
    "model_type": "granitemoehybrid",
    **{"vocab_size": 100352, "mamba_d_state": 128, "mamba_n_groups": 1, "tie_word_embeddings": True},
    **{"position_embedding_type": "nope", "embedding_multiplier": 12.0, "residual_multiplier": 0.22},
}
_NEMOTRON = {
    "model_type": "nemotron_h",
    **{"vocab_size": 131072, "ssm_state_size": 128, "n_groups": 8, "head_dim": 128},
}


def _granite_layers(count: int, attention: tuple[int, ...]) -> list[str]:
    return ["attention" if index in attention else "mamba" for index in range(count)]


SHAPES: dict[str, dict[str, Any]] = {
    "granite-4.0-h-350m": {
        **{**_GRANITE, "hidden_size": 768, "num_hidden_layers": 32, "shared_intermediate_size": 2048},
        **{"layer_types": _granite_layers(32, (10, 13, 17, 27)), "num_local_experts": 0},
        **{"mamba_n_heads": 48, "mamba_d_head": 32, "num_attention_heads": 12, "num_key_value_heads": 4},
        **{"attention_multiplier": 0.015625, "logits_scaling": 3.0},
    },
    "granite-4.0-h-small": {
        **{**_GRANITE, "hidden_size": 4096, "num_hidden_layers": 40, "shared_intermediate_size": 1536},
        **{"layer_types": _granite_layers(40, (5, 15, 25, 35)), "num_local_experts": 72},
        **{"num_experts_per_tok": 10, "intermediate_size": 768, "mamba_n_heads": 128, "mamba_d_head": 64},
        **{"num_attention_heads": 32, "num_key_value_heads": 8, "attention_multiplier": 0.0078125},
    },
    "falcon-h1-0.5b": {
        **{"model_type": "falcon_h1", "vocab_size": 32784, "hidden_size": 1024, "num_hidden_layers": 36},
        **{"intermediate_size": 2048, "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 64},
        **{"mamba_d_ssm": 1536, "mamba_n_heads": 24, "mamba_d_head": 64, "mamba_d_state": 128},
        **{"mamba_n_groups": 1, "tie_word_embeddings": False, "rope_theta": 1e11},
    },
    "nemotron-nano-9b-v2": {
        **{**_NEMOTRON, "hidden_size": 4480, "intermediate_size": 15680, "num_attention_heads": 40},
        **{"hybrid_override_pattern": "M-M-M-MM-M-M-M*-M-M-M*-M-M-M-M*-M-M-M-M*-M-MM-M-M-M-M-M-"},
        **{"mamba_num_heads": 128, "mamba_head_dim": 80, "num_key_value_heads": 8},
    },
    "nemotron-3-nano-30b-a3b": {
        **{**_NEMOTRON, "hidden_size": 2688, "intermediate_size": 1856, "num_attention_heads": 32},
        **{"hybrid_override_pattern": "MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME"},
        **{"mamba_num_heads": 64, "mamba_head_dim": 64, "num_key_value_heads": 2, "n_routed_experts": 128},
        **{"num_experts_per_tok": 6, "moe_intermediate_size": 1856, "routed_scaling_factor": 2.5},
        **{"moe_shared_expert_intermediate_size": 3712},
    },
}
# Nemotron's own layers at a size of this machine: one of each kind for every two of Mamba-2.
SHAPES["nemotron-3-scaled-down"] = SHAPES["nemotron-3-nano-30b-a3b"] | {
    **{"hidden_size": 768, "hybrid_override_pattern": "MEM*" * 3, "vocab_size": 32768, "head_dim": 64},
    **{"num_attention_heads": 12, "mamba_num_heads": 24, "n_routed_experts": 32, "num_experts_per_tok": 4},
    **{"moe_intermediate_size": 512, "moe_shared_expert_intermediate_size": 1024, "n_groups": 4},
}
# Bamba has one size, 9B: its own layers at a size of this machine.
SHAPES["bamba-scaled-down"] = {
    **{"model_type": "bamba", "vocab_size": 32768, "hidden_size": 768, "num_hidden_layers": 12},
    **{"intermediate_size": 2688, "attn_layer_indices": [4, 9], "num_attention_heads": 12},
    **{"num_key_value_heads": 4, "mamba_n_heads": 24, "mamba_d_head": 64, "mamba_d_state": 128},
    **{"mamba_n_groups": 1, "tie_word_embeddings": False},
}


def tiny(name: str) -> dict[str, Any]:
    """Return the config file of a model of the same layers with narrow ones, few of them."""
    file = SHAPES[name] | {"vocab_size": 512, "hidden_size": 64, "num_attention_heads": 4, "head_dim": 16}
    file["num_key_value_heads"] = 2
    if file["model_type"] == "nemotron_h":
        file |= {"mamba_num_heads": 8, "mamba_head_dim": 16, "hybrid_override_pattern": "MEM*"}
        return file | {"moe_intermediate_size": 32, "moe_shared_expert_intermediate_size": 64, "n_groups": 2}
    file |= {"num_hidden_layers": 4, "intermediate_size": 128, "mamba_n_heads": 8, "mamba_d_head": 16}
    if file["model_type"] == "falcon_h1":
        return file | {"mamba_d_ssm": 128}
    if file["model_type"] == "bamba":
        return file | {"attn_layer_indices": [2]}
    return file | {"layer_types": _granite_layers(4, (2,)), "shared_intermediate_size": 128}


def config_of(name: str, layers: int | None = None) -> Mamba2Config:
    """Return the config of a shape; of its first layers, if `layers` says how many."""
    file = dict(SHAPES[name])
    if layers is not None:
        file["num_hidden_layers"] = layers
        for key in ("hybrid_override_pattern", "layer_types"):
            if key in file:
                file[key] = file[key][:layers]
    return Mamba2Config.from_dict(file)
