"""Checkpoint files -> named JAX arrays: everything is checked first, then tensors are placed one by one.

>>> from pathlib import Path
>>> import mamba2_jax.weights as weights
>>> from mamba2_jax.config import Mamba2Config
>>> folder = Path(weights.__file__).parents[1] / "assets" / "tiny-python"
>>> arrays, report = load_weights(folder, Mamba2Config.from_pretrained(folder))
>>> arrays["backbone.layers.0.mixer.in_proj.weight_zx"].shape
(192, 2, 384)
>>> report.parameters == Mamba2Config.from_pretrained(folder).num_parameters()
True
"""

import math
import os
import time
from collections import Counter
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Sharding

from mamba2_jax.config import Mamba2Config
from mamba2_jax.typing import DTypeLike
from mamba2_jax.weights.files import CheckpointError, show
from mamba2_jax.weights.header import FLOAT_DTYPES, TensorInfo
from mamba2_jax.weights.names import EMBEDDING, HEAD, Leaf, StoredTensor, checkpoint_table, match_names
from mamba2_jax.weights.reader import Checkpoint, open_checkpoint
from mamba2_jax.weights.report import LoadReport, progress_bar

Placement = Sharding | jax.Device | None
"""Where an array goes; None is JAX's default device."""

_TILE_ROWS = 16  # transposing 16 rows at a time is 5x faster than a whole 4 MB block: it stays in cache
_ALIGNMENT = 64  # JAX on CPU takes an aligned host array as it is, without a second copy
_EXPONENT = {
    8: 0x7FF0 << 48,
    4: 0x7F80 << 16,
}  # all ones: infinite or NaN; of 2 bytes see `_count_non_finite`


def load_weights(
    folder: str | os.PathLike[str],
    config: Mamba2Config,
    *,
    param_dtype: DTypeLike | None = None,
    sharding: Placement | Callable[[str], Placement] = None,
    allow_non_finite: bool = False,
    show_progress: bool = False,
    head: bool = True,
) -> tuple[dict[str, jax.Array], LoadReport]:
    """Load a checkpoint's weights as arrays by parameter path.

    Every name, shape and dtype is checked against the config before the first array is made. On the host no
    more than the parameter being placed and one block of its file are in memory beyond the result.

    Args:
        folder: holds `model.safetensors`, or an index and its shards.
        config: the model that they are for.
        param_dtype: cast to this float type; None keeps each tensor as it is stored. A_log, dt_bias and D are
            never narrowed below what is stored.
        sharding: where the arrays go: one place for all, or a function of the parameter's path.
        allow_non_finite: take NaN and infinite weights (the report names them) instead of refusing them.
        show_progress: draw a progress bar on stderr.
        head: False leaves out `lm_head.weight`, for the bare Mamba2Model.

    Returns:
        The arrays, which own their memory (the files may go), and a `LoadReport`.

    Raises:
        CheckpointError: a broken file, or tensors that do not fit the config; lists every problem.
        ValueError: `param_dtype` is not a float type that JAX can hold, or a sharding does not fit a shape.
    """
    began = time.perf_counter()
    wanted = None if param_dtype is None else _check_param_dtype(param_dtype)
    place = sharding if callable(sharding) else lambda path: sharding
    table = checkpoint_table(config, head)
    with open_checkpoint(folder) as checkpoint:
        plan, notes = _plan(checkpoint, config, table, head)
        run = _Loader(checkpoint, wanted, place, allow_non_finite)
        with progress_bar(sum(info.nbytes for _, info in plan), show_progress) as advance:
            # in the order of the files, so that a disk reads straight on
            for stored, info in sorted(plan, key=lambda pair: (pair[1].file, pair[1].start)):
                run.load(stored, info)
                advance(info.nbytes)
    if run.problems:
        raise CheckpointError(checkpoint.folder, run.problems)
    order = [leaf.path for stored in table for leaf in stored.leaves]
    arrays = {path: run.arrays[path] for path in order}
    report = LoadReport(
        source=checkpoint.folder,
        files=checkpoint.files,
        tensors=len(plan),
        parameters=sum(run.stored_dtypes.values()),
        bytes=sum(info.nbytes for _, info in plan),
        dtypes=dict(run.stored_dtypes.most_common()),
        param_dtypes=dict(run.param_dtypes.most_common()),
        seconds=time.perf_counter() - began,
        notes=(*notes, *run.notes),
    )
    return arrays, report


def _plan(
    checkpoint: Checkpoint, config: Mamba2Config, table: tuple[StoredTensor, ...], head: bool
) -> tuple[list[tuple[StoredTensor, TensorInfo]], list[str]]:
    """Check the checkpoint against the config; return what to load, and notes. No array is made here."""
    tied = config.tie_word_embeddings
    found, missing, unexpected = match_names(table, checkpoint.tensors, tied)
    needed = {stored.name: stored for stored in table}
    problems = [f"tensor {name!r} is missing{_why_missing(name, config)}" for name in missing]
    for name in unexpected:
        info = checkpoint.tensors[name]
        shape = f"{info.dtype} {_shape(info.shape)}"
        problems.append(f"tensor {show(name)} ({shape}, in {info.file.name}) is unexpected")
    for name, stored_name in found.items():
        info, stored = checkpoint.tensors[stored_name], needed[name]
        label = f"tensor {show(stored_name)} in {info.file.name}"
        if info.shape != stored.shape:
            shapes = f"has shape {_shape(info.shape)}, the config wants {_shape(stored.shape)}"
            problems.append(f"{label} {shapes}{_why_vocabulary(name, info.shape, config)}")
        if info.dtype not in FLOAT_DTYPES:
            problems.append(f"{label} is {info.dtype}, want a float type ({', '.join(FLOAT_DTYPES)})")
    notes = []
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
    return [(needed[n], checkpoint.tensors[s]) for n, s in found.items() if needed[n].leaves], notes


def _why_missing(name: str, config: Mamba2Config) -> str:
    """Explain the commonest reasons for a missing tensor."""
    if name == HEAD:
        return " (tie_word_embeddings is false; a tied head, or a bare Mamba2Model, has none)"
    flag = "use_conv_bias" if ".conv1d." in name else "use_bias"
    return f" ({flag} is true in the config)" if name.endswith(".bias") and getattr(config, flag) else ""


def _why_vocabulary(name: str, shape: tuple[int, ...], config: Mamba2Config) -> str:
    """Explain an embedding or head whose rows are not the config's vocabulary."""
    if name not in (EMBEDDING, HEAD) or len(shape) != 2 or shape[1] != config.hidden_size:
        return ""
    rows = shape[0]
    relation = "fewer" if rows < config.vocab_size else "more"
    return (
        f": {rows} rows of vocabulary, {relation} than vocab_size={config.vocab_size}; vocab_size counts the"
        f" padding rows too, so set it to {rows} if that is how the checkpoint was saved"
    )


def _same_bytes(checkpoint: Checkpoint, first: TensorInfo, second: TensorInfo) -> bool:
    """Whether two tensors of one shape hold the same bytes."""
    if first.dtype != second.dtype:
        return False
    pairs = zip(checkpoint.blocks(first.name), checkpoint.blocks(second.name), strict=True)
    return all(np.array_equal(a.view(np.uint8), b.view(np.uint8)) for (_, a), (_, b) in pairs)


class _Loader:
    """Places tensors one by one and keeps count."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        param_dtype: np.dtype | None,
        place: Callable[[str], Placement],
        allow_non_finite: bool,
    ):
        self.checkpoint = checkpoint
        self.param_dtype = param_dtype
        self.place = place
        self.allow_non_finite = allow_non_finite
        self.arrays: dict[str, jax.Array] = {}
        self.problems: list[str] = []
        self.notes: list[str] = []
        self.stored_dtypes: Counter[str] = Counter()
        self.param_dtypes: Counter[str] = Counter()

    def load(self, stored: StoredTensor, info: TensorInfo) -> None:
        """Read one stored tensor into its leaves and put them on their devices."""
        source = FLOAT_DTYPES[info.dtype]
        wide = _widest(source)
        if wide != source:
            self._note_once("float64 weights become float32: JAX holds float64 only with jax_enable_x64")
        target, bad, overflown = wide, 0, 0
        for leaf in stored.leaves:
            target = self._target(leaf, wide)
            host, leaf_bad, leaf_overflown = _read_leaf(self.checkpoint, info.name, leaf, target)
            bad, overflown = bad + leaf_bad, overflown + leaf_overflown
            self.stored_dtypes[source.name] += host.size
            self.param_dtypes[target.name] += host.size
            if not self.problems:  # after a refusal the rest is only checked
                self.arrays[leaf.path] = _put(host, leaf.path, self.place(leaf.path))
        label = f"tensor {show(info.name)} in {info.file.name}"
        found = [f"{bad} NaN or infinite values" if bad else ""]
        found += [f"{overflown} values too large for {target.name}" if overflown else ""]
        if bad or overflown:
            message = f"{label} has {' and '.join(filter(None, found))}"
            if self.allow_non_finite:
                self.notes.append(message)
            else:
                self.problems.append(f"{message}; allow_non_finite=True takes them as they are")
                self.arrays.clear()

    def _target(self, leaf: Leaf, stored: np.dtype) -> np.dtype:
        if self.param_dtype is None:
            return stored
        if leaf.keep_precision:  # the smallest type that holds both: float16 with bfloat16 is float32
            return np.dtype(jnp.promote_types(stored, self.param_dtype))
        return self.param_dtype

    def _note_once(self, note: str) -> None:
        if note not in self.notes:
            self.notes.append(note)


def _read_leaf(
    checkpoint: Checkpoint, name: str, leaf: Leaf, target: np.dtype
) -> tuple[np.ndarray, int, int]:
    """Read one leaf in the model's layout and type; count its non-finite values and those cast too small."""
    host = _aligned_empty(leaf.shape, target)
    rows = leaf.as_rows(host)
    bad = overflown = 0
    for row, block in checkpoint.blocks(name, *leaf.rows):
        stored = block.reshape(len(block), -1)
        with np.errstate(over="ignore", invalid="ignore"):  # counted and reported below
            cast = stored.astype(target, copy=False)
        if count := _count_non_finite(cast):
            stored_count = _count_non_finite(stored)
            bad, overflown = bad + stored_count, overflown + count - stored_count
        row -= leaf.rows[0]
        for tile in range(0, len(cast), _TILE_ROWS):
            part = cast[tile : tile + _TILE_ROWS]
            rows[row + tile : row + tile + len(part)] = part
    return host, bad, overflown


def _count_non_finite(block: np.ndarray) -> int:
    """Count NaN and infinite values by their exponent bits, which is several times faster than isfinite."""
    size = block.dtype.itemsize
    exponent = _EXPONENT.get(size) or (0x7C00 if block.dtype == np.float16 else 0x7F80)
    bits = block.view(f"u{size}")
    return int(np.count_nonzero((bits & bits.dtype.type(exponent)) == exponent))


def _aligned_empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Allocate an array that JAX on CPU can take over without a copy."""
    nbytes = math.prod(shape) * dtype.itemsize
    buffer = np.empty(nbytes + _ALIGNMENT, np.uint8)
    offset = -buffer.ctypes.data % _ALIGNMENT
    return buffer[offset : offset + nbytes].view(dtype).reshape(shape)


def _put(host: np.ndarray, path: str, placement: Placement) -> jax.Array:
    """Place one array and wait for it, so that host copies do not pile up behind a slow transfer."""
    try:
        return jax.block_until_ready(jax.device_put(host, placement))
    except ValueError as error:  # a sharding that does not divide the shape
        raise ValueError(f"load_weights: cannot place {path} {_shape(host.shape)}: {error}") from error


def _check_param_dtype(param_dtype: DTypeLike) -> np.dtype:
    """Return the dtype if it is a float type of at least 16 bits that JAX can hold now."""
    dtype = np.dtype(jnp.dtype(param_dtype))
    if dtype not in FLOAT_DTYPES.values():
        raise ValueError(
            f"load_weights: param_dtype={dtype.name}; want bfloat16, float16, float32 or float64"
        )
    if _widest(dtype) != dtype:
        raise ValueError(
            f"load_weights: param_dtype={dtype.name} needs jax_enable_x64; want float32 or enable it"
        )
    return dtype


def _widest(dtype: np.dtype) -> np.dtype:
    """Return the type that JAX holds it in: float64 is float32 unless x64 is enabled."""
    return np.dtype(jax.dtypes.canonicalize_dtype(dtype))


def _shape(shape: tuple[int, ...]) -> str:
    return "(" + ", ".join(map(str, shape)) + ("," if len(shape) == 1 else "") + ")"
