"""Tokenised documents in flat files, memory-mapped when read.

    tokens.bin   uint16, or uint32 for a vocabulary of more than 65,536
    trained.bin  bool per token: whether the token is a target of the loss
    starts.bin   int64 (documents + 1,): index of the first token of each document
    bytes.bin    int64 (documents,): UTF-8 bytes of the text of a document's targets
    manifest.json  what the files were made from, their sizes and their checksum

A folder is written under another name and renamed when it is complete.
"""

import contextlib
import dataclasses
import hashlib
import io
import json
import mmap
import os
import pathlib
import shutil
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np

from mamba2_jax.files import first_line
from mamba2_jax.training.data.encode import Piece

_MANIFEST = "manifest.json"
_VERSION = 1
_BLOCK = 1 << 20  # tokens
_FILES = ("tokens.bin", "trained.bin", "starts.bin", "bytes.bin")


@dataclasses.dataclass(frozen=True)
class TokenFiles:
    """Contents of the files, as arrays that are read where they are used."""

    tokens: np.ndarray  # (tokens,) uint16 or uint32
    trained: np.ndarray  # (tokens,) bool
    starts: np.ndarray  # (documents + 1,) int64
    num_bytes: np.ndarray  # (documents,) int64
    highest: int
    """Highest token id."""
    fingerprint: str
    """As of `fingerprint_of` all documents."""
    maps: tuple[mmap.mmap, ...] = ()
    folder: pathlib.Path | None = None

    def forget(self) -> None:
        """Drop the pages read so far from this process; they stay in the system's page cache.

        Resident memory would otherwise grow to the size of the files.
        """
        for file in self.maps:
            if hasattr(file, "madvise"):  # not on every system
                file.madvise(mmap.MADV_DONTNEED)


class TokenWriter:
    """Writer of documents, to files or to memory.

    Args:
        folder: written when `finish` is called; replaced if it exists. None: memory.
        vocab_size: number of token ids.
    """

    def __init__(self, folder: pathlib.Path | None, vocab_size: int):
        self._folder, self._dtype = folder, np.dtype(np.uint16 if vocab_size <= 1 << 16 else np.uint32)
        self._part = None if folder is None else folder.with_name(f".{folder.name}.part")
        self._made: list[pathlib.Path] = []  # folders that were not there, the innermost first
        if self._part is not None:
            shutil.rmtree(self._part, ignore_errors=True)  # of a run that was killed
            self._made = [path for path in self._part.parents if not path.exists()]
            self._part.mkdir(parents=True)
        self._files: list[Any] = [
            io.BytesIO() if self._part is None else (self._part / name).open("wb") for name in _FILES
        ]
        self.documents = self.num_tokens = self.highest = 0
        self._write("starts.bin", np.zeros(1, np.int64))

    def add(self, pieces: Iterable[Piece]) -> None:
        """Append documents."""
        pieces = list(pieces)
        if not pieces:
            return
        tokens = np.concatenate([piece.tokens for piece in pieces])
        lengths = np.array([len(piece.tokens) for piece in pieces], np.int64)
        self._write("tokens.bin", tokens.astype(self._dtype))
        self._write("trained.bin", np.concatenate([piece.trained for piece in pieces]))
        self._write("starts.bin", self.num_tokens + np.cumsum(lengths))
        self._write("bytes.bin", np.array([piece.num_bytes for piece in pieces], np.int64))
        self.documents += len(pieces)
        self.num_tokens += len(tokens)
        self.highest = max(self.highest, int(tokens.max()))

    def _write(self, name: str, array: np.ndarray) -> None:
        with self._told():
            self._files[_FILES.index(name)].write(array.tobytes())

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        """Name the folder in an error of the disk."""
        try:
            yield
        except OSError as error:
            reason = error.strerror or first_line(error)
            message = f"{self._folder}: the tokens could not be written ({reason}); free disk space"
            raise OSError(f"{message}, or choose another output folder") from error

    def finish(self, key: dict[str, Any], report: dict[str, Any]) -> TokenFiles:
        """Complete the files and open them.

        Args:
            key: what the documents were made from; `open_tokens` compares it.
            report: stored beside it.
        """
        manifest = {
            "version": _VERSION,
            "key": key,
            "dtype": self._dtype.name,
            "sizes": {name: file.tell() for name, file in zip(_FILES, self._files, strict=True)},
            "highest": self.highest,
            "fingerprint": "",
            "report": report,
        }
        if self._folder is None or self._part is None:
            arrays = _arrays([file.getbuffer() for file in self._files], manifest)
            return dataclasses.replace(arrays, fingerprint=_fingerprint(arrays))
        with self._told():
            for file in self._files:
                file.flush()
                os.fsync(file.fileno())
                file.close()
        manifest["fingerprint"] = _fingerprint(_mapped(self._part, manifest))
        (self._part / _MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")
        shutil.rmtree(self._folder, ignore_errors=True)
        self._part.rename(self._folder)
        return _mapped(self._folder, manifest)

    def abandon(self) -> None:
        """Remove the unfinished files, and the folders made for them."""
        for file in self._files:
            with contextlib.suppress(OSError):  # of a full disk, again
                file.close()
        if self._part is not None:
            shutil.rmtree(self._part, ignore_errors=True)
            for folder in self._made:
                if any(folder.iterdir()):
                    break
                folder.rmdir()


def open_tokens(folder: pathlib.Path, key: dict[str, Any] | None) -> tuple[TokenFiles, dict[str, Any]] | None:
    """Open a folder of documents.

    Args:
        folder: written by `TokenWriter`.
        key: what its documents must have been made from; None: anything.

    Returns:
        The files, and the stored report. None if there is no such folder, its documents were made from
        something else, or its files are incomplete.
    """
    try:
        manifest = json.loads((folder / _MANIFEST).read_text())
        same = manifest["version"] == _VERSION and (key is None or manifest["key"] == key)
        sizes = {name: (folder / name).stat().st_size for name in _FILES}
        if not same or sizes != manifest["sizes"]:
            return None
        return _mapped(folder, manifest), manifest["report"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def fingerprint_of(
    tokens: np.ndarray,
    trained: np.ndarray,
    starts: np.ndarray,
    spans: Iterable[tuple[int, int]],
    forget: Callable[[], None] = lambda: None,
) -> str:
    """Return the SHA-256 of documents, equal for the same documents in memory and in files.

    Args:
        tokens: token ids, read in blocks.
        trained: whether each is a target of the loss.
        starts: index of the first token of each document in all the spans.
        spans: begin and end in `tokens` of the documents, in order; neighbours may share a span.
        forget: called about once a block, to drop the pages of mapped files.
    """
    digest = hashlib.sha256(starts.astype(np.int64).tobytes())
    spans, read = list(spans), 0
    for array, dtype in ((tokens, np.int32), (trained, np.bool_)):
        for begin, end in spans:
            for at in range(begin, end, _BLOCK):
                block = array[at : min(at + _BLOCK, end)]
                digest.update(block.astype(dtype).tobytes())
                read += len(block)
                if read >= _BLOCK:
                    forget()
                    read = 0
    return digest.hexdigest()


def _fingerprint(files: TokenFiles) -> str:
    spans = [(0, len(files.tokens))]
    return fingerprint_of(files.tokens, files.trained, files.starts, spans, files.forget)


def _mapped(folder: pathlib.Path, manifest: dict[str, Any]) -> TokenFiles:
    maps = []
    for name in _FILES:
        with (folder / name).open("rb") as file:
            maps.append(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    return dataclasses.replace(_arrays(maps, manifest), maps=tuple(maps), folder=folder)


def _arrays(buffers: list[Any], manifest: dict[str, Any]) -> TokenFiles:
    dtypes = (manifest["dtype"], np.bool_, np.int64, np.int64)
    arrays = [np.frombuffer(buffer, dtype) for buffer, dtype in zip(buffers, dtypes, strict=True)]
    return TokenFiles(*arrays, highest=manifest["highest"], fingerprint=manifest["fingerprint"])
