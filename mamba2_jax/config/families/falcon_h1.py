"""Falcon-H1: Mamba-2 and attention side by side in every layer, then a gated MLP; constant multipliers.

Scaling the input and the keys of attention without biases is scaling its scores and its output, so
`attention_in_multiplier` and `key_multiplier` become a scale of the scores and a factor of the output; and
`ssm_in_multiplier` joins the five multipliers of the projections.

Source: transformers' `modeling_falcon_h1.py`; tiiuae/Falcon-H1-0.5B-Base.
"""

import math
from typing import Any

from mamba2_jax.config.families.bamba import BAMBA, attention_fields, mixer_fields
from mamba2_jax.config.families.file import ConfigFile
from mamba2_jax.config.mlp import MLPConfig, Multipliers


def _read(file: ConfigFile) -> dict[str, Any]:
    hidden_size, layers = file.integer("hidden_size", 4096), file.layers(32)
    fields = mixer_fields(file, hidden_size, 1e-5) | file.special_tokens(0, 1, 2)
    d_ssm = file.get("mamba_d_ssm", 1024) or fields["expand"] * hidden_size
    if file.get("mamba_d_head", "auto") in ("auto", None):
        fields["head_dim"] = d_ssm // fields["num_heads"]
    heads = attention_fields(file, hidden_size, 8)
    attention_in, key = file.number("attention_in_multiplier", 1.0), file.number("key_multiplier", 1.0)
    heads |= file.rotary(heads["head_dim"])
    heads["softmax_scale"] = key * attention_in**2 / math.sqrt(heads["head_dim"])
    ssm_in = file.number("ssm_in_multiplier", 1.0)
    file.want("projectors_bias", fields["use_bias"])
    if fields["use_bias"] and ssm_in != 1:
        file.want("ssm_in_multiplier", 1.0)
    gate, down = file.numbers("mlp_multipliers", 2)
    norm = file.get("mamba_rms_norm", False)
    fields |= {
        "vocab_size": file.integer("vocab_size", 128000),
        "tie_word_embeddings": file.get("tie_word_embeddings", False),
        "num_hidden_layers": layers,
        "layer_pattern": "H" * layers,
        "feed_forward": ("mlp",),
        "d_ssm": d_ssm,
        "rmsnorm": norm,
        "norm_before_gate": file.get("mamba_norm_before_gate", True) and norm,
        "mlp_cfg": MLPConfig(width=file.integer("intermediate_size", 14336)),
        "attn_cfg": heads,
        "multipliers": Multipliers(
            embedding=file.number("embedding_multiplier", 1.0),
            logits=file.number("lm_head_multiplier", 1.0),
            ssm=tuple(ssm_in * one for one in file.numbers("ssm_multipliers", 5)),
            ssm_out=file.number("ssm_out_multiplier", 1.0),
            attention_out=attention_in * file.number("attention_out_multiplier", 1.0),
            mlp_gate=gate,
            mlp_out=down,
        ),
    }
    file.want("mamba_use_mlp", True)
    file.refuse_unread(["expansion_factor", "mlp_expansion_factor", "layers_block_type", "layer_types"])
    return fields


# Its tensors have Bamba's names.
FALCON_H1 = BAMBA._replace(title="Falcon-H1", architecture="FalconH1ForCausalLM", read=_read)
