"""Tiny models of every family in transformers, with random numbers in all their parameters, as oracles."""

import functools
import pathlib
import tempfile

import torch
import transformers

_MIXER = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 16, "mamba_chunk_size": 8}
_HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}
_COMMON = {"vocab_size": 64, "hidden_size": 32}
_GRANITE = {
    **_COMMON,
    **_MIXER,
    **_HEADS,
    "num_hidden_layers": 3,
    "mamba_n_groups": 1,
    "shared_intermediate_size": 40,
    "num_local_experts": 0,
    "tie_word_embeddings": True,
    "pad_token_id": 0,
    "embedding_multiplier": 12.0,
    "logits_scaling": 3.0,
    "residual_multiplier": 0.22,
    "attention_multiplier": 0.0625,
}
_FALCON = {
    **_COMMON,
    **_HEADS,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "mamba_d_ssm": 48,  # expand * hidden_size is 64
    "mamba_n_heads": 6,
    "mamba_d_head": 8,
    "mamba_n_groups": 1,
    "mamba_d_state": 16,
    "mamba_chunk_size": 8,
    "ssm_multipliers": [0.3, 0.5, 0.7, 1.1, 1.3],
    "mlp_multipliers": [0.9, 0.6],
    "key_multiplier": 0.4,
    "attention_out_multiplier": 0.8,
    "attention_in_multiplier": 1.2,
    "ssm_in_multiplier": 0.7,
    "ssm_out_multiplier": 0.6,
    "embedding_multiplier": 5.0,
    "lm_head_multiplier": 0.04,
}
_NEMOTRON = {
    **_COMMON,
    **_HEADS,
    "head_dim": 16,
    "intermediate_size": 48,
    "mamba_num_heads": 10,  # more channels than expand * hidden_size
    "mamba_head_dim": 8,
    "n_groups": 2,
    "ssm_state_size": 16,
    "chunk_size": 8,
    # transformers floors dt at this in prefill, which neither it in decoding nor the published models do
    "time_step_min": 1e-30,
}

_EXPERTS = {
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "moe_shared_expert_intermediate_size": 40,
    "routed_scaling_factor": 2.5,
}

# name -> (class in transformers, arguments of its config)
VARIANTS = {
    "bamba": (
        "Bamba",
        {
            **_COMMON,
            **_MIXER,
            **_HEADS,
            "intermediate_size": 48,
            "num_hidden_layers": 3,
            "attn_layer_indices": [1],
            "mamba_n_groups": 2,
        },
    ),
    "granite": (
        "GraniteMoeHybrid",
        {**_GRANITE, "layer_types": ["mamba", "attention", "mamba"], "position_embedding_type": "nope"},
    ),
    "granite, no Mamba": (
        "GraniteMoeHybrid",
        {**_GRANITE, "layer_types": ["attention"] * 3, "position_embedding_type": "rope"},
    ),
    "nemotron": ("NemotronH", {**_NEMOTRON, "hybrid_override_pattern": "M-M*M-"}),
    "granite, experts": (
        "GraniteMoeHybrid",
        {
            **_GRANITE,
            **{"layer_types": ["mamba", "attention", "mamba"], "position_embedding_type": "nope"},
            **{"num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 24},
        },
    ),
    "nemotron, experts": ("NemotronH", {**_NEMOTRON, **_EXPERTS, "hybrid_override_pattern": "ME*E"}),
    "nemotron, groups, latent": (
        "NemotronH",
        {**_NEMOTRON, **_EXPERTS, "hybrid_override_pattern": "ME*", "n_group": 2, "moe_latent_size": 16},
    ),
    "falcon": ("FalconH1", {**_FALCON, "mamba_rms_norm": False}),
    "falcon, norm": (
        "FalconH1",
        {**_FALCON, "mamba_rms_norm": True, "mamba_norm_before_gate": False, "head_dim": 16},
    ),
}

# Options that no published model has; their logits are compared, too.
RARE = {
    "falcon, norm before gate": (
        "FalconH1",
        {**_FALCON, "mamba_rms_norm": True, "mamba_norm_before_gate": True, "mamba_n_groups": 2},
    ),
    "falcon, biases": (
        "FalconH1",
        {**_FALCON, "mamba_proj_bias": True, "projectors_bias": True, "ssm_in_multiplier": 1.0},
    ),
    "granite, biases": (
        "GraniteMoeHybrid",
        {
            **{**_GRANITE, "layer_types": ["mamba", "attention", "mamba"]},
            **{"mamba_proj_bias": True, "mamba_conv_bias": False},
        },
    ),
    "nemotron, biases": (
        "NemotronH",
        {**_NEMOTRON, "hybrid_override_pattern": "M*M", "use_bias": True, "use_conv_bias": False},
    ),
}


@functools.cache
def oracle(name: str) -> transformers.PreTrainedModel:
    """Build the model of a variant; every parameter and buffer is random, so that no mistake cancels."""
    kind, options = (VARIANTS | RARE)[name]
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**options)
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    with torch.no_grad():
        for path, value in (*model.named_parameters(), *model.named_buffers()):
            randomize(path, value)
    return model


def randomize(path: str, value: torch.Tensor) -> None:
    if path.endswith("dt_bias"):
        value.uniform_(-9, -2)
    elif path.endswith("A_log"):
        value.copy_(torch.empty_like(value).uniform_(0.5, 8).log())
    elif path.endswith(".D"):
        value.uniform_(0.5, 1.5)
    elif "norm" in path and path.endswith("weight"):
        value.uniform_(0.6, 1.4)
    elif path.endswith("conv1d.bias"):
        value.uniform_(-0.5, 0.5)
    elif "e_score" in path:
        value.uniform_(-0.2, 0.2)
    elif path.endswith("weight") or "experts" in path:
        value.normal_(0, 0.15)


@functools.cache
def folder(name: str) -> pathlib.Path:
    """Write the model of a variant as transformers does; the folder lives as long as the process."""
    path = tempfile.TemporaryDirectory(prefix="family-")
    _folders.append(path)
    oracle(name).save_pretrained(path.name)
    return pathlib.Path(path.name)


_folders: list[tempfile.TemporaryDirectory] = []
