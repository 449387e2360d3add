"""Which weights can take an adapter: read off the one table of checkpoint names, none is listed here."""

from collections.abc import Iterable
from dataclasses import dataclass

from mamba2_jax.config import Mamba2Config
from mamba2_jax.weights.table import EMBEDDING, Leaf, StoredTensor, checkpoint_table


@dataclass(frozen=True)
class Target:
    """A module whose weight, one stored tensor, can take an adapter.

    Args:
        name: the module's path, transformers', such as `backbone.layers.0.mixer.in_proj`.
        stored: the weight as checkpoints have it, and the leaves that its rows fill.
    """

    name: str
    stored: StoredTensor

    @property
    def is_embedding(self) -> bool:
        """Whether it is looked up, not multiplied: its input axis is the vocabulary."""
        return self.stored.name == EMBEDDING

    @property
    def in_size(self) -> int:
        """Length of the input axis: of `A`'s first."""
        return self.stored.shape[0 if self.is_embedding else -1]

    @property
    def out_size(self) -> int:
        """Length of all output axes together."""
        return self.stored.shape[-1 if self.is_embedding else 0]

    def shape_of_B(self, leaf: Leaf, rank: int) -> tuple[int, ...]:
        """A leaf's shape, its input axis replaced by the rank."""
        axis = leaf.role.input_axis
        return (*leaf.shape[:axis], rank, *leaf.shape[axis + 1 :])


def adapter_targets(config: Mamba2Config, head: bool = True) -> dict[str, Target]:
    """Every module whose weight is a matrix, by path; the head also when it is tied to the embedding."""
    table = checkpoint_table(config.replace(tie_word_embeddings=False), head)
    return {
        name: Target(name, stored)
        for stored in table
        if stored.leaves and len(stored.shape) > 1
        for name in [stored.name.removesuffix(".weight")]
    }


def match_targets(op: str, targets: dict[str, Target], wanted: Iterable[str]) -> list[Target]:
    """The targets whose path is, or ends in, one of the wanted names, in the model's order.

    Raises:
        ValueError: a name that is no target's; lists what exists.
    """
    wanted = tuple(wanted)
    for name in wanted:
        if not any(ends_in(target, name) for target in targets):
            kinds = sorted({target.rpartition(".")[2] for target in targets})
            raise ValueError(
                f"{op}: the model has no module {str(name)[:120]!r} that takes an adapter; "
                f"it has {', '.join(kinds)}, and longer ends of paths such as {max(targets, key=len)}"
            )
    return [target for name, target in targets.items() if any(ends_in(name, end) for end in wanted)]


def ends_in(path: str, end: str) -> bool:
    """Whether a path is `end` or ends in it, from a dot on."""
    return path == end or path.endswith(f".{end}")
