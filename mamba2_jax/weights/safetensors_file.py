"""Write safetensors files: models by streaming each tensor in blocks of rows, small files as a whole."""

import json
import os
import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from mamba2_jax.files import WEIGHT_FILES
from mamba2_jax.weights.header import FLOAT_DTYPES
from mamba2_jax.weights.values import cast

FILES = WEIGHT_FILES[0]  # transformers' names
_NAMES = {dtype: name for name, dtype in FLOAT_DTYPES.items()}
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


@dataclass(frozen=True)
class Outgoing:
    """A tensor to write: stored name, shape and dtype, and a function that yields its data.

    Args:
        name: stored name.
        shape: stored shape.
        dtype: stored dtype, to which the blocks are cast.
        blocks: yields the stored rows in order, in blocks whose buffer may be reused for the next one; called
            once, when the tensor is written.
    """

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    blocks: Callable[[], Iterable[np.ndarray]]

    @property
    def nbytes(self) -> int:
        """Size of the tensor in the file, in bytes."""
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize

    def stored_blocks(self) -> Iterator[np.ndarray]:
        """Yield contiguous blocks, cast to the stored dtype.

        Raises:
            ValueError: a finite value overflows the stored dtype.
        """
        for block in self.blocks():
            stored, overflown = cast(block, self.dtype)
            if overflown:
                raise ValueError(
                    f"{self.name}: {overflown} values are too large for {self.dtype.name}; "
                    "save with dtype='bfloat16' or 'float32'"
                )
            yield np.ascontiguousarray(stored)


def write_safetensors(
    folder: Path,
    tensors: Sequence[Outgoing],
    max_shard_size: int,
    advance: Callable[[int], object] = lambda count: None,
) -> None:
    """Write `model.safetensors`, or shards and an index file if the tensors need several files.

    Args:
        folder: an existing folder.
        tensors: assigned to shards in this order; inside a file the widest dtype is first.
        max_shard_size: bytes of tensors per shard; a larger tensor gets a shard for itself.
        advance: called with the number of bytes after each block.
    """
    shards = _split(tensors, max_shard_size)
    if len(shards) == 1:
        _write_file(folder / FILES.single, shards[0], advance)
        return
    weight_map = {}
    for number, shard in enumerate(shards, 1):
        name = FILES.shard(number, len(shards))
        _write_file(folder / name, shard, advance)
        weight_map |= {tensor.name: name for tensor in shard}
    total = sum(tensor.nbytes for tensor in tensors)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    write_json(folder / FILES.index, index)


def write_arrays(path: Path, arrays: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> None:
    """Write arrays of any dtype as one safetensors file, with the permissions of an ordinary new file."""
    save_file(dict(arrays), path, metadata=dict(metadata))  # readable by the owner only
    # a new file shows the umask, which cannot be read without setting it for all threads
    probe = path.with_name(f".{path.name}.mode-{secrets.token_hex(4)}")
    probe.touch()
    try:
        os.chmod(path, probe.stat().st_mode)
    finally:
        probe.unlink()


def file_order(tensors: Sequence[Outgoing], max_shard_size: int) -> list[Outgoing]:
    """Return the tensors in the order in which `write_safetensors` writes them."""
    return [tensor for shard in _split(tensors, max_shard_size) for tensor in _widest_first(shard)]


def write_json(path: Path, content: dict) -> None:
    """Write a JSON file with the indentation of transformers, and fsync it."""
    with open(path, "w", encoding="utf-8") as file:
        file.write(json.dumps(content, indent=2) + "\n")
        file.flush()
        os.fsync(file.fileno())


def parse_size(size: int | str) -> int:
    """Parse a size in bytes: an integer, or text such as "5GB" (decimal units, as on the hub).

    >>> parse_size("1.5GB")
    1500000000

    Raises:
        ValueError: `size` is neither.
    """
    text = str(size).strip().upper()
    unit = text.lstrip("0123456789.")
    try:
        count = int(float(text.removesuffix(unit)) * _UNITS[unit.strip()])
    except (KeyError, ValueError):
        count = 0
    if count < 1 or isinstance(size, bool):
        raise ValueError(f"max_shard_size={size!r}: want a number of bytes, or text such as '5GB' or '500MB'")
    return count


def _split(tensors: Sequence[Outgoing], max_shard_size: int) -> list[list[Outgoing]]:
    """Group the tensors, in order, into shards of at most `max_shard_size` bytes."""
    shards, size = [[]], 0
    for tensor in tensors:
        if shards[-1] and size + tensor.nbytes > max_shard_size:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += tensor.nbytes
    return shards


def _write_file(path: Path, tensors: Sequence[Outgoing], advance: Callable[[int], object]) -> None:
    """Write one file: header, then tensors without gaps, the widest dtype first so that all are aligned."""
    tensors = _widest_first(tensors)
    header: dict[str, dict] = {"__metadata__": {"format": "pt"}}  # transformers requires it
    end = 0
    for tensor in tensors:
        start, end = end, end + tensor.nbytes
        entry = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
        header[tensor.name] = entry
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb", buffering=0) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors:
            write_blocks(file, tensor, advance)
        os.fsync(file.fileno())


def _widest_first(tensors: Sequence[Outgoing]) -> list[Outgoing]:
    return sorted(tensors, key=lambda tensor: -tensor.dtype.itemsize)


def write_blocks(file, tensor: Outgoing, advance: Callable[[int], object]) -> None:
    """Write the bytes of a tensor at the current position of an unbuffered file."""
    written = 0
    for block in tensor.stored_blocks():
        left = block.view(np.uint8).reshape(-1).data
        written += len(left)
        advance(len(left))
        while left:
            left = left[file.write(left) :]
    if written != tensor.nbytes:
        raise ValueError(f"{tensor.name}: {written} bytes of {tensor.nbytes}; its shape wants all of them")
