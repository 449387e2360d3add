"""Check a checkpoint's tensor names, shapes and dtypes against the config before allocating any array."""

import numpy as np

from mamba2_jax.config import Mamba2Config
from mamba2_jax.config.families import ignored_prefixes
from mamba2_jax.weights.files import CheckpointError, show
from mamba2_jax.weights.header import FLOAT_DTYPES, TensorInfo
from mamba2_jax.weights.reader import Checkpoint
from mamba2_jax.weights.table import EMBEDDING, HEAD, StoredTensor, match_names, pieces_of


def label(info: TensorInfo) -> str:
    """Format a tensor's name and file for a message."""
    return f"tensor {show(info.name)} in {info.file.name}"


def show_shape(shape: tuple[int, ...]) -> str:
    """Format a shape as a Python tuple."""
    return "(" + ", ".join(map(str, shape)) + ("," if len(shape) == 1 else "") + ")"


def plan_load(
    checkpoint: Checkpoint, config: Mamba2Config, table: tuple[StoredTensor, ...], head: bool
) -> tuple[list[tuple[StoredTensor, TensorInfo]], list[str]]:
    """Check a checkpoint against the config, and list the tensors to load.

    Returns:
        Pairs of a stored tensor of the table and its location in a file; and notes for the user.

    Raises:
        CheckpointError: tensors are missing, unexpected, or of a wrong shape or dtype; lists them all.
    """
    tied = config.tie_word_embeddings
    found, missing, unexpected = match_names(table, checkpoint.tensors, tied)
    needed = {stored.name: stored for stored in table}
    problems = [
        f"tensor {needed[name].file_name!r} is missing{_why_missing(needed[name])}" for name in missing
    ]
    ignored = [name for name in unexpected if name.startswith(ignored_prefixes(config.family))]
    for name in sorted(set(unexpected) - set(ignored)):
        info = checkpoint.tensors[name]
        shape = f"{info.dtype} {show_shape(info.shape)}"
        problems.append(f"tensor {show(name)} ({shape}, in {info.file.name}) is unexpected")
    for name, stored_name in found.items():
        stored = needed[name]
        pieces = [checkpoint.tensors[piece] for piece in pieces_of(stored_name, stored)]
        shape = stored.file_shape[1:] if stored_name not in checkpoint.tensors else stored.file_shape
        for info in pieces:
            if info.shape != shape:
                shapes = f"has shape {show_shape(info.shape)}, the config wants {show_shape(shape)}"
                problems.append(f"{label(info)} {shapes}{_why_vocabulary(name, info.shape, config)}")
            if info.dtype not in FLOAT_DTYPES:
                types = ", ".join(FLOAT_DTYPES)
                problems.append(f"{label(info)} is {info.dtype}, want a float type ({types})")
            elif info.dtype != pieces[0].dtype:
                problems.append(f"{label(info)} is {info.dtype}, {pieces[0].name} is {pieces[0].dtype}")
    notes = []
    if ignored:
        starts = ", ".join(sorted({name.partition(".")[0] for name in ignored}))
        notes.append(
            f"{len(ignored)} tensors of {starts} are not used: prediction of several tokens at a time"
        )
    if not problems and HEAD in found and not needed[HEAD].leaves:
        output, embedding = (checkpoint.tensors[found[name]] for name in (HEAD, EMBEDDING))
        if not head:
            notes.append(f"{output.name} is not used: the model was asked for without its head")
        elif _same_bytes(checkpoint, output, embedding):
            notes.append(f"{output.name} repeats the embedding, to which it is tied; it is kept once")
        else:
            problems.append(
                f"tensor {output.name!r} in {output.file.name} differs from {embedding.name!r}, but"
                " tie_word_embeddings is true: set it to false in the config to keep both"
            )
    if problems:
        raise CheckpointError(checkpoint.folder, problems)
    plan = [(needed[n], _located(checkpoint, needed[n], s)) for n, s in found.items() if needed[n].leaves]
    return plan, notes


def _located(checkpoint: Checkpoint, stored: StoredTensor, name: str) -> TensorInfo:
    """Return where a stored tensor is; the rows of several matrices are joined to one."""
    if not stored.matrices:
        return checkpoint.tensors[name]
    rows, width = stored.shape
    return checkpoint.join(f"{name} as one matrix", pieces_of(name, stored), (rows, width))


def _why_missing(stored: StoredTensor) -> str:
    """Return the likely reason for a missing tensor, "" if unknown."""
    if stored.name == HEAD:
        return " (tie_word_embeddings is false; a tied head, or a bare Mamba2Model, has none)"
    return f" ({stored.reason})" if stored.reason else ""


def _why_vocabulary(name: str, shape: tuple[int, ...], config: Mamba2Config) -> str:
    """Explain an embedding or head whose stored rows differ from `vocab_size`; "" for other tensors."""
    if name not in (EMBEDDING, HEAD) or len(shape) != 2 or shape[1] != config.hidden_size:
        return ""
    rows = shape[0]
    relation = "fewer" if rows < config.vocab_size else "more"
    return (
        f": {rows} rows of vocabulary, {relation} than vocab_size={config.vocab_size}; vocab_size counts the"
        f" padding rows too, so set it to {rows} if that is how the checkpoint was saved"
    )


def _same_bytes(checkpoint: Checkpoint, first: TensorInfo, second: TensorInfo) -> bool:
    """Return whether two tensors of equal shape have the same dtype and bytes."""
    if first.dtype != second.dtype:
        return False
    if (first.file, first.start) == (second.file, second.start):  # one storage in a PyTorch file
        return True
    pairs = zip(checkpoint.blocks(first.name), checkpoint.blocks(second.name), strict=True)
    return all(np.array_equal(a.view(np.uint8), b.view(np.uint8)) for (_, a), (_, b) in pairs)
