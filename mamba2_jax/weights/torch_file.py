"""Read and write PyTorch files (`torch.save`): a zip whose `data.pkl` describes tensors over raw records.

The only module that imports torch. A pickle can call any function, so a file passes three checks before any
data is read: the zip directory (nothing compressed, nothing outside the file), the opcodes of the pickle
(globals of plain tensors only), and `torch.load(weights_only=True)`. That load builds tensors without data
(on the device "meta"), so that nothing is allocated at the size that a file declares. The data is then read
from its byte range in the file, as for safetensors.
"""

import io
import os
import pickletools
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from mamba2_jax.files import first_line
from mamba2_jax.weights.files import MAX_JSON_BYTES, CheckpointError, read_exactly, show
from mamba2_jax.weights.header import TensorInfo
from mamba2_jax.weights.safetensors_file import Outgoing, write_blocks

MINIMUM_TORCH = "2.10"
INSTALL_TORCH = (
    "pip install 'mamba2-jax-flax[torch]', or its CPU build alone: pip install 'torch==2.13.0+cpu' "
    "(where your package index lacks it: uv pip install 'torch>=2.10' --torch-backend cpu)"
)
_PLAIN_GLOBALS = {
    "collections OrderedDict",
    "torch._utils _rebuild_tensor_v2",
    "torch._utils _rebuild_parameter",
}
_STORAGES = (
    *("BFloat16", "Half", "Float", "Double", "ComplexFloat"),
    *("Char", "Byte", "Short", "Int", "Long", "Bool"),
)
_PLAIN_GLOBALS |= {f"torch {name}Storage" for name in _STORAGES}
# Opcodes that make objects without a GLOBAL; a state dict has none of them.
_OTHER_WAYS = {"STACK_GLOBAL", "INST", "OBJ", "NEWOBJ", "NEWOBJ_EX", "EXT1", "EXT2", "EXT4", "NEXT_BUFFER"}
_DTYPES = {
    **{"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16", "complex64": "C64"},
    **{"int64": "I64", "int32": "I32", "int16": "I16", "int8": "I8", "uint8": "U8", "bool": "BOOL"},
}


def import_torch(purpose: str) -> ModuleType:
    """Import torch; an ImportError tells that `purpose` needs it and how to install it.

    Raises:
        ImportError: torch is missing or older than `MINIMUM_TORCH`.
    """
    try:
        import torch
        from torch.torch_version import TorchVersion
    except ImportError as error:
        raise ImportError(f"{purpose} needs PyTorch: {INSTALL_TORCH}") from error
    version = torch.__version__
    if TorchVersion(version) < MINIMUM_TORCH:  # older ones: weights_only blocks less
        raise ImportError(f"{purpose} needs PyTorch {MINIMUM_TORCH} or newer, not {version}: {INSTALL_TORCH}")
    return torch


def read_torch_header(file: io.FileIO, path: Path, target: Path) -> dict[str, TensorInfo]:
    """Check a `.bin` file and describe its tensors, without reading their data.

    Args:
        file: the open file.
        path: its name in messages.
        target: its path with links resolved, for `torch.load`.

    Returns:
        The tensors by name; two may share the same bytes (a tied head).

    Raises:
        CheckpointError: not a state dict of plain tensors; lists every problem.
        ImportError: torch is missing or too old.
    """
    records = _read_records(file, path)
    _check_byte_order(file, path, records)
    _check_pickle(file, path, records)
    torch = import_torch(f"{path}: a PyTorch file")
    tensors = _load_descriptions(torch, path, target)
    starts = dict(records.values())
    described, problems = {}, []
    for name, tensor in tensors.items():
        try:
            described[name] = _describe(torch, name, tensor, path, starts)
        except ValueError as error:
            problems.append(f"tensor {show(str(name))}: {error}")
    if problems:
        raise CheckpointError(path, problems)
    return described


class _Bounded:
    """File wrapper for `zipfile` that refuses reads of more than `MAX_JSON_BYTES`."""

    def __init__(self, file: io.FileIO):
        self.seek, self.tell, self._read = file.seek, file.tell, file.read

    def read(self, count: int = -1) -> bytes:
        """Read up to `count` bytes, or all if negative; raise BadZipFile above the limit."""
        here = self.tell()
        left = self.seek(0, os.SEEK_END) - here
        self.seek(here)
        count = left if count < 0 else min(count, left)
        if count > MAX_JSON_BYTES:
            raise zipfile.BadZipFile(f"a directory of more than {MAX_JSON_BYTES} bytes")
        return self._read(count) or b""


def _read_records(file: io.FileIO, path: Path) -> dict[str, tuple[int, int]]:
    """Read and check the zip directory; return `(start, size)` in bytes of each record by name.

    The archive's name is removed from the front of each record name: `data.pkl`, `data/0`.
    """
    size = os.fstat(file.fileno()).st_size
    try:
        with zipfile.ZipFile(_Bounded(file)) as archive:  # pyright: ignore[reportArgumentType]
            entries = archive.infolist()
    except (zipfile.BadZipFile, NotImplementedError, ValueError, OSError, OverflowError) as error:
        raise CheckpointError(
            path,
            [
                f"{size} bytes, not a zip as torch.save has written since PyTorch 1.6 ({error}): truncated, "
                "garbage, or older than that; load an old one in PyTorch and save it again"
            ],
        ) from None
    records: dict[str, tuple[int, int]] = {}
    problems = []
    for entry in entries:
        name = entry.filename.partition("/")[2]
        if name in records:
            problems.append(f"record {show(name)} appears twice")
        elif entry.compress_type != zipfile.ZIP_STORED or entry.file_size != entry.compress_size:
            problems.append(f"record {show(name)} is compressed, which torch.save never does")
        else:
            start = _record_start(file, path, entry)
            records[name] = (start, entry.file_size)
            if start + entry.file_size > size:
                problems.append(f"record {show(name)} ends outside the file of {size} bytes: truncated")
    if not problems and "data.pkl" not in records:
        problems.append("has no data.pkl: not a file of torch.save")
    if "constants.pkl" in records:
        problems.append("is a TorchScript program; save the model's state_dict() instead")
    if problems:
        raise CheckpointError(path, problems)
    return records


def _record_start(file: io.FileIO, path: Path, entry: zipfile.ZipInfo) -> int:
    """Return the byte offset of a record's data, behind its local header, name and padding."""
    header = bytearray(30)
    read_exactly(file, path, entry.header_offset, header, f"record {show(entry.filename)}")
    if header[:4] != b"PK\x03\x04":
        raise CheckpointError(path, [f"record {show(entry.filename)} does not begin where the zip says"])
    return (
        entry.header_offset
        + 30
        + int.from_bytes(header[26:28], "little")
        + int.from_bytes(header[28:30], "little")
    )


def _check_pickle(file: io.FileIO, path: Path, records: dict[str, tuple[int, int]]) -> None:
    """Scan the opcodes of the pickle without executing it; refuse all but those of plain tensors."""
    start, size = records["data.pkl"]
    if size > MAX_JSON_BYTES:
        raise CheckpointError(path, [f"data.pkl has {size} bytes; at most {MAX_JSON_BYTES} are read"])
    content = bytearray(size)
    read_exactly(file, path, start, content, "data.pkl")
    found = set()
    try:
        for opcode, argument, _ in pickletools.genops(bytes(content)):
            if opcode.name == "GLOBAL" and argument not in _PLAIN_GLOBALS:
                found.add(str(argument).replace(" ", "."))
            elif opcode.name in _OTHER_WAYS:
                found.add(f"an object made by {opcode.name}")
    except Exception as error:  # pickletools lets any parsing error through: ValueError, struct's, decoding
        raise CheckpointError(path, [f"data.pkl is not a pickle: {show(str(error))}"]) from None
    if found:
        names = ", ".join(show(name) for name in sorted(found)[:5])
        raise CheckpointError(
            path,
            [
                f"its pickle holds more than plain tensors ({names}) and was not executed; if you trust "
                "where it comes from, load it in PyTorch and save the model's state_dict()"
            ],
        )


def _check_byte_order(file: io.FileIO, path: Path, records: dict[str, tuple[int, int]]) -> None:
    start, size = records.get("byteorder", (0, 0))
    order = bytearray(min(size, 16))
    read_exactly(file, path, start, order, "byteorder")
    if order not in (b"", b"little"):
        raise CheckpointError(path, [f"its byte order is {show(repr(bytes(order)))}; only little is read"])


def _load_descriptions(torch: ModuleType, path: Path, target: Path) -> dict[str, Any]:
    """Load the state dict with torch, its tensors without data."""
    try:
        loaded = torch.load(str(target), weights_only=True, mmap=True, map_location="meta")
        found = [t for t in loaded.values() if type(t) is torch.Tensor] if isinstance(loaded, dict) else []
        if any(getattr(t.untyped_storage(), "_checkpoint_offset", None) is None for t in found):
            # PyTorch 2.10 records byte offsets only in this mode, which takes seconds to start
            from torch._subclasses.fake_tensor import FakeTensorMode

            with FakeTensorMode():
                loaded = torch.load(str(target), weights_only=True, mmap=True)
    except Exception as error:  # a broken pickle can raise anything in torch
        reason = first_line(error)
        raise CheckpointError(
            path, [f"torch.load(weights_only=True) refuses it ({type(error).__name__}: {show(reason)})"]
        ) from None
    if not isinstance(loaded, dict):
        message = f"holds a {type(loaded).__name__}, want a dict of tensors: save model.state_dict()"
        raise CheckpointError(path, [message])
    return loaded


def _describe(torch: ModuleType, name: object, tensor: Any, path: Path, starts: dict[int, int]) -> TensorInfo:
    """Check that a tensor is contiguous inside one record of `starts`, and return its byte range."""
    if not isinstance(name, str):
        raise ValueError(f"its name is a {type(name).__name__}, want text")
    if not isinstance(tensor, torch.Tensor):
        raise ValueError(f"is a {type(tensor).__name__}, want a tensor: save model.state_dict()")
    dtype = _DTYPES.get(str(tensor.dtype).removeprefix("torch."))
    if dtype is None or tensor.layout != torch.strided or tensor.is_conj() or tensor.is_neg():
        raise ValueError(f"is {tensor.dtype} of layout {tensor.layout}; only plain tensors are read")
    shape = tuple(tensor.shape)
    if not tensor.is_contiguous():
        raise ValueError(
            f"declares shape {shape} with strides {tuple(tensor.stride())}, which is not a plain block of "
            "numbers; save it as tensor.contiguous()"
        )
    offset = tensor.untyped_storage()._checkpoint_offset
    start = offset + tensor.storage_offset() * tensor.element_size()
    stop = start + tensor.numel() * tensor.element_size()
    if offset not in starts or stop > offset + starts[offset]:
        raise ValueError(f"{dtype} {shape} does not fit the bytes that the file has for it")
    return TensorInfo(name, path, dtype, shape, start, stop)


def write_torch(
    path: Path, tensors: Sequence[Outgoing], aliases: dict[str, str], advance: Callable[[int], object]
) -> None:
    """Write a state dict in the format of `torch.save`, streaming blocks of rows.

    torch writes the pickle and the zip with empty records (`skip_data`, which reserves address space of the
    tensors' size, but no memory). The records are then filled at the offsets read back from the file. The
    zip checksums stay 0, since torch.load ignores them.

    Args:
        path: the file to write.
        tensors: the tensors, in the order to write.
        aliases: further name -> name of the tensor whose storage it shares (a tied head).
        advance: called with the number of bytes after each block.

    Raises:
        ImportError: torch is missing or too old.
    """
    torch = import_torch(f"{path.name}: a PyTorch file")
    state = {
        tensor.name: torch.empty(tensor.shape, dtype=getattr(torch, tensor.dtype.name)) for tensor in tensors
    }
    state |= {name: state[shared] for name, shared in aliases.items()}
    with torch.serialization.skip_data():
        torch.save(state, path)
    del state
    with open(path, "r+b", buffering=0) as file:
        places = read_torch_header(file, path, path)
        for tensor in tensors:
            file.seek(places[tensor.name].start)
            write_blocks(file, tensor, advance)
        os.fsync(file.fileno())
