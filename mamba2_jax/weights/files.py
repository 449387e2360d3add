"""Read untrusted files: regular files inside the folder only, bounded reads, strict JSON."""

import io
import json
import os
import stat
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import numpy as np

from mamba2_jax.files import first_line

MAX_JSON_BYTES = 16 << 20  # a 7B checkpoint's header has 60 kB; parsed, it takes several times the text


_MAX_LINES, _MAX_LINE, _MAX_MESSAGE = 20, 400, 6000


class CheckpointError(ValueError):
    """Error for a checkpoint that is malformed, unsafe, or does not match the config.

    `where` is the folder or file, `problems` holds one line for each problem found. The message has as many
    of them as fit into some kilobytes.
    """

    def __init__(self, where: Path | str, problems: Sequence[str]):
        self.where = Path(where)
        self.problems = tuple(problems)
        if len(self.problems) == 1:
            message = f"{where}: {self.problems[0]}"
        else:
            lines = [problem[:_MAX_LINE] for problem in self.problems[:_MAX_LINES]]
            if len(self.problems) > _MAX_LINES:
                lines.append(f"and {len(self.problems) - _MAX_LINES} more")
            message = "\n  - ".join([f"{where}: {len(self.problems)} problems", *lines])
        super().__init__(message[:_MAX_MESSAGE])


def show(name: str) -> str:
    """Quote an untrusted name for a message: printable ASCII, truncated to 120 characters."""
    return ascii(name if len(name) <= 120 else name[:120] + "...")


def parse_json(text: bytearray, path: Path, what: str) -> dict:
    """Parse a JSON object strictly: UTF-8, no duplicate names, no NaN; `what` names it in messages."""

    def unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
        result: dict[str, object] = {}
        for name, value in pairs:
            if name in result:
                raise ValueError(f"{show(name)} appears twice")
            result[name] = value
        return result

    def refuse(constant: str) -> NoReturn:
        raise ValueError(f"{constant} is not JSON")

    try:
        if text[:1] != b"{":
            raise ValueError("it does not begin with '{'")
        return json.loads(text.decode("utf-8"), object_pairs_hook=unique, parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(path, [f"{what} is not readable JSON: {first_line(error, 200)}"]) from None


def read_json_inside(folder: Path, name: str, what: str, limit: int = MAX_JSON_BYTES) -> dict:
    """Read the JSON object `folder/name` strictly; `what` is its name in messages, `limit` its most bytes."""
    path = folder / name
    with open_regular(path, resolve_inside(folder, name)) as file:
        size = os.fstat(file.fileno()).st_size
        if size > limit:
            raise CheckpointError(path, [f"{what} has {size} bytes; more than {limit} are not read"])
        text = bytearray(size)
        read_exactly(file, path, 0, text, what)
    return parse_json(text, path, what)


def resolve_inside(folder: Path, name: str) -> Path:
    """Resolve symlinks of `folder/name`; refuse targets outside the folder and its hub cache's blobs."""
    try:
        root, target = folder.resolve(), (folder / name).resolve()
    except (OSError, RuntimeError) as error:  # RuntimeError: a loop of links
        raise CheckpointError(folder / name, [f"cannot be resolved: {error}"]) from None
    # Hub cache layout: models--org--name/{blobs,snapshots/<revision>/...}; snapshots are links into blobs.
    blobs = [parent.parent / "blobs" for parent in root.parents if parent.name == "snapshots"]
    if not any(target.is_relative_to(allowed) for allowed in (root, *blobs)):
        message = f"a link to {target}, outside the folder; put the file itself here, or open its own folder"
        raise CheckpointError(folder / name, [message])
    return target


def open_regular(path: Path, target: Path) -> io.FileIO:
    """Open `target` for reading if it is a regular file; messages call it `path`."""
    try:
        if not stat.S_ISREG(os.stat(target).st_mode):  # before open(), which would block on a pipe
            raise CheckpointError(path, ["not a regular file"])
        return io.FileIO(target, "rb")
    except FileNotFoundError:
        raise CheckpointError(path, ["the file is missing"]) from None
    except OSError as error:
        raise CheckpointError(path, [f"cannot be opened: {error.strerror}"]) from None


def read_exactly(file: io.FileIO, path: Path, offset: int, out: bytearray | np.ndarray, what: str) -> None:
    """Fill `out` from byte `offset`, or raise CheckpointError at an early end of file. Thread-safe."""
    left = out.view(np.uint8).reshape(-1).data if isinstance(out, np.ndarray) else memoryview(out)
    try:
        while left:
            count = _read_at(file, left, offset)
            if not count:
                raise cut_short(path, what, len(left))
            left, offset = left[count:], offset + count
    except OSError as error:
        raise CheckpointError(path, [f"{what}: cannot be read: {error.strerror}"]) from None


def cut_short(path: Path, what: str, missing: int) -> CheckpointError:
    """Build the error for a file that ends `missing` bytes before the end of `what`."""
    problem = f"{what}: the file ends {missing} bytes early; was it cut while being read?"
    return CheckpointError(path, [problem])


def will_read(file: io.FileIO, offset: int, count: int) -> None:
    """Ask the kernel to prefetch `count` bytes from `offset` into the page cache, where supported."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(file.fileno(), offset, count, os.POSIX_FADV_WILLNEED)


_ONE_READER = threading.Lock()


def _read_at(file: io.FileIO, out: memoryview, offset: int) -> int:
    if hasattr(os, "preadv"):
        return os.preadv(file.fileno(), [out], offset)
    with _ONE_READER:  # Windows: seek and read share the file position
        file.seek(offset)
        return file.readinto(out) or 0
