"""What configurations of the kernels that are compiled ahead of time share."""

import dataclasses
from typing import ClassVar


@dataclasses.dataclass(frozen=True)
class Named:
    """A configuration with a name, and marks for its test."""

    name: str
    smoke: bool = dataclasses.field(default=False, kw_only=True)
    slow: bool = dataclasses.field(default=False, kw_only=True)
    not_built: ClassVar[tuple[str, ...]] = ("name", "smoke", "slow")

    def __str__(self) -> str:
        return self.name

    @property
    def kwargs(self) -> dict:
        """What `build` takes."""
        return {k: v for k, v in dataclasses.asdict(self).items() if k not in self.not_built}


@dataclasses.dataclass(frozen=True)
class Program(Named):
    """A shape of the scan and its options."""

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
    not_built: ClassVar[tuple[str, ...]] = (*Named.not_built, "spill_budget")

    @property
    def described(self) -> str:
        """The shape and options in one line."""
        shape = f"b{self.b} l{self.l} h{self.h} g{self.g} p{self.p} n{self.n}"
        return ", ".join(filter(None, [shape, self.dtype, "documents" * self.documents, *self.options]))

    @property
    def options(self) -> list[str]:
        """Further options in words."""
        return []
