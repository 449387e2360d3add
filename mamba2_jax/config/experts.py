"""Configuration of a mixture of experts: fields, defaults and checks."""

import dataclasses
import math

from mamba2_jax.config.layers import MAX_SIZE


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExpertsConfig:
    """Sizes and router of a mixture of experts; a shared expert is a plain MLP beside it.

    Args:
        num_experts: number of experts, `e`.
        width: channels inside an expert, `m`.
        top_k: experts per token, `k`.
        gated: `silu(gate) * value` inside an expert, instead of `relu(x) ** 2`.
        router: `"softmax"` over the chosen logits, or `"sigmoid"` scores with a correction of the choice.
        num_groups: groups of neighbouring experts; sigmoid only, as all that follow but `latent_size`.
        groups_kept: groups that a token chooses its experts from.
        normalised: divide the chosen scores by their sum.
        scale: factor on the chosen scores.
        latent_size: width that the experts read and write, between two shared projections; 0: none.

    Raises:
        ValueError: invalid or contradictory fields; the message lists all of them.

    >>> ExpertsConfig(num_experts=8, width=64, top_k=2, gated=True).activation
    'silu_gated'
    """

    num_experts: int
    width: int
    top_k: int
    gated: bool
    router: str = "softmax"
    num_groups: int = 1
    groups_kept: int = 1
    normalised: bool = True
    scale: float = 1.0
    latent_size: int = 0

    def __post_init__(self):
        problems = list(self._problems())
        if problems:
            raise ValueError("ExpertsConfig: " + "; ".join(problems))

    @property
    def activation(self) -> str:
        """Return the name of the experts' activation in `ops.experts`."""
        return "silu_gated" if self.gated else "relu2"

    def _problems(self):
        low = {"num_experts": 1, "width": 1, "top_k": 1, "num_groups": 1, "groups_kept": 1, "latent_size": 0}
        wrong = [name for name, least in low.items() if not _is_integer_from(least, getattr(self, name))]
        yield from (
            f"{name}={getattr(self, name)!r}, wants an integer of at least {low[name]}" for name in wrong
        )
        for name in ("gated", "normalised"):
            if not isinstance(getattr(self, name), bool):
                yield f"{name}={getattr(self, name)!r}, wants true or false"
        if (
            isinstance(self.scale, bool)
            or not isinstance(self.scale, int | float)
            or not (0 < self.scale < math.inf)
        ):
            yield f"scale={self.scale!r}, wants a finite number above 0"
        if self.router not in ("softmax", "sigmoid"):
            yield f"router={self.router!r}, wants 'softmax' or 'sigmoid'"
        if not wrong:
            yield from self._contradictions()

    def _contradictions(self):
        if self.num_experts % self.num_groups:
            yield f"num_experts={self.num_experts} is not a multiple of num_groups={self.num_groups}"
        if self.groups_kept > self.num_groups:
            yield f"groups_kept={self.groups_kept} is more than num_groups={self.num_groups}"
        choices = self.num_experts // self.num_groups * self.groups_kept
        if self.top_k > choices:
            yield f"top_k={self.top_k} is more than the {choices} experts to choose from"
        options = {field.name: field.default for field in dataclasses.fields(self)}
        for name in ("num_groups", "groups_kept", "normalised", "scale"):
            if self.router == "softmax" and getattr(self, name) != options[name]:
                yield f"{name}={getattr(self, name)} has no meaning with router='softmax'"


def _is_integer_from(low: int, value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= MAX_SIZE
