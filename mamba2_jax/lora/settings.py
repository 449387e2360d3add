"""What an adapter is like: `LoraConfig`, checked when it is made."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class LoraConfig:
    """Which modules get adapters, and of what kind. Names and meanings are PEFT's where it has them.

    Args:
        rank: the inner size `r`.
        alpha: the adapter is multiplied by `alpha / rank`. None: alpha = rank.
        targets: names of modules: `in_proj`, `out_proj`, `conv1d`, `embeddings`, `lm_head`, or a longer end
            of a path, such as `layers.3.mixer.in_proj`.
        dropout: share of a projection's inputs dropped in training; not for embedding and convolution.
        use_rslora: multiply by `alpha / sqrt(rank)` instead.
        rank_pattern: another rank for modules whose path ends like this (a regular expression).
        alpha_pattern: another alpha, likewise.

    Raises:
        ValueError: a value out of range, named.
    """

    rank: int = 8
    alpha: float | None = None
    targets: tuple[str, ...] = ("in_proj", "out_proj")
    dropout: float = 0.0
    use_rslora: bool = False
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self):
        if isinstance(self.targets, str):
            raise ValueError(
                f"LoraConfig: targets={self.targets!r} is a string; want names, e.g. ('in_proj',)"
            )
        object.__setattr__(self, "targets", tuple(self.targets))
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
        """The rank of a module's adapter, `module` being its path."""
        return _lookup(self.rank_pattern, module, self.rank)

    def alpha_of(self, module: str) -> float:
        """The alpha of a module's adapter; `rank` where none is given."""
        return float(_lookup(self.alpha_pattern, module, self.rank if self.alpha is None else self.alpha))


def check_pattern(op: str, pattern: str) -> None:
    """Refuse a regular expression that is none, or that could search for ever (two repetitions can)."""
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
    """The first pattern that is the end of `module`, from a dot on: PEFT's rule."""
    matching = (value for key, value in pattern.items() if re.match(rf"(.*\.)?({key})$", module))
    return next(matching, default)
