"""Map stored tensors of a checkpoint to the model's leaves and back: tensor names and stored rows.

The stored rows of a tensor are divided among the model's leaves as `mamba2_jax.config.table` says. Import
and export both use `as_rows`.
"""

from collections.abc import Collection, Mapping

import numpy as np

from mamba2_jax.config.families.family import EACH
from mamba2_jax.config.leaves import Leaf, StoredTensor
from mamba2_jax.config.table import BACKBONE, EMBEDDING, HEAD, SCORE, checkpoint_table, stored_table

__all__ = [
    "EMBEDDING",
    "HEAD",
    "SCORE",
    "Leaf",
    "StoredTensor",
    "as_rows",
    "assemble",
    "checkpoint_table",
    "match_names",
    "pieces_of",
    "stored_names",
    "stored_table",
    "without_backbone",
    "written_name",
]


def as_rows(leaf: Leaf, array: np.ndarray) -> np.ndarray:
    """View a contiguous array of the leaf's shape as `(stored rows, numbers per row)` in the file's order.

    Import writes through this view, export reads through it.
    """
    count = leaf.rows[1] - leaf.rows[0]
    if leaf.role.rows_last:
        return array.reshape(-1, count).T
    return array.reshape(count, -1)


def assemble(stored: StoredTensor, arrays: Mapping[str, np.ndarray]) -> np.ndarray:
    """Build a stored tensor for export from the arrays of its leaves, given by leaf path."""
    parts = [as_rows(leaf, np.ascontiguousarray(arrays[leaf.path])) for leaf in stored.leaves]
    return np.concatenate(parts).reshape(stored.shape)


def stored_names(stored: StoredTensor) -> tuple[str, ...]:
    """Return every name under which a file may hold a tensor, the family's own name first.

    state-spaces writes `embedding` for `embeddings`, Mistral adds the prefix `model.`, transformers 5 calls
    some families' `backbone.` `model.`, and a bare model without a head has no such prefix.
    """
    name = stored.file_name
    bare = without_backbone(name)
    names = [name, name.replace("backbone.embeddings.", "backbone.embedding.")]
    names += [f"model.{other}" for other in (*names, bare)] + [without_backbone(other) for other in names]
    return tuple(dict.fromkeys(names))


def written_name(stored: StoredTensor, form: str, head: bool) -> str:
    """Return the name of a tensor in a form; a bare model without a head has no prefix `backbone.`."""
    if form == "state-spaces":
        return stored.name.replace("backbone.embeddings.", "backbone.embedding.")
    return stored.file_name if head else without_backbone(stored.file_name)


def pieces_of(name: str, stored: StoredTensor) -> list[str]:
    """Return the names of the tensors in files that make up a stored tensor: one, or one per matrix."""
    return [name.replace(EACH, str(number)) for number in range(stored.matrices)] if EACH in name else [name]


def without_backbone(name: str) -> str:
    """Return a name as a bare model without a head has it."""
    return name.removeprefix(BACKBONE).removeprefix("model.")


def match_names(
    table: tuple[StoredTensor, ...], present: Collection[str], tied: bool
) -> tuple[dict[str, str], list[str], list[str]]:
    """Find each tensor of the table among the tensor names of a checkpoint.

    Args:
        table: the tensors of the model, from `checkpoint_table`.
        present: the tensor names in the checkpoint.
        tied: head and embedding are one tensor, which may be stored under either name.

    Returns:
        `(found, missing, unexpected)`: canonical name -> stored name, canonical names without a stored
        tensor, and unused stored names. A second name of a tensor already found is unexpected.
    """
    found: dict[str, str] = {}
    missing = []
    used: set[str] = set()
    for stored in table:
        names = (name for name in stored_names(stored) if all(p in present for p in pieces_of(name, stored)))
        name = next(names, None)
        if name is not None:
            found[stored.name] = name
            used.update(pieces_of(name, stored))
        elif stored.leaves:
            missing.append(stored.name)
    if tied and EMBEDDING in missing and HEAD in found:
        missing.remove(EMBEDDING)
        found[EMBEDDING] = found.pop(HEAD)
    unexpected = sorted(set(present) - used)
    return found, missing, unexpected
