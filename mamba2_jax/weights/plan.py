"""Check a checkpoint's tensor names, shapes and dtypes against the config before allocating any array."""

from collections.abc import Mapping

import numpy as np

from mamba2_jax.config import Mamba2Config
from mamba2_jax.config.families import ignored_prefixes
from mamba2_jax.weights.files import CheckpointError, show
from mamba2_jax.weights.header import FLOAT_DTYPES, TensorInfo
from mamba2_jax.weights.names import (
    condense,
    foreign_prefix,
    other_layers,
    prefix_problem,
    unwrap,
    without_model,
)
from mamba2_jax.weights.reader import Checkpoint
from mamba2_jax.weights.table import (
    EMBEDDING,
    HEAD,
    SCORE,
    StoredTensor,
    match_names,
    pieces_of,
    without_backbone,
)


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
    tensors, notes = _unwrapped(checkpoint, config, table)
    found, missing, unexpected = match_names(table, tensors, config.tie_word_embeddings)
    needed = {stored.name: stored for stored in table}
    ignored = [name for name in unexpected if name.startswith(ignored_prefixes(config.family))]
    unexpected = sorted(set(unexpected) - set(ignored))
    if not head and SCORE in unexpected:
        unexpected.remove(SCORE)
        notes.append(f"{SCORE} is not used: the model was asked for without its classification head")
    there = [tensors[name] for name in unexpected]
    problems = _name_problems([needed[name] for name in missing], there, found, config.num_hidden_layers)
    for name, stored_name in found.items():
        stored = needed[name]
        pieces = [tensors[piece] for piece in pieces_of(stored_name, stored)]
        shape = stored.file_shape[1:] if stored_name not in tensors else stored.file_shape
        for info in pieces:
            if info.shape != shape:
                shapes = f"has shape {show_shape(info.shape)}, the config wants {show_shape(shape)}"
                problems.append(f"{label(info)} {shapes}{_why_vocabulary(name, info.shape, config)}")
            if stored.dtype and info.dtype != stored.dtype:
                problems.append(f"{label(info)} is {info.dtype}, want {stored.dtype}")
            elif not stored.dtype and info.dtype not in FLOAT_DTYPES:
                types = ", ".join(FLOAT_DTYPES)
                problems.append(f"{label(info)} is {info.dtype}, want a float type ({types})")
            elif info.dtype != pieces[0].dtype:
                problems.append(f"{label(info)} is {info.dtype}, {pieces[0].name} is {pieces[0].dtype}")
    if ignored:
        starts = ", ".join(sorted({name.partition(".")[0] for name in ignored}))
        notes.append(
            f"{len(ignored)} tensors of {starts} are not used: prediction of several tokens at a time"
        )
    if not problems and HEAD in found and not needed[HEAD].leaves:
        _check_head(checkpoint, tensors[found[HEAD]], tensors[found[EMBEDDING]], head, notes, problems)
    if problems:
        raise CheckpointError(checkpoint.folder, condense(problems))
    plan = []
    for name, stored_name in found.items():
        stored = needed[name]
        names = [tensors[piece].name for piece in pieces_of(stored_name, stored)]
        plan += [(stored, _located(checkpoint, stored, names))] if stored.leaves else []
    return plan, notes


def check_sizes(checkpoint: Checkpoint, config: Mamba2Config) -> None:
    """Refuse a config whose sizes the files cannot hold, before anything is built from it.

    Raises:
        CheckpointError: more layers than tensors, or several times the parameters of the files.
    """
    held = sum(info.size for info in checkpoint.tensors.values())
    problem = None
    if (layers := config.num_hidden_layers) > (count := len(checkpoint.tensors)):
        problem = f"num_hidden_layers={layers}, but the files hold {count} tensors"
    elif (count := config.num_parameters()) > 4 * held + _SLACK:
        problem = f"the config describes {count:,} parameters, but the files hold {held:,} numbers"
    if problem:
        message = f"{problem}: config and weights do not belong together"
        raise CheckpointError(checkpoint.folder, [message])


_SLACK = 1 << 20  # a small model with another config has its problems listed one by one


def _unwrapped(
    checkpoint: Checkpoint, config: Mamba2Config, table: tuple[StoredTensor, ...]
) -> tuple[dict[str, TensorInfo], list[str]]:
    """Return the tensors by name without the prefixes of wrappers, and a note if there were any."""
    names, wrappers = unwrap(checkpoint.tensors)
    tied = config.tie_word_embeddings
    lacking = len(match_names(table, names, tied)[1])
    while lacking and (shorter := without_model(names)) != names:
        still = len(match_names(table, shorter, tied)[1])
        if still >= lacking:
            break
        names, lacking, wrappers = shorter, still, f"{wrappers}model."
    note = f"the names of the tensors are read without {wrappers!r}, the prefix of a wrapper"
    return {name: checkpoint.tensors[stored] for name, stored in names.items()}, [note] if wrappers else []


def _name_problems(
    missing: list[StoredTensor], unexpected: list[TensorInfo], found: Mapping[str, str], num_layers: int
) -> list[str]:
    """List the missing and the unexpected tensors, or their common cause."""
    there = [info.name for info in unexpected]
    if cause := other_layers([stored.name for stored in missing], there, found, num_layers):
        return [cause]
    problems = []
    if prefix := foreign_prefix([without_backbone(stored.file_name) for stored in missing], there):
        wrong = {name.removeprefix(prefix) for name in there if name.startswith(prefix)}
        problems.append(prefix_problem(prefix, len(wrong)))
        missing = [stored for stored in missing if without_backbone(stored.file_name) not in wrong]
        unexpected = [info for info in unexpected if not info.name.startswith(prefix)]
    for stored in missing:
        problems.append(f"tensor {stored.file_name!r} is missing{_why_missing(stored)}")
    for info in unexpected:
        shape = f"{info.dtype} {show_shape(info.shape)}"
        problems.append(f"tensor {show(info.name)} ({shape}, in {info.file.name}) is unexpected")
    return problems


def _check_head(
    checkpoint: Checkpoint,
    output: TensorInfo,
    embedding: TensorInfo,
    head: bool,
    notes: list[str],
    problems: list[str],
) -> None:
    """Append a note or a problem about a head that the model does not need."""
    if not head:
        notes.append(f"{output.name} is not used: the model was asked for without its head")
    elif _same_bytes(checkpoint, output, embedding):
        notes.append(f"{output.name} repeats the embedding, to which it is tied; it is kept once")
    else:
        problems.append(
            f"tensor {output.name!r} in {output.file.name} differs from {embedding.name!r}, but"
            " tie_word_embeddings is true: set it to false in the config to keep both"
        )


def _located(checkpoint: Checkpoint, stored: StoredTensor, names: list[str]) -> TensorInfo:
    """Return where a stored tensor is; the rows of several matrices are joined to one."""
    if not stored.matrices:
        return checkpoint.tensors[names[0]]
    rows, width = stored.shape
    return checkpoint.join(f"{names[0]} and others as one matrix", names, (rows, width))


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
