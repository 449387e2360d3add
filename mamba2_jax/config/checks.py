"""Checks of `Mamba2Config`: conversion to canonical values, and a message for each invalid field.

The functions return a list of messages instead of raising at the first, so that one error names all problems.
"""

from collections.abc import Callable, Mapping
from typing import Any

from mamba2_jax.config.layers import LAYERS
from mamba2_jax.config.options import OPTIONS, integer_from, positive_float

_TOKEN_IDS = ("pad_token_id", "bos_token_id", "eos_token_id")


def canonical_fields(fields: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Convert every field to its canonical type and check each value independently of the other fields.

    Args:
        fields: values from a user or a file: lists, numpy integers, 0 for 0.0.

    Returns:
        The fields as hashable values (tuples, Python numbers), and a message for each invalid field.
    """
    values, problems = dict(fields), []
    for name, value in fields.items():
        check = OPTIONS[name].check
        try:
            values[name] = check.convert(value)
        except (TypeError, ValueError, OverflowError):
            problems.append(f"{name}={value!r}, wants {check.wanted}")
    return values, problems


def derived_fields(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Compute the fields that are None (`time_step_rank`: "auto") from others.

    `d_ssm` from `hidden_size` and `expand`, `layer_pattern` from `attn_layer_idx`, `feed_forward` from
    `d_intermediate`.
    """
    derived: dict[str, Any] = {}
    try:
        hidden_size, expand = (integer_from(1)(fields[name]) for name in ("hidden_size", "expand"))
    except (TypeError, ValueError):
        hidden_size = expand = 1  # canonical_fields reports the invalid value
    if fields["d_ssm"] is None:
        derived["d_ssm"] = expand * hidden_size
    if fields["time_step_rank"] == "auto":
        derived["time_step_rank"] = -(-hidden_size // 16)
    return derived


def derived_layers(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Compute `layer_pattern` and `feed_forward`, where None, from canonical fields."""
    attention = frozenset(fields["attn_layer_idx"])
    derived: dict[str, Any] = {}
    if fields["layer_pattern"] is None:
        layers = range(fields["num_hidden_layers"])
        derived["layer_pattern"] = "".join("*" if index in attention else "M" for index in layers)
    if fields["feed_forward"] is None:
        derived["feed_forward"] = ("mlp",) if fields["d_intermediate"] else ()
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
    # The families have no MLP beside the SSM, so their `d_ssm` may also be above `expand * hidden_size`.
    require(
        d_ssm <= inner or fields["family"] != "mamba2",
        f"d_ssm={d_ssm} is more than expand * hidden_size = {inner}; lower d_ssm",
    )
    require(
        heads % fields["n_groups"] == 0,
        f"num_heads={heads} is not a multiple of n_groups={fields['n_groups']}; check n_groups",
    )
    require(
        fields["time_step_min"] <= fields["time_step_max"],
        f"time_step_min={fields['time_step_min']} is above time_step_max={fields['time_step_max']}",
    )
    return [*problems, *_vocabulary_problems(fields), *_layer_problems(fields)]


def _vocabulary_problems(fields: Mapping[str, Any]) -> list[str]:
    vocab_size, unpadded = fields["vocab_size"], fields["unpadded_vocab_size"]
    problems = []
    if unpadded is not None and unpadded > vocab_size:
        problems.append(f"unpadded_vocab_size={unpadded} is more than vocab_size={vocab_size}")
    for name in _TOKEN_IDS:
        ids = fields[name] if isinstance(fields[name], tuple) else (fields[name],)
        if any(token is not None and token >= vocab_size for token in ids):
            problems.append(
                f"{name}={fields[name]} is outside the vocabulary of {vocab_size}; set it or None"
            )
    return problems


def _layer_problems(fields: Mapping[str, Any]) -> list[str]:
    """List the layers that lack the options of a module in them, and patterns of another length."""
    indices, num_layers = fields["attn_layer_idx"], fields["num_hidden_layers"]
    pattern, feed_forward = fields["layer_pattern"], fields["feed_forward"]
    problems = []
    if any(index >= num_layers for index in indices):
        problems.append(f"attn_layer_idx={indices} goes beyond num_hidden_layers={num_layers}")
    if len(pattern) != num_layers:
        problems.append(f"layer_pattern has {len(pattern)} letters, but num_hidden_layers={num_layers}")
    kinds = {kind for letter in set(pattern) for kind in LAYERS[letter]} | set(feed_forward)
    if "attention" in kinds and fields["attn_cfg"] is None:
        where = "attn_layer_idx" if indices else f"layer_pattern={pattern!r}"
        problems.append(f"{where} is given without attn_cfg; say what the attention layers look like")
    if "mlp" in kinds and fields["mlp_cfg"] is None and not fields["d_intermediate"]:
        problems.append("the layers have an MLP, but mlp_cfg is None and d_intermediate is 0; set one")
    for kind, name in (("experts", "experts_cfg"), ("shared_expert", "shared_mlp_cfg")):
        if kind in kinds and fields[name] is None:
            problems.append(f"the layers have {kind}, but {name} is None; set it")
    return problems


def attention_problems(fields: Mapping[str, Any]) -> list[str]:
    """List the invalid fields of an `AttentionConfig`, with a message each."""
    problems = []
    for name in ("num_heads", "num_heads_kv", "head_dim"):
        if not _is_valid(integer_from(1), fields[name]):
            problems.append(f"{name}={fields[name]!r}, wants a positive integer")
    for name in ("rotary_emb_dim", "mlp_dim"):
        if not _is_valid(integer_from(0), fields[name]):
            problems.append(f"{name}={fields[name]!r}, wants 0 or a positive integer")
    if not _is_valid(integer_from(0), fields["d_conv"]) or fields["d_conv"] == 1:
        problems.append(f"d_conv={fields['d_conv']!r}, wants 0 (none) or an integer of at least 2")
    for name in ("rotary_emb_base", "softmax_scale"):
        if not _is_valid(positive_float, fields[name]) and (name, fields[name]) != ("softmax_scale", None):
            problems.append(f"{name}={fields[name]!r}, wants a finite number above 0")
    for name in ("causal", "qkv_proj_bias", "out_proj_bias", "rotary_emb_interleaved", "separate"):
        if not isinstance(fields[name], bool):
            problems.append(f"{name}={fields[name]!r}, wants true or false")
    if fields["causal"] is False:
        problems.append("causal=False: tokens that see later ones cannot be generated one by one")
    if problems:
        return problems
    if fields["separate"] and (fields["d_conv"] or fields["mlp_dim"]):
        problems.append("separate is true: such layers have no convolution (d_conv) and no MLP (mlp_dim)")
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


def _is_valid(convert: Callable[[Any], Any], value: Any) -> bool:
    try:
        convert(value)
    except (TypeError, ValueError, OverflowError):
        return False
    return True
