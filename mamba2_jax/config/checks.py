"""Checks of `Mamba2Config` fields: conversion to canonical values, and a message for each invalid field.

The functions return a list of messages instead of raising at the first, so that one error names all problems.
"""

import math
import operator
from collections.abc import Callable, Mapping
from typing import Any

_BOOLEANS = (
    *("use_bias", "use_conv_bias", "residual_in_fp32", "rescale_prenorm_residual", "use_cache"),
    *("tie_word_embeddings", "D_has_hdim", "rmsnorm", "norm_before_gate"),
)
_POSITIVE_INTEGERS = (
    *("num_heads", "head_dim", "vocab_size", "hidden_size", "state_size", "num_hidden_layers", "expand"),
    *("n_groups", "chunk_size", "d_ssm", "time_step_rank"),
)
_POSITIVE_FLOATS = ("layer_norm_epsilon", "time_step_min", "time_step_max")
_NON_NEGATIVE_FLOATS = ("initializer_range", "time_step_floor")
_TOKEN_IDS = ("pad_token_id", "bos_token_id")


def canonical_fields(fields: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Convert every field to its canonical type and check each value independently of the other fields.

    Args:
        fields: values from a user or a file: lists, numpy integers, 0 for 0.0.

    Returns:
        The fields as hashable values (tuples, Python numbers), and a message for each invalid field.
    """
    values, problems = dict(fields), []

    def convert(name: str, wanted: str, function: Callable[[Any], Any]) -> None:
        try:
            values[name] = function(fields[name])
        except (TypeError, ValueError, OverflowError):
            problems.append(f"{name}={fields[name]!r}, wants {wanted}")

    for name in _BOOLEANS:
        convert(name, "true or false", _boolean)
    for name in _POSITIVE_INTEGERS:
        convert(name, "a positive integer", _integer_from(1))
    convert(
        "conv_kernel", "an integer of at least 2 (with one tap there is no convolution)", _integer_from(2)
    )
    convert("d_intermediate", "0 or a positive integer", _integer_from(0))
    for name in _POSITIVE_FLOATS:
        convert(name, "a finite number above 0", _positive_float)
    for name in _NON_NEGATIVE_FLOATS:
        convert(name, "a finite number of at least 0", _non_negative_float)
    convert("time_step_limit", "a pair (low, high) with 0 <= low <= high, high may be infinity", _limits)
    convert("unpadded_vocab_size", "a positive integer or None", _optional(_integer_from(1)))
    for name in _TOKEN_IDS:
        convert(name, "a token id or None", _optional(_integer_from(0)))
    convert("eos_token_id", "a token id, a list of token ids, or None", _token_ids)
    convert("attn_layer_idx", "a list of layer indices", _indices)
    if fields["hidden_act"] not in ("silu", "swish"):
        problems.append(f"hidden_act={fields['hidden_act']!r}, wants 'silu' or 'swish' (the same function)")
    return values, problems


def derived_fields(fields: Mapping[str, Any]) -> dict[str, int]:
    """Compute `d_ssm` when None, and `time_step_rank` when "auto", from `hidden_size` and `expand`."""
    derived = {}
    try:
        hidden_size, expand = (_integer_from(1)(fields[name]) for name in ("hidden_size", "expand"))
    except (TypeError, ValueError):
        hidden_size = expand = 1  # canonical_fields reports the invalid value
    if fields["d_ssm"] is None:
        derived["d_ssm"] = expand * hidden_size
    if fields["time_step_rank"] == "auto":
        derived["time_step_rank"] = -(-hidden_size // 16)
    return derived


def relation_problems(fields: Mapping[str, Any]) -> list[str]:
    """List contradictions between fields whose values are each valid."""
    problems = []

    def require(holds: bool, problem: str) -> None:
        if not holds:
            problems.append(problem)

    heads, head_dim, d_ssm = fields["num_heads"], fields["head_dim"], fields["d_ssm"]
    inner = fields["expand"] * fields["hidden_size"]
    width = "expand * hidden_size" if d_ssm == inner else "d_ssm"
    require(
        heads * head_dim == d_ssm,
        f"num_heads * head_dim is {heads} * {head_dim} = {heads * head_dim} but {width} is {d_ssm}; "
        f"set num_heads to {width} / head_dim",
    )
    require(d_ssm <= inner, f"d_ssm={d_ssm} is more than expand * hidden_size = {inner}; lower d_ssm")
    require(
        heads % fields["n_groups"] == 0,
        f"num_heads={heads} is not a multiple of n_groups={fields['n_groups']}; check n_groups",
    )
    require(
        fields["time_step_min"] <= fields["time_step_max"],
        f"time_step_min={fields['time_step_min']} is above time_step_max={fields['time_step_max']}",
    )
    return problems + _vocabulary_problems(fields) + _attention_problems(fields)


def _vocabulary_problems(fields: Mapping[str, Any]) -> list[str]:
    vocab_size, unpadded = fields["vocab_size"], fields["unpadded_vocab_size"]
    problems = []
    if unpadded is not None and unpadded > vocab_size:
        problems.append(f"unpadded_vocab_size={unpadded} is more than vocab_size={vocab_size}")
    for name in (*_TOKEN_IDS, "eos_token_id"):
        ids = fields[name] if isinstance(fields[name], tuple) else (fields[name],)
        if any(token is not None and token >= vocab_size for token in ids):
            problems.append(
                f"{name}={fields[name]} is outside the vocabulary of {vocab_size}; set it or None"
            )
    return problems


def _attention_problems(fields: Mapping[str, Any]) -> list[str]:
    indices, attention = fields["attn_layer_idx"], fields["attn_cfg"]
    num_layers = fields["num_hidden_layers"]
    problems = []
    if any(index >= num_layers for index in indices):
        problems.append(f"attn_layer_idx={indices} goes beyond num_hidden_layers={num_layers}")
    if indices and attention is None:
        problems.append("attn_layer_idx is given without attn_cfg; say what the attention layers look like")
    return problems


def attention_problems(fields: Mapping[str, Any]) -> list[str]:
    """List the invalid fields of an `AttentionConfig`, with a message each."""
    problems = []
    for name in ("num_heads", "num_heads_kv", "head_dim"):
        if not _is_integer_from(1, fields[name]):
            problems.append(f"{name}={fields[name]!r}, wants a positive integer")
    for name in ("rotary_emb_dim", "mlp_dim"):
        if not _is_integer_from(0, fields[name]):
            problems.append(f"{name}={fields[name]!r}, wants 0 or a positive integer")
    if not _is_integer_from(0, fields["d_conv"]) or fields["d_conv"] == 1:
        problems.append(f"d_conv={fields['d_conv']!r}, wants 0 (none) or an integer of at least 2")
    for name in ("rotary_emb_base", "softmax_scale"):
        if not _is_positive(fields[name]) and (name, fields[name]) != ("softmax_scale", None):
            problems.append(f"{name}={fields[name]!r}, wants a finite number above 0")
    for name in ("causal", "qkv_proj_bias", "out_proj_bias", "rotary_emb_interleaved"):
        if not isinstance(fields[name], bool):
            problems.append(f"{name}={fields[name]!r}, wants true or false")
    if fields["causal"] is False:
        problems.append("causal=False: tokens that see later ones cannot be generated one by one")
    if problems:
        return problems
    if fields["num_heads"] % fields["num_heads_kv"]:
        problems.append(
            f"num_heads={fields['num_heads']} is not a multiple of num_heads_kv={fields['num_heads_kv']}"
        )
    if fields["rotary_emb_dim"] > fields["head_dim"] or fields["rotary_emb_dim"] % 2:
        problems.append(
            f"rotary_emb_dim={fields['rotary_emb_dim']}, wants an even number up to "
            f"head_dim={fields['head_dim']}"
        )
    return problems


def _is_integer_from(low: int, value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= low


def _is_positive(value: Any) -> bool:
    try:
        return _positive_float(value) > 0
    except (TypeError, ValueError, OverflowError):
        return False


def _boolean(value: Any) -> bool:
    if not isinstance(value, bool):
        raise TypeError
    return value


def _integer_from(low: int) -> Callable[[Any], int]:
    def convert(value: Any) -> int:
        if isinstance(value, bool) or operator.index(value) < low:
            raise ValueError
        return operator.index(value)

    return convert


def _optional(convert: Callable[[Any], Any]) -> Callable[[Any], Any]:
    return lambda value: None if value is None else convert(value)


def _number(value: Any) -> float:
    if isinstance(value, bool | str | bytes) or math.isnan(value):
        raise ValueError
    return float(value)


def _non_negative_float(value: Any) -> float:
    if not 0 <= _number(value) < math.inf:
        raise ValueError
    return float(value)


def _positive_float(value: Any) -> float:
    if not 0 < _number(value) < math.inf:
        raise ValueError
    return float(value)


def _limits(value: Any) -> tuple[float, float]:
    low, high = map(_number, value)
    if not 0 <= low <= high or low == math.inf:
        raise ValueError
    return low, high


def _token_ids(value: Any) -> int | tuple[int, ...] | None:
    if value is None or not isinstance(value, list | tuple):
        return _optional(_integer_from(0))(value)
    return tuple(map(_integer_from(0), value)) or None


def _indices(value: Any) -> tuple[int, ...]:
    if not isinstance(value, list | tuple):
        raise TypeError
    return tuple(sorted(set(map(_integer_from(0), value))))
