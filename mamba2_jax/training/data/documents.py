"""Tokenised documents: read from the sources once, kept in memory or in memory-mapped files."""

import copy
import dataclasses
import functools
import hashlib
import itertools
import json
import pathlib
import shutil
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, cast

import jax
import numpy as np

from mamba2_jax.ops.cross_entropy import IGNORED_LABEL
from mamba2_jax.processes import is_first, meet
from mamba2_jax.training.data.config import DataConfig
from mamba2_jax.training.data.reading import Reading, Report
from mamba2_jax.training.data.records import Source
from mamba2_jax.training.data.sources import local_files
from mamba2_jax.training.data.token_files import TokenFiles, TokenWriter, fingerprint_of, open_tokens
from mamba2_jax.training.progress import reading_bar

_SECONDS = 0.5  # between looks for the tokens that the first process writes


@dataclasses.dataclass(frozen=True)
class Documents(Sequence[dict[str, np.ndarray]]):
    """Sequence of tokenised documents, dicts of `input_ids` and `labels`, stored in contiguous arrays."""

    tokens: np.ndarray  # (sum of lengths,) integers
    trained: np.ndarray  # (sum of lengths,) bool: whether the token is a target of the loss
    starts: np.ndarray  # (stored documents + 1,) int64
    num_bytes: np.ndarray  # (documents,) int64, UTF-8 bytes of the text of all targets
    report: Report
    held_out: np.ndarray | None = None  # sorted indices of stored documents, after `hold_out`
    is_rest: bool = True
    """Whether these are the stored documents without those held out, or the latter alone."""
    files: TokenFiles | None = None
    """The files that the arrays are mapped from, if any."""

    @classmethod
    def of(cls, files: TokenFiles, report: Report) -> "Documents":
        """Return all documents in `files`."""
        return cls(files.tokens, files.trained, files.starts, files.num_bytes, report, files=files)

    def __len__(self) -> int:
        return len(self.num_bytes)

    def __getitem__(self, index) -> dict[str, np.ndarray]:
        """Return `input_ids` and `labels` of one document, each `(length,)` int32."""
        begin, end = self.span(index)
        tokens = self.tokens[begin:end].astype(np.int32)
        labels = np.where(self.trained[begin:end], tokens, np.int32(IGNORED_LABEL))
        self.forget()
        return {"input_ids": tokens, "labels": labels}

    def span(self, index: int) -> tuple[int, int]:
        """Return where a document's tokens begin and end in `tokens`."""
        index = range(len(self))[index]
        if self.held_out is not None and not self.is_rest:
            index = int(self.held_out[index])
        elif self.held_out is not None:  # plus the number of documents held out before this one
            index += int(np.searchsorted(self._kept_before, index, side="right"))
        return int(self.starts[index]), int(self.starts[index + 1])

    @functools.cached_property
    def _kept_before(self) -> np.ndarray:
        """Number of documents kept before each one held out."""
        held_out = cast(np.ndarray, self.held_out)
        return held_out - np.arange(len(held_out))

    def read(self, positions: np.ndarray) -> dict[str, np.ndarray]:
        """Return `input_ids` and `labels` at positions of any shape, int32; 0 and the ignored label at -1."""
        real = positions >= 0
        tokens = np.zeros(positions.shape, np.int32)
        tokens[real] = self.tokens[positions[real]]
        trained = np.zeros(positions.shape, bool)
        trained[real] = self.trained[positions[real]]
        return {"input_ids": tokens, "labels": np.where(trained, tokens, np.int32(IGNORED_LABEL))}

    def forget(self) -> None:
        """Drop the pages of mapped files from this process's memory."""
        if self.files is not None:
            self.files.forget()

    @property
    def folder(self) -> pathlib.Path | None:
        """Folder of the files, if the documents are in files."""
        return None if self.files is None else self.files.folder

    @property
    def highest(self) -> int:
        """Highest token id."""
        return int(self.tokens.max()) if self.files is None else self.files.highest

    @property
    def longest(self) -> int:
        """Length of the longest document in tokens."""
        lengths = np.diff(self.starts)
        if self.held_out is not None:
            lengths = np.delete(lengths, self.held_out) if self.is_rest else lengths[self.held_out]
        return int(lengths.max())

    def fingerprint(self) -> str:
        """Return the SHA-256 of the content, by which a resumed run verifies its data."""
        return self._fingerprint

    @functools.cached_property
    def _fingerprint(self) -> str:
        if self.held_out is None:
            spans = [(0, len(self.tokens))]
            given = None if self.files is None else self.files.fingerprint
            return given or fingerprint_of(self.tokens, self.trained, self.starts, spans, self.forget)
        lengths, held_out = np.diff(self.starts), self.held_out
        if self.is_rest:
            lengths = np.delete(lengths, held_out)
            ends = [*self.starts[held_out].tolist(), len(self.tokens)]
            spans = zip([0, *self.starts[held_out + 1].tolist()], ends, strict=True)
        else:
            lengths = lengths[held_out]
            spans = zip(self.starts[held_out].tolist(), self.starts[held_out + 1].tolist(), strict=True)
        starts = np.concatenate([[0], np.cumsum(lengths)])
        return fingerprint_of(self.tokens, self.trained, starts, spans, self.forget)

    def hold_out(self, share: float, seed: int) -> tuple["Documents", "Documents"]:
        """Split off a random fraction `share` of the documents, at least one; return (rest, held out)."""
        count = max(1, round(share * len(self)))
        if count >= len(self):
            raise ValueError(
                f"DataConfig: eval_share={share} of {len(self)} documents leaves none to train on; "
                "give more data, or a separate file for evaluation"
            )
        if self.held_out is not None:
            raise ValueError("Documents: a share has been held out already")
        held_out = np.sort(np.random.default_rng(seed).permutation(len(self))[:count])
        tokens = int(np.diff(self.starts)[held_out].sum())
        parts = []
        for is_rest in (True, False):
            num_bytes = np.delete(self.num_bytes, held_out) if is_rest else self.num_bytes[held_out]
            report = dataclasses.replace(
                self.report,
                documents=len(num_bytes),
                tokens=self.report.tokens - tokens if is_rest else tokens,
            )
            parts.append(
                dataclasses.replace(
                    self, num_bytes=num_bytes, report=report, held_out=held_out, is_rest=is_rest
                )
            )
        return parts[0], parts[1]


def load_documents(
    sources: Iterable[Source] | Source,
    tokenizer: Any,
    config: DataConfig,
    *,
    folder: str | pathlib.Path | None = None,
    progress: bool = False,
    report: Callable[[str], None] = lambda message: None,
) -> Documents:
    """Read and tokenise all sources.

    With several processes, each calls it; the first reads the sources, and all map the files in `folder`.

    Args:
        sources: one or several: files (JSON lines or an array, CSV, Parquet, all others plain text), folders
            of files, ids of hub datasets, or records as dicts; pass a plain string as `{"text": ...}`.
        tokenizer: a fast tokenizer of transformers; its chat template may be set by `config`.
        config: data options.
        folder: for the tokens, as memory-mapped files; used again while sources, tokenizer and options are
            the same. None, or records among the sources: the tokens are kept in memory.
        progress: show a progress bar on stderr.
        report: called with a message when the files in `folder` are used again.

    Raises:
        FileNotFoundError: a source that does not exist.
        ValueError: a source of whose records more than `config.max_unusable` cannot be used; the message
            lists the first reasons.
    """
    one = isinstance(sources, str | Mapping) or not isinstance(sources, Iterable)
    sources = cast("list[Source]", [sources] if one else list(cast(Iterable, sources)))
    tokenizer = with_template(tokenizer, config)
    if folder is None or not sources or any(isinstance(source, Mapping) for source in sources):
        return _written(None, {}, sources, tokenizer, config, progress)
    folder, key = pathlib.Path(folder), _key(sources, tokenizer, config)
    found, failed = None, folder.with_name(f".{folder.name}.failed")
    if is_first():
        found = open_tokens(folder, key)
        failed.unlink(missing_ok=True)
        if found is None:
            shutil.rmtree(folder, ignore_errors=True)
    meet(f"mamba2_jax: tokens in {folder.name}")  # what is in the folder from here on is valid
    if found is not None:
        report(f"tokens of an earlier start are used: {folder}")
    elif is_first():
        return _written(folder, key, sources, tokenizer, config, progress)
    else:
        found = _wait_for(folder, failed)
    return Documents.of(found[0], Report.read(found[1]))


def _wait_for(folder: pathlib.Path, failed: pathlib.Path) -> tuple[TokenFiles, dict[str, Any]]:
    """Open the tokens as soon as the first process has written them.

    No barrier, since collectives time out, and tokenisation may take hours.
    """
    while not failed.exists():
        found = open_tokens(folder, None)
        if found is not None:
            return found
        time.sleep(_SECONDS)
    raise ValueError(f"{folder}: the first process wrote no tokens; its message has the reason")


def with_template(tokenizer: Any, config: DataConfig) -> Any:
    """Return the tokenizer, or a copy with the chat template that `config` names."""
    template = config.template_text()
    if template is None or tokenizer.chat_template == template:
        return tokenizer
    tokenizer = copy.copy(tokenizer)
    tokenizer.chat_template = template
    return tokenizer


def _key(sources: list[Source], tokenizer: Any, config: DataConfig) -> dict[str, Any]:
    """Return what the tokens depend on, as JSON values: a file counts as the same by its size and time."""
    files: list[Any] = []
    for source in cast("list[str | pathlib.Path]", sources):
        path = pathlib.Path(source).expanduser()
        if path.exists():
            for file in local_files(path):
                stat = file.stat()
                files.append([str(file.absolute()), stat.st_size, stat.st_mtime_ns])
        else:
            files.append([str(source), config.config, config.revision, config.split])
    template = json.dumps(tokenizer.chat_template, sort_keys=True)
    text = f"{tokenizer.backend_tokenizer.to_str()} {tokenizer.eos_token_id} {template}"
    names = ("max_length", "text_field", "template_options", "special_tokens_in_text", "max_unusable")
    return {
        "sources": hashlib.sha256(json.dumps(files).encode()).hexdigest(),
        "tokenizer": hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest(),
        **{name: getattr(config, name) for name in names},
    }


def _written(
    folder: pathlib.Path | None,
    key: dict[str, Any],
    sources: list[Source],
    tokenizer: Any,
    config: DataConfig,
    progress: bool,
) -> Documents:
    """Tokenise the sources into files, or into memory."""
    writer = TokenWriter(folder, len(tokenizer))
    reading = Reading(tokenizer, config, writer)
    others = [source for source in sources if not isinstance(source, Mapping)]
    try:
        with reading_bar(_num_bytes(others), progress) as advance:
            for are_records, group in itertools.groupby(sources, lambda source: isinstance(source, Mapping)):
                for source in [cast(list, list(group))] if are_records else group:
                    reading.read(source, advance)
        report = reading.report()
        if not writer.documents:
            raise ValueError(f"no usable record in {', '.join(map(str, others)) or 'no source'}: {report}")
        return Documents.of(writer.finish(key, dataclasses.asdict(report)), report)
    except BaseException:
        writer.abandon()
        if folder is not None and jax.process_count() > 1:
            folder.parent.mkdir(parents=True, exist_ok=True)
            folder.with_name(f".{folder.name}.failed").touch()  # the others wait for the tokens
        raise


def _num_bytes(sources: list[Any]) -> int | None:
    """Return the total size of the sources on disk, or None if one is not local."""
    paths = [pathlib.Path(source).expanduser() for source in sources]
    if not all(path.exists() for path in paths):
        return None
    return sum(file.stat().st_size for path in paths for file in local_files(path))
