"""Checkpoint files and the one table of parameters: names there, and rows of numbers, in both directions.

A stored tensor splits by rows into the model's leaves, as `mamba2_jax.config.kinds` declares them. Importing
and exporting both go through `as_rows`.
"""

from collections.abc import Collection, Mapping

import numpy as np

from mamba2_jax.config.kinds import BACKBONE, EMBEDDING, HEAD, checkpoint_table
from mamba2_jax.config.leaves import Leaf, StoredTensor

__all__ = [
    "EMBEDDING",
    "HEAD",
    "Leaf",
    "StoredTensor",
    "as_rows",
    "assemble",
    "checkpoint_table",
    "match_names",
    "stored_names",
    "written_name",
]


def as_rows(leaf: Leaf, array: np.ndarray) -> np.ndarray:
    """View a contiguous array of the leaf's shape as `(rows, numbers per row)`, as the file orders them.

    Importing writes through this view, exporting reads through it.
    """
    count = leaf.rows[1] - leaf.rows[0]
    if leaf.role.rows_last:
        return array.reshape(-1, count).T
    return array.reshape(count, -1)


def assemble(stored: StoredTensor, arrays: Mapping[str, np.ndarray]) -> np.ndarray:
    """Build the stored tensor from arrays by leaf path: the way out, the inverse of reading."""
    parts = [as_rows(leaf, np.ascontiguousarray(arrays[leaf.path])) for leaf in stored.leaves]
    return np.concatenate(parts).reshape(stored.shape)


def stored_names(name: str) -> tuple[str, ...]:
    """Every name under which a file may hold the tensor, the canonical one first.

    state-spaces writes `embedding` for `embeddings`, Mistral puts `model.` in front, and a bare Mamba2Model
    has no `backbone.`.
    """
    names = [name, name.replace("backbone.embeddings.", "backbone.embedding.")]
    names += [f"model.{other}" for other in names] + [other.removeprefix(BACKBONE) for other in names]
    return tuple(dict.fromkeys(names))


def written_name(name: str, form: str, head: bool) -> str:
    """Return the name that a form writes a tensor under; a bare Mamba2Model's have no `backbone.`."""
    if form == "state-spaces":
        return name.replace("backbone.embeddings.", "backbone.embedding.")
    return name if head else name.removeprefix(BACKBONE)


def match_names(
    table: tuple[StoredTensor, ...], present: Collection[str], tied: bool
) -> tuple[dict[str, str], list[str], list[str]]:
    """Find each tensor of the table among the names that a checkpoint has.

    Args:
        table: what the model needs, from `checkpoint_table`.
        present: the stored names.
        tied: head and embedding are one tensor: either may stand for both.

    Returns:
        `(found, missing, unexpected)`: canonical name -> stored name, and what is left over on each side. A
        second name for a tensor already found is unexpected.
    """
    found: dict[str, str] = {}
    missing = []
    for stored in table:
        name = next((name for name in stored_names(stored.name) if name in present), None)
        if name is not None:
            found[stored.name] = name
        elif stored.leaves:
            missing.append(stored.name)
    if tied and EMBEDDING in missing and HEAD in found:
        missing.remove(EMBEDDING)
        found[EMBEDDING] = found.pop(HEAD)
    unexpected = sorted(set(present) - set(found.values()))
    return found, missing, unexpected
