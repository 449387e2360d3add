"""Read and write the `config.json` of `model_type` "mamba2", which three classes share.

Transformers' class, the older one of the `-av` conversions, and flash-linear-attention's, whose keys have
other names and defaults. A key that none of them explains is refused, because it may change numbers.

Source: transformers' `configuration_mamba2.py`; vasqu/mamba2-torch; flash-linear-attention 0.6.
"""

import math
from collections.abc import Mapping
from typing import Any

from mamba2_jax.config.families.file import ConfigFile
from mamba2_jax.config.options import OPTIONS

# Ids of the state-spaces and Codestral tokenizers, which neither config file contains.
GPT_NEOX_IDS = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}

# Initialisation and kernels. `norm_before_gate`: Codestral's file says true, but transformers has no such
# field and the model was not trained that way.
_HARMLESS = {
    *("A_init_range", "conv_init", "mamba_ssm_cache_dtype", "norm_before_gate", "pad_vocab_size_multiple"),
    *("fuse_cross_entropy", "fuse_linear_cross_entropy", "fuse_norm", "use_l2warp"),
}
_AV_KEYS = {"tie_embedding_weights", "A_initializer_range"}
_AV_HARMLESS = {
    *("A_initializer_range", "conv_initializer_range", "emb_initializer_range", "output_last_ssm_states"),
    *("tie_embedding_weights", "use_triton_kernels"),
}
_FLA_KEYS = {
    *("norm_eps", "dt_limit", "dt_min", "dt_max", "dt_init_floor"),
    *("fuse_norm", "fuse_cross_entropy", "fuse_linear_cross_entropy", "use_l2warp"),
}


def mamba2_fields(config: Mapping[str, Any]) -> dict[str, Any]:
    """Convert a parsed `config.json` to keyword arguments of `Mamba2Config`.

    Raises:
        NotImplementedError: keys that may change numbers and are not supported; the message names them.
        ValueError: invalid values.
    """
    file = ConfigFile(config)
    if config.get("quantization_config"):
        raise NotImplementedError(
            "config: the weights are quantized (quantization_config); use the unquantized checkpoint"
        )
    # transformers adds its own fields to a file of flash-linear-attention that it saves again
    is_fla = config.keys() & _FLA_KEYS and "layer_norm_epsilon" not in config
    fields = _fla_fields(file) if is_fla else _transformers_fields(file)
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        if isinstance(fields.get(name), int) and fields[name] < 0:
            fields[name] = None  # sentencepiece writes -1 for "no such token"
    sizes = (fields.get("expand", 2), fields["hidden_size"])
    if all(type(size) is int for size in sizes):
        file.want("intermediate_size", math.prod(sizes))
    file.want("ssm_state_size", fields.get("state_size", 128))
    file.want("rms_norm", True)
    file.refuse_unread(_HARMLESS)
    return fields


def _transformers_fields(file: ConfigFile) -> dict[str, Any]:
    names = [name for name, option in OPTIONS.items() if option.in_transformers and name in file.content]
    fields = {name: file.get(name, None) for name in names}
    fields["time_step_limit"] = file.limits()
    fields.setdefault("num_heads", count_heads(fields))
    if file.content.keys() & _AV_KEYS:
        _read_av_form(file, fields)
    return fields


def _read_av_form(file: ConfigFile, fields: dict[str, Any]) -> None:
    """Set fields in which the defaults of the `-av` conversions' config class differ from transformers'."""
    fields.setdefault("n_groups", 1)  # that class supported one group only, not transformers' default of 8
    fields.setdefault("tie_word_embeddings", file.get("tie_embedding_weights", True))
    fields.setdefault("initializer_range", file.get("emb_initializer_range", 0.02))
    for name, value in GPT_NEOX_IDS.items():
        fields.setdefault(name, value)
    fields["num_heads"] = count_heads(fields)  # that class derived num_heads; the file's value may be stale
    for key in _AV_HARMLESS:
        file.get(key, None)


def _fla_fields(file: ConfigFile) -> dict[str, Any]:
    """Read flash-linear-attention's file; before 0.5 its time step had transformers' names."""
    older = "dt_limit" not in file.content and "time_step_limit" in file.content
    groups = file.get("n_groups", 1)
    if older:
        file.want("n_groups", 1)  # its gated norm spanned all groups
    fields: dict[str, Any] = {
        "hidden_size": file.get("hidden_size", 2048),
        "vocab_size": file.get("vocab_size", 32000),
        "num_hidden_layers": file.get("num_hidden_layers", 48),
        "layer_norm_epsilon": file.get("norm_eps", 1e-5),
        "n_groups": groups,
        "initializer_range": file.get("initializer_range", 0.02),
        "rescale_prenorm_residual": file.get("rescale_prenorm_residual", True),
        "tie_word_embeddings": file.get("tie_word_embeddings", False),
        "time_step_limit": file.limits("time_step_limit" if older else "dt_limit"),
        "time_step_min": file.get("time_step_min" if older else "dt_min", 0.001),
        "time_step_max": file.get("time_step_max" if older else "dt_max", 0.1),
        "time_step_floor": file.get("time_step_floor" if older else "dt_init_floor", 1e-4),
        "rmsnorm": file.get("rmsnorm", True),
        "D_has_hdim": file.get("D_has_hdim", False),
        "norm_before_gate": file.get("norm_before_gate", False),
        **file.special_tokens(0, 1, 2),
    }
    same = ("head_dim", "state_size", "expand", "conv_kernel", "use_bias", "use_conv_bias", "hidden_act")
    for name in (*same, "residual_in_fp32", "use_cache", "chunk_size", "unpadded_vocab_size"):
        if name in file.content:
            fields[name] = file.get(name, None)
    fields["num_heads"] = file.get("num_heads", None) or count_heads(fields)
    file.get("time_step_rank", None)  # Mamba-1's
    return fields


def count_heads(fields: Mapping[str, Any]) -> Any:
    """Derive `num_heads`, which not every form contains, as `d_ssm / head_dim`."""
    d_ssm = fields.get("d_ssm")
    sizes = (fields.get("expand", 2), fields["hidden_size"], fields.get("head_dim", 64))
    if any(type(size) is not int or size < 1 for size in sizes) or not isinstance(d_ssm, int | None):
        return 1  # the checks of `Mamba2Config` report the invalid size
    return (sizes[0] * sizes[1] if d_ssm is None else d_ssm) // sizes[2] or 1


def mamba2_dict(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Convert fields to the content of a `config.json` for transformers, vLLM, mlx-lm and llama.cpp.

    An infinite limit of the time step stays infinite, and becomes `Infinity` in the file. All of these read
    it, while transformers before 5 and older mlx-lm do not know the `{"__float__": "Infinity"}` of
    transformers 5; mlx-lm also wants the key. `intermediate_size` is for mlx-lm, which does not derive it,
    and `pad_vocab_size_multiple` for llama.cpp, which takes 16 for granted.
    """
    written: dict[str, Any] = {"architectures": ["Mamba2ForCausalLM"], "model_type": "mamba2"}
    for name, value in fields.items():
        written[name] = list(value) if isinstance(value, tuple) else value
    written["intermediate_size"] = fields["expand"] * fields["hidden_size"]
    return written | ({"pad_vocab_size_multiple": 1} if fields["vocab_size"] % 16 else {})
