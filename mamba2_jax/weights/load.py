"""Load checkpoint files into named JAX arrays: validate everything, then read tensor by tensor.

>>> from pathlib import Path
>>> import mamba2_jax.weights as weights
>>> from mamba2_jax.config import Mamba2Config
>>> folder = Path(weights.__file__).parents[1] / "assets" / "tiny-python"
>>> arrays, report = load_weights(folder, Mamba2Config.from_pretrained(folder))
>>> arrays["backbone.layers.0.mixer.in_proj.weight_zx"].shape
(256, 2, 512)
>>> report.parameters == Mamba2Config.from_pretrained(folder).num_parameters()
True
"""

import itertools
import math
import os
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Sharding

from mamba2_jax.config import Mamba2Config
from mamba2_jax.config.quantization import check_quantize, quantized_tensors, type_for
from mamba2_jax.typing import DTypeLike
from mamba2_jax.weight_types import TypeName, WeightType
from mamba2_jax.weights.files import CheckpointError
from mamba2_jax.weights.header import FLOAT_DTYPES, TensorInfo
from mamba2_jax.weights.plan import check_sizes, label, plan_load
from mamba2_jax.weights.reader import Checkpoint, open_checkpoint
from mamba2_jax.weights.report import LoadReport, progress_bar
from mamba2_jax.weights.shards import Placement, Shard, blocks_of, shards_of
from mamba2_jax.weights.table import Leaf, StoredTensor, checkpoint_table, stored_table
from mamba2_jax.weights.uncached import available_memory
from mamba2_jax.weights.values import Scratch, cast, copy_rows, count_non_finite, target_dtype

_BLOCK_BYTES = 2 << 20
_QUANTIZED_AT_A_TIME = 1 << 17  # numbers; a thread needs some 20 bytes for each
_THREADS = 2  # one reads while one converts; more compete for the CPU cache and take half as long again
_UNCACHED_THREADS = 4  # O_DIRECT has no read-ahead, so several reads must be in flight


def load_weights(
    folder: str | os.PathLike[str],
    config: Mamba2Config,
    *,
    param_dtype: DTypeLike | None = None,
    sharding: Placement | Callable[[str], Placement] = None,
    allow_non_finite: bool = False,
    show_progress: bool = False,
    head: bool = True,
    quantize: TypeName | None = None,
    extra: tuple[StoredTensor, ...] = (),
) -> tuple[dict[str, jax.Array], LoadReport]:
    """Load a checkpoint's weights as arrays by parameter path.

    Every name, shape and dtype is checked against the config before the first array is allocated. Beyond the
    result, host memory holds only the parameter being transferred and a few blocks of its file: also with
    `quantize`, as rows are quantized while they are read.

    Args:
        folder: holds the weights of a kind in `files.WEIGHT_FILES`: one file, or an index and its shards.
        config: the model config.
        param_dtype: float dtype of the arrays; None keeps each stored dtype. A_log, dt_bias and D are never
            narrowed below what is stored.
        sharding: a sharding or device for all arrays, or a function from parameter path to one.
        allow_non_finite: accept NaN and infinite weights (the report names them) instead of refusing them.
        show_progress: draw a progress bar on stderr.
        head: False leaves out `lm_head.weight`, for the bare Mamba2Model.
        quantize: a key of `WEIGHT_TYPES`; the arrays are then those of a config with this `quantization`.
            None: as in the files.
        extra: tensors to load beside those of the config, such as a classifier's.

    Returns:
        The arrays, which own their memory (the files may be deleted), and a `LoadReport`.

    Raises:
        CheckpointError: a broken file, or tensors that do not match the config; lists every problem.
        ValueError: `param_dtype` is no float dtype that JAX can hold, a sharding does not fit a shape, or the
            files are quantized in another type.
    """
    quantize = check_quantize("load_weights", quantize, config)
    began = time.perf_counter()
    wanted = None if param_dtype is None else _check_param_dtype(param_dtype)
    place = sharding if callable(sharding) else lambda path: sharding
    with open_checkpoint(folder) as checkpoint:
        check_sizes(checkpoint, config)
        table = (*stored_table(config, head), *extra)
        plan, notes = plan_load(checkpoint, config, table, head)
        # With a sharding the page cache helps: reads are partial rows, other processes may share the files.
        uncached = sharding is None and _too_large_for_the_cache(checkpoint) and checkpoint.bypass_cache()
        threads = _UNCACHED_THREADS if uncached else _THREADS
        run = _Loader(checkpoint, wanted, place, allow_non_finite, threads, quantize)
        total = sum(info.nbytes for _, info in plan)
        with run.pool, progress_bar("loading weights", total, show_progress) as advance:
            # in file order: the disk reads sequentially
            plan.sort(key=lambda pair: (pair[1].file, pair[1].start))
            for (stored, info), following in itertools.zip_longest(plan, plan[1:]):
                if following is not None:
                    checkpoint.will_read(following[1].name)
                run.load(stored, info)
                advance(info.nbytes)
    if run.problems:
        raise CheckpointError(checkpoint.folder, run.problems)
    order = [leaf.path for stored in table for one in run.becomes(stored) for leaf in one.leaves]
    arrays = {path: run.arrays[path] for path in order}
    report = LoadReport(
        source=checkpoint.folder,
        files=checkpoint.files,
        tensors=len(plan),
        parameters=sum(leaf.size for stored in checkpoint_table(config, head) for leaf in stored.leaves),
        bytes=sum(info.nbytes for _, info in plan),
        dtypes=dict(run.stored_dtypes.most_common()),
        stored_dtypes={stored.name: info.array_dtype.name for stored, info in plan},
        param_dtypes=dict(run.param_dtypes.most_common()),
        seconds=time.perf_counter() - began,
        notes=(*notes, *run.notes),
    )
    return arrays, report


class _Loader:
    """Reader of tensors into device arrays, one by one; collects problems, notes and counts per dtype."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        param_dtype: np.dtype | None,
        place: Callable[[str], Placement],
        allow_non_finite: bool,
        threads: int,
        quantization: TypeName | None,
    ):
        self.checkpoint = checkpoint
        self.quantization: TypeName | None = quantization
        self.param_dtype = param_dtype
        self.place = place
        self.allow_non_finite = allow_non_finite
        self.pool = ThreadPoolExecutor(threads, "load_weights")
        self.scratch = Scratch()
        self.arrays: dict[str, jax.Array] = {}
        self.problems: list[str] = []
        self.notes: list[str] = []
        self.stored_dtypes: Counter[str] = Counter()
        self.param_dtypes: Counter[str] = Counter()

    def becomes(self, stored: StoredTensor) -> tuple[StoredTensor, ...]:
        """Return the tensors whose leaves a tensor of the files fills: itself, or values and scales."""
        return quantized_tensors(stored, self.quantization)

    def load(self, stored: StoredTensor, info: TensorInfo) -> None:
        """Read one stored tensor and transfer its leaves to their devices."""
        kind = type_for(stored, self.quantization)
        if kind is not None:
            self._quantize(stored, info, kind)
            return
        source = info.array_dtype
        wide = _widest(source)
        if wide != source:
            self._note_once("float64 weights become float32: JAX holds float64 only with jax_enable_x64")
        target, bad, overflown = wide, 0, 0
        for leaf in stored.leaves:
            target = target_dtype([leaf], wide, self.param_dtype)
            placement = self.place(leaf.path)
            shards = shards_of(leaf, target, placement)
            leaf_bad, leaf_overflown = self._read_leaf(info, leaf, target, shards)
            bad, overflown = bad + leaf_bad, overflown + leaf_overflown
            self.stored_dtypes[source.name] += math.prod(leaf.shape)
            self.param_dtypes[target.name] += math.prod(leaf.shape)
            if not self.problems:  # after a problem the other tensors are only checked
                self.arrays[leaf.path] = _put(shards, leaf, placement)
        found = [f"{bad} NaN or infinite values" if bad else ""]
        found += [f"{overflown} values too large for {target.name}" if overflown else ""]
        if bad or overflown:
            message = f"{label(info)} has {' and '.join(filter(None, found))}"
            if self.allow_non_finite:
                self.notes.append(message)
            else:
                self._problem(f"{message}; allow_non_finite=True takes them as they are")

    def _quantize(self, stored: StoredTensor, info: TensorInfo, kind: WeightType) -> None:
        """Read one stored tensor, quantize its rows and transfer values and scales to their devices."""
        source, bad = info.array_dtype, 0
        dtypes = np.dtype(kind.dtype), np.dtype(np.float32)
        for leaf, *parts in zip(stored.leaves, *(one.leaves for one in self.becomes(stored)), strict=True):
            places = [self.place(part.path) for part in parts]
            shards = [shards_of(*target) for target in zip(parts, dtypes, places, strict=True)]
            bad += self._quantize_leaf(info, leaf, kind, shards)
            self.stored_dtypes[source.name] += leaf.size
            self.param_dtypes[kind.name] += leaf.size
            if not self.problems:
                for part, own, place in zip(parts, shards, places, strict=True):
                    self.arrays[part.path] = _put(own, part, place)
        if bad:
            self._problem(f"{label(info)} has {bad} NaN or infinite values, which {kind.name} cannot hold")

    def _quantize_leaf(
        self, info: TensorInfo, leaf: Leaf, kind: WeightType, targets: list[list[Shard]]
    ) -> int:
        """Fill the shards of values and of scales block by block; count the numbers that are not finite."""
        width = math.prod(info.shape[1:])

        def quantize_block(run: range) -> int:
            block = self.scratch.take("block", (len(run), width), info.array_dtype)
            self.checkpoint.read_rows(info.name, leaf.rows[0] + run.start, block)
            if bad := count_non_finite(block):
                return bad
            for array, shards in zip(kind.quantize(block), targets, strict=True):
                for shard in shards:
                    if (at := shard.place_of(run)) is not None:
                        columns = array[:, shard.columns.start : shard.columns.stop]
                        copy_rows(columns, shard.rows_view[at], self.scratch)
            return 0

        rows = max(1, _QUANTIZED_AT_A_TIME // width)
        return sum(self.pool.map(quantize_block, blocks_of(targets[0], rows)))

    def _problem(self, message: str) -> None:
        self.problems.append(message)
        self.arrays.clear()

    def _read_leaf(
        self, info: TensorInfo, leaf: Leaf, target: np.dtype, shards: list[Shard]
    ) -> tuple[int, int]:
        """Fill the shards of a leaf in the model's layout and dtype; count non-finite and overflown values.

        A thread pool reads, checks and transposes blocks of stored rows. Rows that no shard of this process
        holds are not read; of the other rows, only the columns from the first to the last that a shard holds.
        """
        stored = info.array_dtype
        first, last = (
            min(shard.columns.start for shard in shards),
            max(shard.columns.stop for shard in shards),
        )

        def read_block(run: range) -> tuple[int, int]:
            here = [(shard, shard.place_of(run)) for shard in shards]
            here = [(shard.rows_view[place], shard.columns) for shard, place in here if place is not None]
            out, columns = here[0]
            direct = len(here) == 1 and stored == target and out.flags.c_contiguous
            block = out if direct else self.scratch.take("block", (len(run), last - first), stored)
            self.checkpoint.read_rows(info.name, leaf.rows[0] + run.start, block, first)
            converted, overflown = cast(block, target)
            bad = count_non_finite(converted) - overflown
            if not direct:
                for out, columns in here:
                    copy_rows(converted[:, columns.start - first : columns.stop - first], out, self.scratch)
            return bad, overflown

        rows = max(1, _BLOCK_BYTES // max(1, (last - first) * stored.itemsize))
        blocks = blocks_of(shards, rows)
        counts = list((self.pool.map if len(blocks) > 1 else map)(read_block, blocks))
        return sum(bad for bad, _ in counts), sum(overflown for _, overflown in counts)

    def _note_once(self, note: str) -> None:
        if note not in self.notes:
            self.notes.append(note)


def _put(shards: list[Shard], leaf: Leaf, placement: Placement) -> jax.Array:
    """Transfer one leaf to its devices and block, lest host copies pile up behind a slow transfer."""
    if not isinstance(placement, Sharding):
        return jax.block_until_ready(jax.device_put(shards[0].array, placement))
    pieces = [jax.device_put(shard.array, device) for shard in shards for device in shard.devices]
    return jax.block_until_ready(jax.make_array_from_single_device_arrays(leaf.shape, placement, pieces))


def _too_large_for_the_cache(checkpoint: Checkpoint) -> bool:
    """Return whether the weights plus their files in the page cache would exceed the available memory."""
    available = available_memory()
    return available is not None and 2 * checkpoint.nbytes > available


def _check_param_dtype(param_dtype: DTypeLike) -> np.dtype:
    """Return `param_dtype` as a numpy dtype; refuse all but the float dtypes that JAX can now hold."""
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
    """Return the dtype in which JAX holds `dtype`: float32 for float64 unless x64 is enabled."""
    return np.dtype(jax.dtypes.canonicalize_dtype(dtype))
