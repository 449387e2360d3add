"""Training data: texts are tokenized once, then a resumable Grain pipeline shuffles and packs or pads them.

A packed row holds several documents with different `segment_ids`; no state flows between documents.
"""

import dataclasses
import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import groupby, islice
from typing import Any, Literal, cast

import numpy as np

from mamba2_jax.ops.checks import check_choice
from mamba2_jax.ops.cross_entropy import IGNORED_LABEL
from mamba2_jax.training.records import Source, Text, Unusable, read_texts

_TEXTS_AT_ONCE = 512
_LISTED = 10  # maximum number of unusable records in a report

Batch = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Options for turning texts into rows of tokens.

    Raises:
        ValueError: an invalid value; the message names it.
    """

    max_length: int = 512
    """Tokens per row. Longer texts are split into several documents; texts with a prompt are truncated."""
    rows: Literal["pack", "pad"] = "pack"
    """Pack several documents into a row, or pad one document to the full length."""
    shuffle: bool = True
    text_field: str = "text"
    """Field of a record that holds its text."""
    split: str = "train"
    """Split of a hub dataset."""
    eval_share: float = 0.0
    """Fraction of documents held out for evaluation, unless evaluation data is given."""

    def __post_init__(self):
        check_choice("DataConfig", "rows", self.rows, ("pack", "pad"))
        if self.max_length < 2:
            raise ValueError(f"DataConfig: max_length={self.max_length} must be at least 2 tokens")
        if not 0 <= self.eval_share < 1:
            raise ValueError(f"DataConfig: eval_share={self.eval_share} must lie in 0..1, 1 excluded")


@dataclasses.dataclass(frozen=True)
class Report:
    """Counts of texts, documents and tokens read, and unusable records; `str()` formats them."""

    texts: int
    documents: int
    tokens: int
    truncated: int
    unusable: tuple[Unusable, ...] = ()

    def __str__(self) -> str:
        lines = [f"{self.texts:,} texts, {self.documents:,} documents, {self.tokens:,} tokens"]
        if self.truncated:
            lines.append(f"{self.truncated:,} texts were longer than a row and were truncated")
        if self.unusable:
            lines.append(f"{len(self.unusable):,} records could not be used:")
            lines += [f"  {record}" for record in self.unusable[:_LISTED]]
            if len(self.unusable) > _LISTED:
                lines.append(f"  and {len(self.unusable) - _LISTED:,} more")
        return "\n".join(lines)


@dataclasses.dataclass(frozen=True)
class Documents(Sequence[dict[str, np.ndarray]]):
    """Sequence of tokenized documents, dicts of `input_ids` and `labels`, stored in contiguous arrays."""

    tokens: np.ndarray  # (sum of lengths,) int32
    trained: np.ndarray  # (sum of lengths,) bool: whether the token is a target of the loss
    starts: np.ndarray  # (documents + 1,) int64
    num_bytes: np.ndarray  # (documents,) int64, UTF-8 bytes of the text of all targets
    report: Report

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, index) -> dict[str, np.ndarray]:
        """Return `input_ids` and `labels` of one document, each `(length,)`."""
        begin, end = self.starts[index], self.starts[index + 1]
        tokens = self.tokens[begin:end]
        return {"input_ids": tokens, "labels": np.where(self.trained[begin:end], tokens, IGNORED_LABEL)}

    def fingerprint(self) -> str:
        """Return the SHA-256 of the content, by which a resumed run verifies its data."""
        digest = hashlib.sha256()
        for array in (self.starts, self.tokens, self.trained):
            digest.update(np.ascontiguousarray(array).tobytes())
        return digest.hexdigest()

    def hold_out(self, share: float, seed: int) -> tuple["Documents", "Documents"]:
        """Split off a random fraction `share` of the documents, at least one; return (rest, held out)."""
        count = max(1, round(share * len(self)))
        if count >= len(self):
            raise ValueError(
                f"DataConfig: eval_share={share} of {len(self)} documents leaves none to train on; "
                "give more data, or a separate file for evaluation"
            )
        order = np.random.default_rng(seed).permutation(len(self))
        return self._pick(np.sort(order[count:])), self._pick(np.sort(order[:count]))

    def _pick(self, chosen: np.ndarray) -> "Documents":
        lengths = np.diff(self.starts)[chosen]
        spans = [slice(self.starts[i], self.starts[i + 1]) for i in chosen]
        report = dataclasses.replace(self.report, documents=len(chosen), tokens=int(lengths.sum()))
        return Documents(
            tokens=np.concatenate([self.tokens[span] for span in spans]),
            trained=np.concatenate([self.trained[span] for span in spans]),
            starts=np.concatenate([[0], np.cumsum(lengths)]),
            num_bytes=self.num_bytes[chosen],
            report=report,
        )


def load_documents(sources: Iterable[Source] | Source, tokenizer: Any, config: DataConfig) -> Documents:
    """Read and tokenize all sources into memory.

    Args:
        sources: one or several, as for `read_texts`.
        tokenizer: a fast tokenizer of transformers.
        config: data options.

    Raises:
        FileNotFoundError: a source that does not exist.
        ValueError: no usable record; the message lists the first reasons.
    """
    one = isinstance(sources, str | Mapping) or not isinstance(sources, Iterable)
    sources = cast("list[Source]", [sources] if one else list(cast(Iterable, sources)))
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError("load_documents: wants a fast tokenizer of transformers, as load_tokenizer returns")
    records = read_texts(sources, tokenizer, text_field=config.text_field, split=config.split)
    pieces: list[tuple[np.ndarray, np.ndarray, int]] = []
    unusable: list[Unusable] = []
    count = truncated = 0
    while group := list(islice(records, _TEXTS_AT_ONCE)):
        unusable += [record for record in group if isinstance(record, Unusable)]
        texts = [record for record in group if isinstance(record, Text)]
        for text, tokenised in zip(texts, _tokenise(texts, tokenizer), strict=True):
            made, shortened = _cut(text, *tokenised, config.max_length)
            count += bool(made)
            truncated += shortened
            pieces += made
            if not made:
                reason = "its prompt fills a whole row" if shortened else "is too short to predict a token"
                unusable.append(Unusable(text.where, reason))
    report = Report(
        count, len(pieces), sum(len(tokens) for tokens, _, _ in pieces), truncated, tuple(unusable)
    )
    if not pieces:
        raise ValueError(f"no usable record in {', '.join(map(_name, sources)) or 'no source'}: {report}")
    tokens, trained, num_bytes = zip(*pieces, strict=True)
    starts = np.concatenate([[0], np.cumsum([len(piece) for piece in tokens])])
    return Documents(np.concatenate(tokens), np.concatenate(trained), starts, np.array(num_bytes), report)


def _name(source: Source) -> str:
    return "a record" if isinstance(source, Mapping) else str(source)


def _tokenise(texts: list[Text], tokenizer: Any) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield token ids `(l,)` and offsets `(l, 2)` per text; texts without a chat template end in an eos."""
    eos = tokenizer.eos_token_id
    for special, alike in groupby(texts, key=lambda text: text.special_tokens):
        group = [text.text for text in alike]
        encoded = tokenizer(group, add_special_tokens=special, return_offsets_mapping=True, verbose=False)
        for text, ids, offsets in zip(group, encoded["input_ids"], encoded["offset_mapping"], strict=True):
            offsets = np.array(offsets, np.int64).reshape(-1, 2)
            if special and eos is not None and (not ids or ids[-1] != eos):
                ids = [*ids, eos]
                offsets = np.concatenate([offsets, [[len(text), len(text)]]])
            yield np.array(ids, np.int32), offsets


def _cut(
    text: Text, ids: np.ndarray, offsets: np.ndarray, max_length: int
) -> tuple[list[tuple[np.ndarray, np.ndarray, int]], bool]:
    """Cut a text into documents of at most `max_length` tokens; also return whether it was truncated.

    A text that is trained on as a whole is split so that each document begins with the last token of the
    previous one: every token is then predicted once. Other texts are truncated.
    """
    begins, ends = offsets.T
    trained = np.zeros(len(ids), bool)
    for begin, end in text.spans:
        trained |= (ends > begin) & (begins < end)
    closing = (begins == ends) & (begins == len(text.text)) & (np.arange(len(ids)) > 0)
    trained |= closing & (text.special_tokens & (text.spans[-1][1] == len(text.text)))
    starts = [0]
    if text.whole:
        starts = list(range(0, max(1, len(ids) - 1), max_length - 1))
    pieces = []
    for start in starts:
        here = slice(start, start + max_length)
        if not trained[here][1:].any():
            continue
        scored = slice(ends[here][0], ends[here].max())
        spans = [text.text[max(begin, scored.start) : min(end, scored.stop)] for begin, end in text.spans]
        pieces.append((ids[here], trained[here], sum(len(span.encode()) for span in spans)))
    return pieces, not text.whole and len(ids) > max_length


def make_pipeline(
    documents: Documents, config: DataConfig, batch_size: int, *, seed: int, epochs: int | None
) -> Any:
    """Build the Grain pipeline of batches; deterministic given the documents and the seed.

    Args:
        documents: the tokenized documents.
        config: data options.
        batch_size: rows per batch; the last batch is padded with empty rows.
        seed: random seed of shuffling and packing.
        epochs: passes over the documents, each in a new order; None: endless.

    Returns:
        A `grain.IterDataset` of dicts `input_ids`, `segment_ids`, `labels`, each `(batch_size, max_length)`.
        Its iterators have `get_state` and `set_state`.
    """
    grain = _import_grain()
    dataset = grain.MapDataset.source(documents).seed(seed)
    if config.shuffle:
        dataset = dataset.shuffle()
    dataset = dataset.repeat(epochs)
    dataset = dataset.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0))
    if config.rows == "pack":
        dataset = grain.experimental.FirstFitPackIterDataset(
            dataset,
            length_struct={"input_ids": config.max_length, "labels": config.max_length},
            num_packing_bins=max(batch_size, 32),
            padding_struct={"input_ids": 0, "labels": IGNORED_LABEL},
            seed=seed,
            shuffle_bins=config.shuffle,
        )
        dataset = dataset.map(_packed_row)
    else:
        dataset = dataset.map(partial(_padded_row, length=config.max_length))
    return dataset.batch(batch_size, drop_remainder=False, batch_fn=partial(_stack, batch_size=batch_size))


def eval_batches(documents: Documents, config: DataConfig, batch_size: int) -> Iterator[Batch]:
    """Return an iterator over packed batches of all documents, once and in order."""
    config = dataclasses.replace(config, shuffle=False, rows="pack")
    return iter(make_pipeline(documents, config, batch_size, seed=0, epochs=1))


def _packed_row(row: Batch) -> Batch:
    return {
        "input_ids": row["input_ids"],
        "segment_ids": row["input_ids_segment_ids"],
        "labels": row["labels"],
    }


def _padded_row(document: Batch, length: int) -> Batch:
    padding = (0, length - len(document["input_ids"]))
    return {
        "input_ids": np.pad(document["input_ids"], padding),
        "segment_ids": np.pad(np.ones(len(document["input_ids"]), np.int32), padding),
        "labels": np.pad(document["labels"], padding, constant_values=IGNORED_LABEL),
    }


def _stack(rows: Sequence[Batch], batch_size: int) -> Batch:
    missing = batch_size - len(rows)
    fill = {"input_ids": 0, "segment_ids": 0, "labels": IGNORED_LABEL}
    return {
        name: np.pad(
            np.stack([row[name] for row in rows]).astype(np.int32),
            ((0, missing), (0, 0)),
            constant_values=value,
        )
        for name, value in fill.items()
    }


def _import_grain() -> Any:
    try:
        import grain
    except ImportError as error:
        raise ImportError("training needs the extra 'train': pip install 'mamba2-jax-flax[train]'") from error
    return grain
