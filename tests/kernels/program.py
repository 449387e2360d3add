"""What configurations of the forward's and the backward's kernels that are compiled ahead of time share."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Program:
    """A shape and its options."""

    name: str
    b: int = 1
    l: int = 4096
    h: int = 128
    g: int = 8
    p: int = 64
    n: int = 128
    dtype: str = "bfloat16"
    D: str | None = "h"
    documents: bool = False
    spill_budget: int = dataclasses.field(default=0, kw_only=True)  # bytes a thread stores and loads
    smoke: bool = dataclasses.field(default=False, kw_only=True)
    slow: bool = dataclasses.field(default=False, kw_only=True)

    def __str__(self) -> str:
        return self.name

    @property
    def kwargs(self) -> dict:
        """What `build` takes."""
        fields = dataclasses.asdict(self)
        return {k: v for k, v in fields.items() if k not in ("name", "spill_budget", "smoke", "slow")}

    @property
    def described(self) -> str:
        """The shape and options in one line."""
        shape = f"b{self.b} l{self.l} h{self.h} g{self.g} p{self.p} n{self.n}"
        return ", ".join(filter(None, [shape, self.dtype, "documents" * self.documents, *self.options]))

    @property
    def options(self) -> list[str]:
        """Further options in words."""
        return []
