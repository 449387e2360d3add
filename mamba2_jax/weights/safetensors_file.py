"""Writing safetensors files as the tensors come, a block of rows at a time."""

import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mamba2_jax.files import WEIGHT_FILES
from mamba2_jax.weights.header import FLOAT_DTYPES
from mamba2_jax.weights.values import cast

FILES = WEIGHT_FILES[0]  # transformers' names
_NAMES = {dtype: name for name, dtype in FLOAT_DTYPES.items()}
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


@dataclass(frozen=True)
class Outgoing:
    """A tensor on its way into a file.

    Args:
        name: the name it gets.
        shape: its shape in the file.
        dtype: its type in the file; the blocks are cast to it.
        blocks: called once, when its turn comes; yields its rows in order. A block may be overwritten after.
    """

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    blocks: Callable[[], Iterable[np.ndarray]]

    @property
    def nbytes(self) -> int:
        """Bytes it takes in the file."""
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize

    def stored_blocks(self) -> Iterator[np.ndarray]:
        """Yield contiguous blocks in the file's type.

        Raises:
            ValueError: a value is too large for that type.
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
    """Write `model.safetensors`, or shards and their index when the tensors take more than one file.

    Args:
        folder: where.
        tensors: in the order they are written.
        max_shard_size: bytes of tensors per file; a larger tensor gets a file for itself.
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


def file_order(tensors: Sequence[Outgoing], max_shard_size: int) -> list[Outgoing]:
    """List the tensors in the order in which `write_safetensors` asks for their blocks."""
    return [tensor for shard in _split(tensors, max_shard_size) for tensor in _widest_first(shard)]


def write_json(path: Path, content: dict) -> None:
    """Write a JSON file as transformers does, down to the disk."""
    with open(path, "w", encoding="utf-8") as file:
        file.write(json.dumps(content, indent=2) + "\n")
        file.flush()
        os.fsync(file.fileno())


def parse_size(size: int | str) -> int:
    """Read a number of bytes, or text such as "5GB" (decimal units, as on the hub).

    >>> parse_size("1.5GB")
    1500000000

    Raises:
        ValueError: neither.
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
    """Fill files in order, each up to the limit."""
    shards, size = [[]], 0
    for tensor in tensors:
        if shards[-1] and size + tensor.nbytes > max_shard_size:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += tensor.nbytes
    return shards


def _write_file(path: Path, tensors: Sequence[Outgoing], advance: Callable[[int], object]) -> None:
    """Write the header, then the tensors' bytes without gaps; the widest type first keeps all aligned."""
    tensors = _widest_first(tensors)
    header: dict[str, dict] = {"__metadata__": {"format": "pt"}}  # transformers wants to see it
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
    """Append a tensor's bytes to an unbuffered file."""
    written = 0
    for block in tensor.stored_blocks():
        left = block.view(np.uint8).reshape(-1).data
        written += len(left)
        advance(len(left))
        while left:
            left = left[file.write(left) :]
    if written != tensor.nbytes:
        raise ValueError(f"{tensor.name}: {written} bytes of {tensor.nbytes}; its shape wants all of them")
