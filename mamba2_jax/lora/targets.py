"""Find the weights that can take an adapter, from the table of checkpoint tensors."""

from collections.abc import Iterable
from dataclasses import dataclass

from mamba2_jax.config import Mamba2Config
from mamba2_jax.weights.table import (
    EMBEDDING,
    Leaf,
    StoredTensor,
    checkpoint_table,
    stored_names,
    written_name,
)


@dataclass(frozen=True)
class Target:
    """A module whose weight, one stored tensor, can take an adapter.

    Args:
        name: path of the module in the model, such as `backbone.layers.0.mixer.in_proj`.
        stored: the weight in a checkpoint, with the leaves that its stored rows fill.
    """

    name: str
    stored: StoredTensor

    def file_name(self, head: bool = True) -> str:
        """Return the path of the module in the family's class in transformers; without a head, bare."""
        return written_name(self.stored, "transformers", head).removesuffix(".weight")

    def file_names(self) -> tuple[str, ...]:
        """Return every path that the module has in some version of transformers."""
        return tuple(name.removesuffix(".weight") for name in stored_names(self.stored))

    @property
    def is_embedding(self) -> bool:
        """Return whether the weight is the embedding, whose input axis is the vocabulary of a lookup."""
        return self.stored.name == EMBEDDING

    @property
    def in_size(self) -> int:
        """Return the size of the weight's input axis, the first axis of `A`."""
        return self.stored.shape[0 if self.is_embedding else -1]

    @property
    def out_size(self) -> int:
        """Return the total size of the weight's output axes."""
        return self.stored.shape[-1 if self.is_embedding else 0]

    def shape_of_B(self, leaf: Leaf, rank: int) -> tuple[int, ...]:
        """Return the shape of `B` for a leaf: the leaf's shape with `rank` as the input axis."""
        axis = leaf.role.input_axis
        return (*leaf.shape[:axis], rank, *leaf.shape[axis + 1 :])


def adapter_targets(config: Mamba2Config, head: bool = True) -> dict[str, Target]:
    """Map the path of every module with a weight of several axes to its target; includes a tied head."""
    table = checkpoint_table(config.replace(tie_word_embeddings=False), head)
    return {
        name: Target(name, stored)
        for stored in table
        if stored.leaves and len(stored.shape) > 1
        for name in [stored.name.removesuffix(".weight")]
    }


def match_targets(op: str, targets: dict[str, Target], wanted: Iterable[str]) -> list[Target]:
    """Select the targets whose path is, or ends in, one of the wanted names, in the model's order.

    Raises:
        ValueError: a name matches no target; the message lists the valid names.
    """
    wanted = tuple(wanted)
    for name in wanted:
        if not any(_is_meant(target, name) for target in targets.values()):
            kinds = sorted({target.rpartition(".")[2] for target in targets})
            raise ValueError(
                f"{op}: the model has no module {str(name)[:120]!r} that takes an adapter; "
                f"it has {', '.join(kinds)}, and longer ends of paths such as {max(targets, key=len)}"
            )
    return [target for target in targets.values() if any(_is_meant(target, name) for name in wanted)]


def _is_meant(target: Target, name: str) -> bool:
    return ends_in(target.name, name) or ends_in(target.file_name(), name)


def ends_in(path: str, end: str) -> bool:
    """Return whether the dot-joined path is `end` or ends in the components of `end`."""
    return path == end or path.endswith(f".{end}")
