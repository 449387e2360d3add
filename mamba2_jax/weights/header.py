"""Parse and check safetensors headers: 8 bytes of length, then JSON; tensor bytes follow without gaps."""

import io
import math
import os
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np

from mamba2_jax.weights.files import MAX_JSON_BYTES, CheckpointError, parse_json, read_exactly, show

FLOAT_DTYPES: dict[str, np.dtype] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
"""Stored dtypes that a weight may have, by safetensors name."""

DTYPES: dict[str, np.dtype] = FLOAT_DTYPES | {"I8": np.dtype(np.int8), "U8": np.dtype(np.uint8)}
"""Stored dtypes that are read, those of quantized values among them."""

_NAMES_BY_BITS = {
    4: "F4",
    6: "F6_E2M3 F6_E3M2",
    8: "BOOL U8 I8 F8_E5M2 F8_E4M3 F8_E8M0 F8_E4M3FNUZ F8_E5M2FNUZ",
    16: "I16 U16 F16 BF16",
    32: "I32 U32 F32",
    64: "I64 U64 F64 C64",
}
_BITS = {name: bits for bits, names in _NAMES_BY_BITS.items() for name in names.split()}
_MAX_RANK = 8


@dataclass(frozen=True)
class TensorInfo:
    """Location of a stored tensor: dtype, shape, and the byte range `start` to `stop` in `file`."""

    name: str
    file: Path
    dtype: str  # safetensors name, such as "BF16"
    shape: tuple[int, ...]
    start: int  # from the beginning of the file
    stop: int
    pieces: tuple["TensorInfo", ...] = ()
    """For rows that are spread over several tensors of the file: these, in order."""

    @property
    def array_dtype(self) -> np.dtype:
        """Dtype of an array of it; raises CheckpointError unless that is in `DTYPES`."""
        if self.dtype not in DTYPES:
            raise CheckpointError(self.file, [f"tensor {show(self.name)} is {self.dtype}; want a float type"])
        return DTYPES[self.dtype]

    @property
    def nbytes(self) -> int:
        """Size of the tensor in the file, in bytes."""
        return sum(piece.nbytes for piece in self.pieces) if self.pieces else self.stop - self.start

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


def read_header(file: io.FileIO, path: Path) -> dict[str, TensorInfo]:
    """Parse and check the header of one safetensors file; return its tensors by name."""
    size = os.fstat(file.fileno()).st_size
    if size < 8:
        raise CheckpointError(path, [f"{size} bytes: empty or truncated, not a safetensors file"])
    prefix = bytearray(8)
    read_exactly(file, path, 0, prefix, "the header's length")
    length = int.from_bytes(prefix, "little")
    if length > size - 8:
        message = f"declares a header of {length} bytes but has {size - 8} left: truncated or not safetensors"
        raise CheckpointError(path, [message])
    if length > MAX_JSON_BYTES:
        raise CheckpointError(
            path, [f"declares a header of {length} bytes; at most {MAX_JSON_BYTES} are read"]
        )
    text = bytearray(length)
    read_exactly(file, path, 8, text, "the header")
    header = parse_json(text, path, "the header")
    metadata = header.pop("__metadata__", None)
    problems = []
    if metadata is not None and not _is_text_map(metadata):
        problems.append("__metadata__ is not a map of strings")
    tensors = {}
    for name, entry in header.items():
        try:
            tensors[name] = _parse_entry(name, entry, path, 8 + length)
        except ValueError as error:
            problems.append(f"tensor {show(name)}: {error}")
    problems = problems or _check_layout(tensors, 8 + length, size)
    if problems:
        raise CheckpointError(path, problems)
    return tensors


def _parse_entry(name: str, entry: object, path: Path, data_start: int) -> TensorInfo:
    """Check the header entry of one tensor: known dtype, valid shape, byte count that matches both."""
    if not isinstance(entry, dict):
        raise ValueError("its entry is not a JSON object")
    dtype = entry.get("dtype")
    if not isinstance(dtype, str) or dtype not in _BITS:
        raise ValueError(f"unknown dtype {show(str(dtype))}")
    shape = _sizes(entry, "shape")
    offsets = _sizes(entry, "data_offsets")
    if len(shape) > _MAX_RANK:
        raise ValueError(f"shape has {len(shape)} axes, at most {_MAX_RANK} are read")
    if len(offsets) != 2 or offsets[0] > offsets[1]:
        raise ValueError(f"data_offsets is not a begin and an end: {show(str(offsets))}")
    bits = math.prod(shape) * _BITS[dtype]
    if bits != 8 * (offsets[1] - offsets[0]):
        wanted = f"{dtype} {shape} needs {-(-bits // 8)} bytes"
        raise ValueError(f"{wanted}, its data_offsets {offsets} hold {offsets[1] - offsets[0]}")
    return TensorInfo(name, path, dtype, tuple(shape), data_start + offsets[0], data_start + offsets[1])


def _check_layout(tensors: dict[str, TensorInfo], data_start: int, size: int) -> list[str]:
    """List overlaps and gaps between the tensors, which must fill bytes `data_start` to `size`."""
    problems = []
    end, before = data_start, "the header"
    for info in sorted(tensors.values(), key=lambda info: (info.start, info.stop)):
        name = show(info.name)
        if info.stop > size:
            problems.append(
                f"tensor {name} ends at byte {info.stop}, outside the file of {size} bytes:"
                " truncated, or wrong data_offsets"
            )
        elif info.start < end:
            problems.append(f"tensor {name} overlaps {before}: it begins at byte {info.start}, before {end}")
        elif info.start > end:
            problems.append(f"{info.start - end} bytes before tensor {name} belong to no tensor")
        end, before = max(end, info.stop), name
    if not problems and end < size:
        problems.append(f"{size - end} bytes at the end of the file belong to no tensor")
    return problems


def _sizes(entry: dict, key: str) -> list[int]:
    """Return the list `entry[key]` after checking that it holds non-negative integers of at most 63 bits."""
    value = entry.get(key)
    if not isinstance(value, list) or not all(type(item) is int and 0 <= item < 1 << 63 for item in value):
        raise ValueError(f"{key} is not a list of sizes: {show(str(value))}")
    return value


def _is_text_map(value: object) -> bool:
    return isinstance(value, dict) and all(isinstance(item, str) for item in value.values())
