"""Reading of one file into records: JSON, JSON lines, CSV, Parquet, plain text; compressed or not.

Every reader streams: the memory needed is that of one record (of a megabyte, for plain text).
"""

import bz2
import codecs
import csv
import gzip
import io
import lzma
import pathlib
import zlib
from collections.abc import Callable, Iterator
from typing import IO, Any

from mamba2_jax.training.data.json_values import read_json
from mamba2_jax.training.data.records import Record, Text, Unusable

Advance = Callable[[int], None]
"""Receives numbers of bytes read from disk, for a progress bar."""

_COMPRESSED: dict[str, Any] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
_DAMAGED = (EOFError, gzip.BadGzipFile, lzma.LZMAError, zlib.error, OSError)
_BLOCK = 1 << 20
_SURPLUS = "fields beyond the header's"
_LONGEST_FIELD = 1 << 30  # characters of a field of a CSV file; the module's own limit is 131,072
_MARKS = {  # byte-order marks; UTF-32's first, which begins like UTF-16's
    codecs.BOM_UTF8: "utf-8",
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
_UNREADABLE = {
    ".arrow": "Arrow", ".feather": "Arrow", ".zip": "a zip archive", ".tar": "a tar archive",
    ".tgz": "a tar archive", ".zst": "compressed with Zstandard", ".xlsx": "an Excel file",
}  # fmt: skip


def read_file(path: pathlib.Path, advance: Advance) -> Iterator[Record | Text | Unusable]:
    """Yield the records of a file, by its suffix; a file of another suffix is one plain text."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    compression = suffixes.pop() if suffixes and suffixes[-1] in _COMPRESSED else ""
    suffix = suffixes[-1] if suffixes else ""
    if suffix in _UNREADABLE:
        reason = f"is {_UNREADABLE[suffix]}, which is not read; want JSON, JSON lines, CSV, Parquet or text"
        yield Unusable(str(path), reason)
    elif suffix == ".parquet":
        yield from _read_parquet(path, advance)
    else:
        with path.open("rb") as raw:
            file = _Counted(_COMPRESSED[compression](raw) if compression else raw, raw, advance)
            try:
                yield from _read_encoded(file, path, suffix)
            except _DAMAGED as error:
                if not compression:
                    raise
                yield Unusable(str(path), f"is damaged ({error})", ends=True)


class _Counted(io.RawIOBase):
    """Binary stream that reports how far the file below it has been read."""

    def __init__(self, file: IO[bytes], raw: IO[bytes], advance: Advance):
        self._file, self._raw, self._advance, self._told = file, raw, advance, 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        data = self._file.read(len(buffer))
        buffer[: len(data)] = data
        position = self._raw.tell()
        self._advance(position - self._told)
        self._told = position
        return len(data)


class _Recoded(io.RawIOBase):
    """Binary stream of UTF-8, of a file in another encoding. That of `codecs` splits lines at U+2028."""

    def __init__(self, file: Any, encoding: str):
        self._file, self._decoder, self._held = file, codecs.getincrementaldecoder(encoding)(), b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        while not self._held:
            data = self._file.read(_BLOCK)
            self._held = self._decoder.decode(data, final=not data).encode()
            if not data:
                break
        count = min(len(buffer), len(self._held))
        buffer[:count], self._held = self._held[:count], self._held[count:]
        return count


def _read_encoded(stream: _Counted, path: pathlib.Path, suffix: str) -> Iterator[Record | Text | Unusable]:
    """Find the encoding of a file by its first bytes, and read it as UTF-8."""
    file: Any = io.BufferedReader(stream, _BLOCK)
    head = file.peek(4)[:4]
    mark = next((mark for mark in _MARKS if head.startswith(mark)), b"")
    encoding = _MARKS.get(mark, "utf-8")
    if encoding == "utf-8":
        file.read(len(mark))
    else:
        file = io.BufferedReader(_Recoded(file, encoding), _BLOCK)
    if encoding == "utf-8" and b"\0" in head:
        names = "UTF-16 or UTF-32 without a byte-order mark, or no text"
        yield Unusable(str(path), f"has zero bytes where text begins: {names}; convert it to UTF-8")
        return
    try:
        if suffix in (".jsonl", ".ndjson", ".json"):
            yield from read_json(file, path)
        elif suffix in (".csv", ".tsv"):
            yield from _read_csv(file, path, "," if suffix == ".csv" else "\t")
        else:
            yield from _read_text(file, path)
    except UnicodeDecodeError as error:  # readers of records in UTF-8 name the record themselves
        yield Unusable(str(path), f"is not {encoding.upper()} ({error.reason})", ends=True)


def _read_csv(file: Any, path: pathlib.Path, delimiter: str) -> Iterator[Record | Unusable]:
    lines = (line.decode("utf-8") for line in file)
    rows = csv.DictReader(lines, delimiter=delimiter, restkey=_SURPLUS)
    limit = csv.field_size_limit(_LONGEST_FIELD)
    try:
        for number, row in enumerate(rows, start=1):
            where = f"{path}: row {number}"
            if _SURPLUS in row or None in row.values():
                count = len(rows.fieldnames or [])
                yield Unusable(where, f"has another number of fields than the header's {count}")
            else:
                yield Record(where, row)
    except csv.Error as error:
        yield Unusable(str(path), f"cannot be read as CSV ({error})", ends=True)
    finally:
        csv.field_size_limit(limit)


def _read_text(file: io.BufferedReader, path: pathlib.Path) -> Iterator[Text | Unusable]:
    """Read a plain text; one larger than a block is read in several, cut at ends of lines."""
    block, offset, last = b"", 0, False
    while not last:
        block += file.read(_BLOCK)
        last = not file.peek(1)
        cut = len(block) if last else _end_of_line(block)
        if not cut:
            continue
        try:
            text = block[:cut].decode("utf-8").replace("\r\n", "\n")
        except UnicodeDecodeError as error:
            reason = f"is not UTF-8 (byte {offset + error.start})"
            yield Unusable(str(path), reason, ends=offset > 0)
            return
        where = f"{path}: byte {offset}" if offset else str(path)
        yield Text(text, ((0, len(text)),), where, begins=not offset, ends=last)
        offset, block = offset + cut, block[cut:]


def _end_of_line(block: bytes) -> int:
    """Return where a block is cut: behind its last line, or its last word if the line is very long; or 0."""
    cut = block.rfind(b"\n") + 1
    if cut or len(block) < 4 * _BLOCK:
        return cut
    cut = block.rfind(b" ") + 1 or len(block) - 4
    while cut < len(block) and block[cut] & 0xC0 == 0x80:  # inside of a character
        cut += 1
    return cut


def _read_parquet(path: pathlib.Path, advance: Advance) -> Iterator[Record]:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError as error:
        raise missing_extra(f"{path}: reading Parquet") from error
    try:
        with parquet.ParquetFile(path) as file:
            done, size = 0, path.stat().st_size / max(file.metadata.num_rows, 1)
            for batch in file.iter_batches(batch_size=256):
                for number, row in enumerate(batch.to_pylist(), start=done + 1):
                    yield Record(f"{path}:{number}", row, filled=True)
                done += batch.num_rows
                advance(int(size * batch.num_rows))
    except (ArrowException, OSError) as error:
        raise ValueError(f"{path}: cannot be read as Parquet ({error})") from error


def missing_extra(what: str) -> ImportError:
    """Return the error for a package that the extra `train` brings."""
    return ImportError(f"{what} needs the extra 'train': pip install 'mamba2-jax-flax[train]'")
