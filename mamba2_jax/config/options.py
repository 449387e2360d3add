"""The options of `Mamba2Config`: what each accepts, and what the published config files call it.

A new option costs a field in `mamba2_jax.config.mamba2` and a row here: checks, readers and writers follow.
"""

import math
import operator
from collections.abc import Callable
from typing import Any, NamedTuple

from mamba2_jax.config.experts import ExpertsConfig
from mamba2_jax.config.layers import LAYERS, MAX_LAYERS, MAX_SIZE
from mamba2_jax.config.mlp import MLPConfig, Multipliers
from mamba2_jax.weight_types import WEIGHT_TYPES


class Check(NamedTuple):
    """Conversion of a value from a user or a file (lists, numpy integers, 0 for 0.0) to its canonical type.

    Args:
        wanted: description of the valid values, for messages.
        convert: returns a hashable value, or raises TypeError, ValueError or OverflowError.
    """

    wanted: str
    convert: Callable[[Any], Any]


class Option(NamedTuple):
    """One option.

    Args:
        check: its valid values.
        ssm_cfg: key in `ssm_cfg` of a state-spaces file, an argument of mamba_ssm's Mamba2 module.
        original: default of that argument.
        in_transformers: whether transformers' Mamba2Config has a field of this name.
        in_state_spaces: whether a state-spaces file can express it, or need not, as it changes no result.
    """

    check: Check
    ssm_cfg: str | None = None
    original: Any = None
    in_transformers: bool = True
    in_state_spaces: bool = True


def _boolean(value: Any) -> bool:
    if not isinstance(value, bool):
        raise TypeError
    return value


def integer_from(low: int, high: int = MAX_SIZE) -> Callable[[Any], int]:
    """Return a conversion to an integer from `low` to `high`; booleans and fractions are invalid."""

    def convert(value: Any) -> int:
        if isinstance(value, bool) or not low <= operator.index(value) <= high:
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


def positive_float(value: Any) -> float:
    """Convert to a finite float above 0."""
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
        return _optional(integer_from(0))(value)
    return tuple(map(integer_from(0), value)) or None


def _indices(value: Any) -> tuple[int, ...]:
    if not isinstance(value, list | tuple):
        raise TypeError
    return tuple(sorted(set(map(integer_from(0), value))))


def _one_of(*values: str | None) -> Check:
    def convert(value: Any) -> Any:
        if value not in values:
            raise ValueError
        return value

    return Check(" or ".join(map(repr, values)), convert)


BOOLEAN = Check("true or false", _boolean)
POSITIVE = Check("a positive integer", integer_from(1))
COUNT = Check("0 or a positive integer", integer_from(0))
TOKEN = Check("a token id or None", _optional(integer_from(0)))
ABOVE_0 = Check("a finite number above 0", positive_float)
FROM_0 = Check("a finite number of at least 0", _non_negative_float)
_TAPS = Check("an integer of at least 2 (with one tap there is no convolution)", integer_from(2))
_LIMITS = Check("a pair (low, high) with 0 <= low <= high, high may be infinity", _limits)
_MODULES = ("mlp", "experts", "shared_expert")
_ANY = Check("", lambda value: value)  # checked with its relations


def _letters(value: Any) -> str:
    if not isinstance(value, str) or not value or set(value) - LAYERS.keys():
        raise ValueError
    return value


def _feed_forward(value: Any) -> tuple[str, ...]:
    if not isinstance(value, list | tuple) or set(value) - set(_MODULES):
        raise ValueError
    return tuple(value)


def _instance(kind: type) -> Check:
    def convert(value: Any) -> Any:
        if value is not None and not isinstance(value, kind):
            raise TypeError
        return value

    return Check(f"a {kind.__name__} or None", convert)


# Options that only models of `config.families` have.
_FAMILY: dict[str, Check] = {
    "family": Check("the name of a family", str),
    "layer_pattern": Check(f"a string of the letters {' '.join(LAYERS)}", _optional(_letters)),
    "feed_forward": Check(f"a list of {', '.join(_MODULES)}", _optional(_feed_forward)),
    "mlp_cfg": _instance(MLPConfig),
    "shared_mlp_cfg": _instance(MLPConfig),
    "experts_cfg": _instance(ExpertsConfig),
    "multipliers": _instance(Multipliers),
}

OPTIONS: dict[str, Option] = {
    "num_heads": Option(POSITIVE),
    "head_dim": Option(POSITIVE, "headdim", 64),
    "vocab_size": Option(POSITIVE),
    "hidden_size": Option(POSITIVE),
    "state_size": Option(POSITIVE, "d_state", 128),
    "num_hidden_layers": Option(Check(f"a positive integer up to {MAX_LAYERS}", integer_from(1, MAX_LAYERS))),
    "layer_norm_epsilon": Option(ABOVE_0, in_state_spaces=False),
    "pad_token_id": Option(TOKEN),
    "bos_token_id": Option(TOKEN),
    "eos_token_id": Option(Check("a token id, a list of token ids, or None", _token_ids)),
    "expand": Option(POSITIVE, "expand", 2),
    "conv_kernel": Option(_TAPS, "d_conv", 4),
    "n_groups": Option(POSITIVE, "ngroups", 1),
    "use_bias": Option(BOOLEAN, "bias", False),
    "use_conv_bias": Option(BOOLEAN, "conv_bias", True),
    "hidden_act": Option(_one_of("silu", "swish")),  # the same function
    "initializer_range": Option(FROM_0),
    "residual_in_fp32": Option(BOOLEAN),
    "time_step_rank": Option(POSITIVE),
    "time_step_min": Option(ABOVE_0, "dt_min", 0.001),
    "time_step_max": Option(ABOVE_0, "dt_max", 0.1),
    "time_step_floor": Option(FROM_0, "dt_init_floor", 1e-4),
    "time_step_limit": Option(_LIMITS, "dt_limit", (0.0, math.inf)),
    "rescale_prenorm_residual": Option(BOOLEAN),
    "use_cache": Option(BOOLEAN),
    "chunk_size": Option(POSITIVE, "chunk_size", 256),
    "tie_word_embeddings": Option(BOOLEAN),
    # ours; transformers keeps it as an extra attribute
    "unpadded_vocab_size": Option(Check("a positive integer or None", _optional(integer_from(1)))),
    "d_ssm": Option(POSITIVE, "d_ssm", in_transformers=False),
    "D_has_hdim": Option(BOOLEAN, "D_has_hdim", False, in_transformers=False),
    "rmsnorm": Option(BOOLEAN, "rmsnorm", True, in_transformers=False),
    "norm_before_gate": Option(BOOLEAN, "norm_before_gate", False, in_transformers=False),
    "d_intermediate": Option(COUNT, in_transformers=False),
    "attn_layer_idx": Option(Check("a list of layer indices", _indices), in_transformers=False),
    "attn_cfg": Option(_ANY, in_transformers=False),
    "quantization": Option(_one_of(None, *WEIGHT_TYPES), in_transformers=False, in_state_spaces=False),
    **{name: Option(check, in_transformers=False, in_state_spaces=False) for name, check in _FAMILY.items()},
}
