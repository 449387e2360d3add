"""Read checkpoints lazily and safely: one file, or an index and its shards, in safetensors or PyTorch format.

Opening reads and checks headers only. Tensors are then read in blocks of stored rows, so that only one block
is in memory, whatever a header declares. Files are read, not memory-mapped: a file truncated meanwhile raises
an error, where touching a page of an mmap would kill the process (SIGBUS).

Beyond what the `safetensors` library refuses, this reader refuses duplicate names, anything but regular
files, names and links that lead out of the folder, and an index that disagrees with its shards.

>>> from pathlib import Path
>>> import mamba2_jax.weights as weights
>>> folder = Path(weights.__file__).parents[1] / "assets" / "tiny-python"
>>> with open_checkpoint(folder) as checkpoint:
...     info = checkpoint.tensors["backbone.layers.0.mixer.A_log"]
>>> info.dtype, info.shape, info.nbytes
('F32', (8,), 32)
"""

import io
import math
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from mamba2_jax.files import WEIGHT_FILES, WeightFiles
from mamba2_jax.weights.files import (
    CheckpointError,
    open_regular,
    read_exactly,
    read_json_inside,
    resolve_inside,
    show,
    will_read,
)
from mamba2_jax.weights.header import TensorInfo, read_header
from mamba2_jax.weights.torch_file import read_torch_header
from mamba2_jax.weights.uncached import bypass_cache, read_uncached

_BLOCK_BYTES = 4 << 20
# Names that denote a file of this folder on every operating system: no separator, no drive, no leading dot.
_PLAIN_SHARD_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._+-]{0,250}")


class Checkpoint:
    """An open checkpoint: headers in `tensors`, by stored name, and data block by block.

    Made by `open_checkpoint`; a context manager that closes the files.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.tensors: dict[str, TensorInfo] = {}
        self._joined: dict[str, TensorInfo] = {}
        self._files: dict[Path, io.FileIO] = {}
        self._uncached: set[Path] = set()

    @property
    def files(self) -> tuple[Path, ...]:
        """Paths of the open files."""
        return tuple(self._files)

    @property
    def nbytes(self) -> int:
        """Total size of all tensors, in bytes."""
        return sum(info.nbytes for info in self.tensors.values())

    def join(self, name: str, pieces: Sequence[str], shape: tuple[int, int]) -> TensorInfo:
        """Make the rows of one or several tensors readable as one matrix, under a name of its own.

        Args:
            name: the name, for all methods of this class.
            pieces: names of stored tensors with equal numbers of rows, in order.
            shape: `(rows of all, numbers per row)`; the tensors may have their rows in several axes.
        """
        infos = tuple(self.tensors[piece] for piece in pieces)
        first = infos[0]
        joined = TensorInfo(name, first.file, first.dtype, shape, first.start, first.stop, infos)
        self._joined[name] = joined
        return joined

    def _info(self, name: str) -> TensorInfo:
        return self._joined[name] if name in self._joined else self.tensors[name]

    def blocks(
        self, name: str, first_row: int = 0, last_row: int | None = None, block_bytes: int = _BLOCK_BYTES
    ) -> Iterator[tuple[int, np.ndarray]]:
        """Read the stored rows `first_row` to `last_row` (exclusive) of a tensor in blocks.

        Args:
            name: stored name of a tensor of a float type.
            first_row: first index along the tensor's first axis.
            last_row: one past the last index; None: the end.
            block_bytes: maximum size of a block, which has at least one row.

        Yields:
            `(row, block)`: `block` is `(rows, ...)` in the stored dtype and begins at `row`. The buffer is
            reused: copy `block` to keep it beyond the next step.

        Raises:
            CheckpointError: not a float dtype, or the file ends before the tensor does.
        """
        info = self._info(name)
        dtype = info.array_dtype
        rows = info.shape[0] if info.shape else 1
        last_row = rows if last_row is None else last_row
        if not 0 <= first_row <= last_row <= rows:
            raise ValueError(f"blocks: rows {first_row} to {last_row} of {show(name)}, which has {rows}")
        row_bytes = math.prod(info.shape[1:]) * dtype.itemsize
        if row_bytes == 0:
            return
        step = max(1, min(block_bytes // row_bytes, last_row - first_row))
        buffer = np.empty((step, *info.shape[1:]), dtype)
        for row in range(first_row, last_row, step):
            block = buffer[: min(step, last_row - row)]
            self.read_rows(name, row, block)
            yield row, block

    def read_rows(self, name: str, first_row: int, out: np.ndarray, first_column: int = 0) -> None:
        """Fill a contiguous array `(rows, ...)` of the stored dtype with stored rows from `first_row`.

        Reads only the columns that fit a row of `out`, from `first_column`. Thread-safe.

        Raises:
            CheckpointError: not a float dtype, or the file ends before the rows do.
        """
        info = self._info(name)
        row_bytes = math.prod(info.shape[1:]) * info.array_dtype.itemsize
        if not info.pieces:
            self._read_rows(info, row_bytes, first_row, out, first_column)
            return
        height, row = info.shape[0] // len(info.pieces), 0
        while row < len(out):
            piece, inside = divmod(first_row + row, height)
            rows = out[row : row + height - inside]
            self._read_rows(info.pieces[piece], row_bytes, inside, rows, first_column)
            row += len(rows)

    def _read_rows(
        self, info: TensorInfo, row_bytes: int, first_row: int, out: np.ndarray, first_column: int
    ) -> None:
        itemsize, name = info.array_dtype.itemsize, info.name
        start, wanted = info.start + first_row * row_bytes, out.nbytes // max(1, len(out))
        if first_column * itemsize + wanted > row_bytes or start + len(out) * row_bytes > info.stop:
            raise ValueError(f"read_rows: {len(out)} rows from {first_row} on go beyond {show(name)}")
        file, what = self._files[info.file], f"tensor {show(name)}"
        read = read_uncached if info.file in self._uncached else read_exactly
        if wanted == row_bytes:
            read(file, info.file, start, out, what)
            return
        for row in out:
            read(file, info.file, start + first_column * itemsize, row, what)
            start += row_bytes

    def will_read(self, name: str) -> None:
        """Ask the kernel to prefetch a tensor into the page cache; does nothing after `bypass_cache`."""
        info = self._info(name)
        for piece in info.pieces or (info,):
            if piece.file not in self._uncached:
                will_read(self._files[piece.file], piece.start, piece.nbytes)

    def bypass_cache(self) -> bool:
        """Bypass the page cache for all later reads of files that allow it; return whether all do.

        For weights that would not fit into memory twice: cached, they would evict other pages, and each page
        would be cleared and copied once more.
        """
        self._uncached = {path for path, file in self._files.items() if bypass_cache(file)}
        return len(self._uncached) == len(self._files)

    def read(self, name: str) -> np.ndarray:
        """Read a whole tensor into a new array of the stored dtype."""
        info = self._info(name)
        whole = [block for _, block in self.blocks(name, block_bytes=max(1, info.nbytes))]
        return whole[0].reshape(info.shape) if whole else np.empty(info.shape, info.array_dtype)

    def close(self) -> None:
        """Close the files; `tensors` stays valid."""
        for file in self._files.values():
            file.close()

    def __enter__(self) -> "Checkpoint":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _add_file(self, path: Path, target: Path) -> dict[str, TensorInfo]:
        """Open the file `target`, register it under `path`, and return its checked header."""
        file = open_regular(path, target)
        try:
            header = (
                read_torch_header(file, path, target) if path.suffix == ".bin" else read_header(file, path)
            )
        except BaseException:
            file.close()
            raise
        self._files[path] = file
        return header


def open_checkpoint(folder: str | os.PathLike[str]) -> Checkpoint:
    """Open the checkpoint in a folder and check every header, without reading tensors.

    Args:
        folder: holds weight files of a kind in `files.WEIGHT_FILES`. The first kind found is read, and its
            index rather than its single file.

    Returns:
        A `Checkpoint`; use it in a `with` statement.

    Raises:
        CheckpointError: no weights, or a broken file or index; lists every problem.
        ImportError: a `.bin` file needs PyTorch 2.10 or newer, which is missing.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise CheckpointError(folder, ["not a folder; give the folder that holds the checkpoint's files"])
    form = find_form(folder)
    if form is None:
        names = ", ".join(form.single for form in WEIGHT_FILES)
        raise CheckpointError(folder, [f"holds no weights: neither {names}, nor the index of one"])
    checkpoint = Checkpoint(folder)
    try:
        if os.path.lexists(folder / form.index):
            _open_sharded(checkpoint, form)
        else:
            target = resolve_inside(folder, form.single)
            checkpoint.tensors = checkpoint._add_file(folder / form.single, target)
    except BaseException:
        checkpoint.close()
        raise
    return checkpoint


def open_file(folder: str | os.PathLike[str], name: str) -> Checkpoint:
    """Open one safetensors file of a folder, such as an adapter, with the checks of `open_checkpoint`."""
    folder = Path(folder)
    checkpoint = Checkpoint(folder)
    checkpoint.tensors = checkpoint._add_file(folder / name, resolve_inside(folder, name))
    return checkpoint


def find_form(folder: Path) -> WeightFiles | None:
    """Return the kind of the weight files in a folder, or None if it has no weights."""
    return next(
        (f for f in WEIGHT_FILES for name in (f.index, f.single) if os.path.lexists(folder / name)), None
    )


def _open_sharded(checkpoint: Checkpoint, form: WeightFiles) -> None:
    """Read the index, then the header of every shard it names, and check that they agree."""
    folder = checkpoint.folder
    weight_map = _read_index(folder, form.index)
    problems = [
        f"{form.index} places tensors in {show(shard)}: only a plain name, such as"
        f" 'model-00001-of-00003{form.suffix}', of a file in this folder is read"
        for shard in sorted(set(weight_map.values()))
        if not (_PLAIN_SHARD_NAME.fullmatch(shard) and shard.endswith(form.suffix) and len(shard) < 256)
    ]
    if problems:
        raise CheckpointError(folder, problems)
    found: dict[str, list[str]] = {}  # tensor name -> the shards whose header lists it
    for shard in sorted(set(weight_map.values())):
        try:
            header = checkpoint._add_file(folder / shard, resolve_inside(folder, shard))
        except CheckpointError as error:
            problems += [f"{shard}: {problem}" for problem in error.problems]
            continue
        for name, info in header.items():
            found.setdefault(name, []).append(shard)
            if weight_map.get(name) == shard:
                checkpoint.tensors[name] = info
    opened = {path.name for path in checkpoint.files}
    for name, shard in weight_map.items():
        if shard in opened and shard not in found.get(name, ()):
            problems.append(f"tensor {show(name)}: {form.index} places it in {shard}, whose header lacks it")
    for name, shards in found.items():
        if len(shards) > 1:
            problems.append(f"tensor {show(name)} is in several shards: {', '.join(shards)}")
        elif name not in weight_map:
            problems.append(f"tensor {show(name)} is in {shards[0]} but not in {form.index}")
        elif weight_map[name] != shards[0]:
            problems.append(f"tensor {show(name)} is in {shards[0]}, not in {weight_map[name]} as indexed")
    if problems:
        raise CheckpointError(folder, problems)


def _read_index(folder: Path, name: str) -> dict[str, str]:
    """Read the index file; return its type-checked map from tensor name to shard name."""
    path = folder / name
    index = read_json_inside(folder, name, "the index")
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(path, ["has no 'weight_map' from tensor names to file names"])
    wrong = [name for name, shard in weight_map.items() if not isinstance(shard, str)]
    if wrong:
        raise CheckpointError(path, [f"tensor {show(name)}: its file name is not a string" for name in wrong])
    return weight_map
