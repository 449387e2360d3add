"""Adapter settings: `LoraConfig`, validated at construction."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class LoraConfig:
    """Targets, rank and scale of an adapter. Names and meanings follow PEFT where it has the option.

    Args:
        rank: inner dimension `r`.
        alpha: the update is scaled by `alpha / rank`. None: alpha = rank.
        targets: module names: `in_proj`, `out_proj`, `conv1d`, `embeddings`, `lm_head`, or a longer suffix
            of a path, such as `layers.3.mixer.in_proj`.
        dropout: dropout rate on a projection's inputs in training; not applied to embedding and convolution.
        use_rslora: scale by `alpha / sqrt(rank)` instead.
        rank_pattern: ranks for modules by a regular expression that matches the end of their path.
        alpha_pattern: alphas for modules, likewise.
        use_dora: learn the norm of each output channel's weights apart from their direction (DoRA); for
            projections and `lm_head`.
        modules_to_save: modules and parameters trained in full beside the adapter and stored with it:
            `embeddings`, `lm_head`, `A_log`, `D`, `dt_bias`, `norm_f`, or another end of a path.

    Raises:
        ValueError: a value out of range; the message names it.
    """

    rank: int = 8
    alpha: float | None = None
    targets: tuple[str, ...] = ("in_proj", "out_proj")
    dropout: float = 0.0
    use_rslora: bool = False
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    use_dora: bool = False
    modules_to_save: tuple[str, ...] = ()

    def __post_init__(self):
        for name in ("targets", "modules_to_save"):
            if isinstance(value := getattr(self, name), str):
                raise ValueError(f"LoraConfig: {name}={value!r} is a string; want names, e.g. ('in_proj',)")
            object.__setattr__(self, name, tuple(value))
        if not self.targets:
            raise ValueError("LoraConfig: targets is empty; name at least one module, e.g. ('in_proj',)")
        for where, rank in {"rank": self.rank, **_items("rank_pattern", self.rank_pattern)}.items():
            if type(rank) is not int or rank < 1:
                raise ValueError(f"LoraConfig: {where}={rank!r}; want an integer of at least 1")
        alphas = {} if self.alpha is None else {"alpha": self.alpha}
        for where, alpha in {**alphas, **_items("alpha_pattern", self.alpha_pattern)}.items():
            if type(alpha) not in (int, float) or not math.isfinite(alpha) or alpha <= 0:
                raise ValueError(f"LoraConfig: {where}={alpha!r}; want a finite number above 0")
        if type(self.dropout) not in (int, float) or not 0 <= self.dropout < 1:
            raise ValueError(f"LoraConfig: dropout={self.dropout!r}; want a number in [0, 1)")
        for pattern in (*self.rank_pattern, *self.alpha_pattern):
            check_pattern("LoraConfig", pattern)

    def rank_of(self, module: str) -> int:
        """Return the adapter rank of the module at path `module`."""
        return _lookup(self.rank_pattern, module, self.rank)

    def alpha_of(self, module: str) -> float:
        """Return the adapter alpha of the module at path `module`; `rank` if no alpha is set."""
        return float(_lookup(self.alpha_pattern, module, self.rank if self.alpha is None else self.alpha))


def check_pattern(op: str, pattern: str) -> None:
    """Raise ValueError for an invalid regular expression, or one that could backtrack exponentially."""
    try:
        re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        raise ValueError(f"{op}: pattern {pattern[:120]!r} is not a regular expression: {error}") from None
    if len(pattern) > 500 or len(re.findall(r"(?<!\\)[*+{]", pattern)) > 1:
        raise ValueError(
            f"{op}: pattern {pattern[:120]!r} has more than one repetition or 500 letters; name the modules"
        )


def _items(name: str, pattern: Mapping) -> dict[str, object]:
    return {f"{name}[{key!r}]": value for key, value in pattern.items()}


def _lookup(pattern: Mapping, module: str, default):
    """Return the value of the first pattern that matches `module` or its end after a dot, as in PEFT."""
    matching = (value for key, value in pattern.items() if re.match(rf"(.*\.)?({key})$", module))
    return next(matching, default)
