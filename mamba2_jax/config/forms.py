"""Read the published forms of a Mamba-2 config file, and write that of state-spaces.

Three forms are in use: the `config.json` of transformers and its relatives (`config.mamba2_file`), the
original state-spaces `config.json` and Mistral's `params.json`. Each reader takes the parsed JSON and returns
keyword arguments for `Mamba2Config`; this module does not import that class.
"""

from collections.abc import Mapping
from typing import Any

from mamba2_jax.config.families import FAMILIES, REFUSED, family_fields
from mamba2_jax.config.families.file import ConfigFile, time_limits
from mamba2_jax.config.mamba2_file import GPT_NEOX_IDS, count_heads, mamba2_fields
from mamba2_jax.config.options import OPTIONS

# state-spaces ssm_cfg key -> field.
_SSM_CFG_FIELDS = {option.ssm_cfg: name for name, option in OPTIONS.items() if option.ssm_cfg}
# Initialisation and kernel options of the original, which do not affect the results of a loaded model.
_SSM_CFG_IGNORED = {"layer", "A_init_range", "conv_init", "use_mem_eff_path", "sequence_parallel"}

_STATE_SPACES_KEYS = {
    *("d_model", "n_layer", "vocab_size", "pad_vocab_size_multiple", "tie_embeddings", "residual_in_fp32"),
    *("d_intermediate", "attn_layer_idx", "attn_cfg", "ssm_cfg", "rms_norm", "norm_epsilon"),
}
_MISTRAL_KEYS = {
    *("dim", "n_layers", "vocab_size", "pad_vocab_size_multiple", "tie_embeddings", "residual_in_fp32"),
    *("n_groups", "rms_norm"),
}

# Ids of Codestral's tokenizer, which `params.json` does not contain.
_CODESTRAL_IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}  # no pad token: eos is used
# Initialisation of a new model in the original.
_ORIGINAL_INIT = {"initializer_range": 0.02, "rescale_prenorm_residual": True}

_PRESET_SIZES = {  # name -> hidden_size, num_hidden_layers
    "mamba2-130m": (768, 24),
    "mamba2-370m": (1024, 48),
    "mamba2-780m": (1536, 48),
    "mamba2-1.3b": (2048, 48),
    "mamba2-2.7b": (2560, 64),
}
PRESET_NAMES = (*_PRESET_SIZES, "codestral-7b")


def preset_fields(name: str) -> dict[str, Any]:
    """Return the `Mamba2Config` fields of a published model by its short name, one of `PRESET_NAMES`."""
    if name == "codestral-7b":
        return parse_fields({"dim": 4096, "n_layers": 64, "vocab_size": 32768, "n_groups": 8})
    if name not in _PRESET_SIZES:
        raise ValueError(f"Mamba2Config.preset: no preset {name!r}; choose one of {', '.join(PRESET_NAMES)}")
    hidden_size, num_layers = _PRESET_SIZES[name]
    return parse_fields(
        {
            "d_model": hidden_size,
            "n_layer": num_layers,
            "vocab_size": 50277,
            "ssm_cfg": {"layer": "Mamba2"},
            "pad_vocab_size_multiple": 16,
        }
    )


def parse_fields(config: Mapping[str, Any]) -> dict[str, Any]:
    """Convert a parsed config file of any published form to keyword arguments for `Mamba2Config`.

    Args:
        config: the parsed JSON. The key `d_model` identifies the state-spaces form, `dim` with `n_layers`
            Mistral's, `hidden_size` transformers'.

    Returns:
        Field values by name.

    Raises:
        ValueError: the file is in no known form, or its model is not a Mamba-2.
        NotImplementedError: the model needs a feature that this package lacks, such as LayerNorm blocks.
    """
    if "d_model" in config:
        return _state_spaces_fields(config)
    if "dim" in config and "n_layers" in config:
        return _mistral_fields(config)
    model_type = config.get("model_type")
    if model_type in FAMILIES:
        return family_fields(config)
    if model_type not in (None, "mamba2"):
        reason = f" ({REFUSED[model_type]})" if model_type in REFUSED else ""
        raise ValueError(
            f"config: model_type is {model_type!r}{reason}, this package reads 'mamba2', "
            f"{', '.join(map(repr, FAMILIES))}; point it at such a checkpoint"
        )
    if "hidden_size" in config:
        return mamba2_fields(config)
    raise ValueError(
        "config: none of the known forms. Expected transformers' config.json (hidden_size, model_type "
        "'mamba2'), state-spaces' config.json (d_model, n_layer, ssm_cfg) or Mistral's params.json "
        f"(dim, n_layers); got the keys {sorted(map(str, config))}"
    )


def _state_spaces_fields(config: Mapping[str, Any]) -> dict[str, Any]:
    ssm_cfg = config.get("ssm_cfg") or {}
    if not isinstance(ssm_cfg, Mapping):
        raise ValueError(f"config: ssm_cfg is {ssm_cfg!r}, wants a mapping such as {{'layer': 'Mamba2'}}")
    layer = ssm_cfg.get("layer", "Mamba1")  # the original's default
    if layer != "Mamba2":
        raise ValueError(
            f"config: ssm_cfg says layer {layer!r} (a missing layer means 'Mamba1'); this package reads "
            "'Mamba2'; point it at a Mamba-2 checkpoint"
        )
    unknown = sorted(set(ssm_cfg) - set(_SSM_CFG_FIELDS) - _SSM_CFG_IGNORED)
    if unknown:
        raise ValueError(
            f"config: unknown ssm_cfg keys {unknown}; known are {sorted(_SSM_CFG_FIELDS)}. Remove them if "
            "they change nothing about the model"
        )
    fields = {_SSM_CFG_FIELDS[key]: value for key, value in ssm_cfg.items() if key in _SSM_CFG_FIELDS}
    if "time_step_limit" in fields:
        fields["time_step_limit"] = time_limits(fields["time_step_limit"])
    fields.setdefault("n_groups", 1)
    fields |= _common_fields(config, _STATE_SPACES_KEYS, hidden_size="d_model", num_layers="n_layer")
    fields |= GPT_NEOX_IDS
    fields["num_heads"] = count_heads(fields)
    fields["d_intermediate"] = config.get("d_intermediate", 0)
    fields["attn_layer_idx"] = config.get("attn_layer_idx") or ()
    attention = (config.get("attn_cfg") or None) if fields["attn_layer_idx"] else None
    # The original's default is causal=False, which `Mamba2Config` rejects.
    fields["attn_cfg"] = {"causal": False} | attention if isinstance(attention, dict) else attention
    fields["layer_norm_epsilon"] = config.get("norm_epsilon", 1e-5)
    return fields


def _mistral_fields(config: Mapping[str, Any]) -> dict[str, Any]:
    fields = _common_fields(config, _MISTRAL_KEYS, hidden_size="dim", num_layers="n_layers", tied=False)
    fields["n_groups"] = config.get("n_groups", 1)
    fields["num_heads"] = count_heads(fields)
    return fields | _CODESTRAL_IDS


def _common_fields(
    config: Mapping[str, Any], keys: set[str], *, hidden_size: str, num_layers: str, tied: bool = True
) -> dict[str, Any]:
    """Read the fields that the state-spaces and Mistral forms share: sizes, vocabulary padding, tying."""
    missing = [key for key in (hidden_size, num_layers, "vocab_size") if key not in config]
    if missing:
        raise ValueError(f"config: {missing} missing; this form has the keys {sorted(keys)}")
    file = ConfigFile(config)
    for key in keys:
        file.get(key, None)
    file.refuse_unread(["fused_add_norm", "norm_epsilon"])
    if not config.get("rms_norm", True):
        raise NotImplementedError("config: rms_norm is false (LayerNorm blocks); only RMSNorm is built")
    vocab_size = config["vocab_size"]
    multiple = config.get("pad_vocab_size_multiple", 1)
    for name, value in (("vocab_size", vocab_size), ("pad_vocab_size_multiple", multiple)):
        if type(value) is not int or value < 1:
            raise ValueError(f"config: {name} is {value!r}, wants a positive integer")
    padded = -(-vocab_size // multiple) * multiple
    return _ORIGINAL_INIT | {
        "hidden_size": config[hidden_size],
        "num_hidden_layers": config[num_layers],
        "vocab_size": padded,
        "unpadded_vocab_size": vocab_size if vocab_size < padded else None,
        "tie_word_embeddings": config.get("tie_embeddings", tied),
        "residual_in_fp32": config.get("residual_in_fp32", True),
    }


def state_spaces_dict(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Convert fields to the content of a state-spaces `config.json`, limited to MambaConfig's keys."""
    ssm_cfg = {"layer": "Mamba2"}
    for key, name in _SSM_CFG_FIELDS.items():
        inner = fields["expand"] * fields["hidden_size"]
        if fields[name] != (inner if name == "d_ssm" else OPTIONS[name].original):
            ssm_cfg[key] = fields[name]
    vocab_size, multiple = _unpadded(fields["vocab_size"], fields["unpadded_vocab_size"])
    return {
        "d_model": fields["hidden_size"],
        "d_intermediate": fields["d_intermediate"],
        "n_layer": fields["num_hidden_layers"],
        "vocab_size": vocab_size,
        "ssm_cfg": ssm_cfg,
        "attn_layer_idx": list(fields["attn_layer_idx"]),
        "attn_cfg": fields["attn_cfg"] or {},
        "rms_norm": True,
        "residual_in_fp32": fields["residual_in_fp32"],
        "fused_add_norm": True,
        "pad_vocab_size_multiple": multiple,
        "tie_embeddings": fields["tie_word_embeddings"],
    }


def _unpadded(padded: int, real: int | None) -> tuple[int, int]:
    """Return the real vocabulary size and the multiple that pads it; `(padded, 1)` if there is none."""
    for multiple in (16, 8, 32, 64, 128, 256):  # 16 in every published file
        if real is not None and -(-real // multiple) * multiple == padded:
            return real, multiple
    return padded, 1
