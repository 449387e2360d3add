"""List the tensors of a checkpoint to write, from model arrays or from another checkpoint."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from mamba2_jax.config import Mamba2Config
from mamba2_jax.config.quantization import check_quantize, quantized_tensors, type_for
from mamba2_jax.processes import fetch
from mamba2_jax.typing import DTypeLike
from mamba2_jax.weight_types import TypeName, WeightType, dequantize
from mamba2_jax.weights.files import CheckpointError
from mamba2_jax.weights.header import DTYPES, FLOAT_DTYPES, TensorInfo
from mamba2_jax.weights.plan import check_sizes, label, plan_load
from mamba2_jax.weights.reader import Checkpoint
from mamba2_jax.weights.safetensors_file import Outgoing
from mamba2_jax.weights.table import (
    StoredTensor,
    as_rows,
    checkpoint_table,
    pieces_of,
    stored_table,
    written_name,
)
from mamba2_jax.weights.values import Scratch, copy_rows, count_non_finite, target_dtype

_BLOCK_BYTES = 1 << 20


def outgoing_weights(
    arrays: Mapping[str, jax.Array],
    config: Mamba2Config,
    *,
    format: str = "transformers",
    head: bool = True,
    dtype: DTypeLike | None = None,
    stored_dtypes: Mapping[str, str] | None = None,
    extra: tuple[StoredTensor, ...] = (),
) -> list[Outgoing]:
    """List the tensors to write for a model's parameters; their blocks are made while they are written.

    Args:
        arrays: the parameters by path; fetched from their devices one at a time, while they are written.
        config: the model config.
        format: form of the checkpoint, which decides the tensor names.
        head: False for the bare Mamba2Model, whose names lack the prefix `backbone.`.
        dtype: dtype to write; never narrows A_log, dt_bias and D. None: the dtype in `stored_dtypes`, else
            the parameter's own.
        stored_dtypes: dtype names by canonical tensor name, from the checkpoint that the model came from.
        extra: tensors of a classifier's head; the names then have the prefix.

    Raises:
        ValueError: parameters missing, unknown or of a wrong shape; a dtype that weights cannot be stored in.
    """
    table = [stored for stored in (*stored_table(config, head), *extra) if stored.leaves]
    wanted = {leaf.path: leaf.shape for stored in table for leaf in stored.leaves}
    _check_paths(arrays, wanted)
    outgoing = []
    for stored in table:
        own = jnp.result_type(*(arrays[leaf.path].dtype for leaf in stored.leaves))
        target = np.dtype((stored_dtypes or {}).get(stored.name, own))
        target = target_dtype(stored.leaves, target, None if dtype is None else check_dtype(dtype))
        name = written_name(stored, format, head or bool(extra))
        pieces = pieces_of(name, stored)
        if len(pieces) == 1:
            outgoing.append(Outgoing(name, stored.file_shape, target, _row_blocks(stored, arrays)))
            continue
        for number, piece in enumerate(pieces):
            blocks = partial(_matrix_blocks, arrays[stored.leaves[0].path], number)
            outgoing.append(Outgoing(piece, stored.file_shape[1:], target, blocks))
    return outgoing


def convertible_weights(
    checkpoint: Checkpoint,
    config: Mamba2Config,
    *,
    format: str,
    dtype: DTypeLike | None = None,
    quantize: TypeName | None = None,
    allow_non_finite: bool = False,
) -> list[Outgoing]:
    """List the tensors of an open checkpoint for writing in another form; each is read while it is written.

    All forms store the same rows, so only one block of rows is in memory at a time.

    Args:
        checkpoint: must stay open until all tensors are written.
        config: the model config, against which the checkpoint is checked.
        format: form of the checkpoint to write, which decides the tensor names.
        dtype: dtype to write; never narrows A_log, dt_bias and D. Dequantizes. None: each tensor's own.
        quantize: type of `WEIGHT_TYPES` to write.
        allow_non_finite: accept NaN and infinite values; False: raise CheckpointError while writing them.

    Raises:
        CheckpointError: tensors that do not match the config; lists every problem.
    """
    check_sizes(checkpoint, config)
    plan, _ = plan_load(checkpoint, config, stored_table(config), head=True)
    located = {stored.name: info for stored, info in plan}
    wanted = None if dtype is None else check_dtype(dtype)
    written = check_quantize("convert", quantize, config) or (config.quantization if dtype is None else None)
    outgoing = []
    for stored in checkpoint_table(config):
        if not stored.leaves:
            continue
        sources = [located[one.name] for one in quantized_tensors(stored, config.quantization)]
        targets, kind = quantized_tensors(stored, written), type_for(stored, written)
        for index, target in enumerate(targets):
            read, change, floats = sources, dequantize, np.dtype(np.float32)
            if len(sources) == len(targets):
                read, change, floats = [sources[index]], _unchanged, sources[index].array_dtype
            elif kind is not None:
                change = partial(_quantized, kind, index)
            own = DTYPES[target.dtype] if target.dtype else target_dtype(target.leaves, floats, wanted)
            outgoing += _converted(checkpoint, target, read, change, own, format, allow_non_finite)
    return outgoing


def _converted(
    checkpoint: Checkpoint,
    target: StoredTensor,
    sources: list[TensorInfo],
    change: Callable[..., np.ndarray],
    dtype: np.dtype,
    form: str,
    allow_non_finite: bool,
) -> Iterator[Outgoing]:
    """Yield a tensor to write, or one per matrix of it, made by `change` of the same rows of its sources."""

    def blocks(sources: Sequence[TensorInfo]) -> Iterator[np.ndarray]:
        for row, block in checkpoint.blocks(sources[0].name):
            rows = [block]
            for info in sources[1:]:
                rows.append(np.empty((len(block), *info.shape[1:]), info.array_dtype))
                checkpoint.read_rows(info.name, row, rows[-1])
            for info, numbers in zip(sources, rows, strict=True):
                if not allow_non_finite and (count := count_non_finite(numbers)):
                    message = f"{label(info)} has {count} or more NaN or infinite values"
                    raise CheckpointError(checkpoint.folder, [message])
            yield change(*rows)

    name = written_name(target, form, head=True)
    names = pieces_of(name, target)
    if len(names) == 1:
        yield Outgoing(name, target.file_shape, dtype, partial(blocks, sources))
        return
    for name, pieces in zip(names, zip(*(info.pieces for info in sources), strict=True), strict=True):
        yield Outgoing(name, target.file_shape[1:], dtype, partial(blocks, pieces))


def _unchanged(rows: np.ndarray) -> np.ndarray:
    return rows


def _quantized(kind: WeightType, which: int, rows: np.ndarray) -> np.ndarray:
    """Return the values (0) or the scales (1) of rows."""
    return kind.quantize(rows)[which]


def check_dtype(dtype: DTypeLike) -> np.dtype:
    """Return `dtype` as a numpy dtype, or raise ValueError if weights cannot be stored in it."""
    checked = np.dtype(jnp.dtype(dtype))
    if checked not in FLOAT_DTYPES.values():
        names = ", ".join(sorted(dtype.name for dtype in FLOAT_DTYPES.values()))
        raise ValueError(f"dtype={checked.name}: weights are stored as one of {names}")
    return checked


def _check_paths(arrays: Mapping[str, jax.Array], wanted: Mapping[str, tuple[int, ...]]) -> None:
    problems = [f"{path} has no place in a checkpoint" for path in sorted(set(arrays) - set(wanted))]
    problems += [f"{path} is missing" for path in sorted(set(wanted) - set(arrays))]
    problems += [
        f"{path} is {tuple(arrays[path].shape)}, the config wants {shape}"
        for path, shape in wanted.items()
        if path in arrays and arrays[path].shape != shape
    ]
    if problems:
        more = f", and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise ValueError(f"save: {'; '.join(problems[:5])}{more}; merge adapters into the weights first")


def _matrix_blocks(leaf: jax.Array, number: int) -> Iterator[np.ndarray]:
    """Yield one of the matrices of a leaf."""
    yield np.ascontiguousarray(fetch(leaf[number]))


def _row_blocks(stored: StoredTensor, arrays: Mapping[str, jax.Array]) -> Callable[[], Iterator[np.ndarray]]:
    """Return a generator function that yields a stored tensor's rows in blocks, taken from its leaves."""

    def blocks() -> Iterator[np.ndarray]:
        scratch = Scratch()
        for leaf in stored.leaves:
            rows = as_rows(leaf, np.ascontiguousarray(fetch(arrays[leaf.path])))  # (rows, elements per row)
            step = max(1, _BLOCK_BYTES // max(1, rows.shape[1] * rows.itemsize))
            for row in range(0, len(rows), step):
                block = scratch.take("block", rows[row : row + step].shape, rows.dtype)
                copy_rows(rows[row : row + step], block, scratch)
                yield block

    return blocks
