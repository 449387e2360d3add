"""Reading of sources into documents, with a count of what was read and what could not be used."""

import dataclasses
import pathlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from mamba2_jax.training.data.chats import Chats
from mamba2_jax.training.data.config import DataConfig
from mamba2_jax.training.data.encode import Encoder, cut
from mamba2_jax.training.data.files import Advance
from mamba2_jax.training.data.records import Record, Source, Text, Unusable, text_of
from mamba2_jax.training.data.sources import read_source
from mamba2_jax.training.data.token_files import TokenWriter

_TEXTS_AT_ONCE = 512
_CHARACTERS_AT_ONCE = 1 << 20  # the tokenizer needs 200 bytes for each
_LISTED = 10  # unusable records that are named


@dataclasses.dataclass(frozen=True)
class Report:
    """Counts of texts, documents and tokens read, and unusable records; `str()` formats them."""

    texts: int
    documents: int
    tokens: int
    truncated: int
    unusable: tuple[Unusable, ...] = ()
    """The first of the unusable records."""
    num_unusable: int = 0
    spelled: int = 0
    """Texts that spell special tokens, which were read as text."""
    kinds: Mapping[str, int] = dataclasses.field(default_factory=dict)
    """Texts by the fields they were made of."""

    def __str__(self) -> str:
        lines = [f"{self.texts:,} texts, {self.documents:,} documents, {self.tokens:,} tokens"]
        if set(self.kinds) - {"text"}:
            lines[0] += " (" + ", ".join(f"{count:,} from {kind}" for kind, count in self.kinds.items()) + ")"
        if self.truncated:
            lines.append(f"{self.truncated:,} texts were longer than a row and were truncated")
        if self.spelled:
            lines.append(
                f"{self.spelled:,} texts spell special tokens of the tokenizer: read as text; to read them "
                "as these tokens, set data.special_tokens_in_text (--data.special-tokens-in-text)"
            )
        if self.num_unusable:
            lines.append(f"{self.num_unusable:,} records could not be used:")
            lines += [f"  {record}" for record in self.unusable[:_LISTED]]
            if self.num_unusable > _LISTED:
                lines.append(f"  and {self.num_unusable - _LISTED:,} more")
        return "\n".join(lines)

    @classmethod
    def read(cls, values: Mapping[str, Any]) -> "Report":
        """Return the report whose `dataclasses.asdict` was stored."""
        return cls(**{**values, "unusable": tuple(Unusable(**record) for record in values["unusable"])})


@dataclasses.dataclass
class _Counts:
    """What was read of one source."""

    documents: int = 0
    tokens: int = 0
    truncated: int = 0
    spelled: int = 0
    kinds: Counter[str] = dataclasses.field(default_factory=Counter)
    unusable: list[Unusable] = dataclasses.field(default_factory=list)  # the first
    num_unusable: int = 0
    cut_short: Unusable | None = None  # of a file whose rest could not be read

    def skip(self, record: Unusable) -> None:
        """Count an unusable record."""
        self.num_unusable += 1
        if record.ends:
            self.cut_short = self.cut_short or record
        if len(self.unusable) < _LISTED:
            self.unusable.append(record)


class Reading:
    """Reads sources into a writer of tokens.

    Args:
        tokenizer: a fast tokenizer of transformers.
        config: data options.
        writer: receives the documents.
    """

    def __init__(self, tokenizer: Any, config: DataConfig, writer: TokenWriter):
        self._config, self._writer = config, writer
        self._encoder = Encoder(tokenizer, config.special_tokens_in_text)
        specials = None if config.special_tokens_in_text else self._encoder.specials
        self._specials = specials
        self._chats = Chats(tokenizer, config.template_variables(), specials)
        self._counts: list[_Counts] = []

    def read(self, source: Source | Sequence[Mapping[str, Any]], advance: Advance) -> None:
        """Read and tokenise one source.

        Args:
            source: as for `read_source`.
            advance: receives numbers of bytes read.

        Raises:
            ValueError: more than `config.max_unusable` of its records cannot be used, or the rest of a file
                cannot be read.
        """
        counts = _Counts()
        self._counts.append(counts)
        for group in _groups(self._converted(source, advance)):
            for record in group:
                if isinstance(record, Unusable):
                    counts.skip(record)
            self._add([record for record in group if isinstance(record, Text)], counts)
        name = str(source) if isinstance(source, str | pathlib.Path) else "the records"
        _check(counts, name, self._config.max_unusable)

    def report(self) -> Report:
        """Return the counts so far, of all sources."""
        return _report(self._counts)

    def _converted(self, source: Any, advance: Advance) -> Iterator[Text | Unusable]:
        for found in read_source(source, self._config, advance):
            if isinstance(found, Record):
                yield text_of(found, self._chats, self._config.text_field)
            elif isinstance(found, Text) and not found.text.strip() and found.begins:
                yield Unusable(found.where, "is empty")
            else:
                yield found

    def _add(self, texts: list[Text], counts: _Counts) -> None:
        """Tokenise texts and write their documents."""
        written = []
        for text, (ids, offsets) in zip(texts, self._encoder.encode(texts), strict=True):
            pieces, shortened = cut(text, ids, offsets, self._config.max_length)
            counts.truncated += shortened
            if not pieces:
                reason = "its prompt fills a whole row" if shortened else "is too short to predict a token"
                counts.skip(Unusable(text.where, reason))
                continue
            written += pieces
            counts.kinds[text.kind] += 1
            spells = self._specials is not None and text.special_tokens and self._specials.search(text.text)
            counts.spelled += bool(text.spelled or spells)
            counts.documents += len(pieces)
            counts.tokens += sum(len(piece.tokens) for piece in pieces)
        self._writer.add(written)


def _groups(texts: Iterable[Text | Unusable]) -> Iterator[list[Text | Unusable]]:
    """Group texts for the tokenizer, which encodes those of a group in parallel; bounded in size."""
    group, size = [], 0
    for text in texts:
        group.append(text)
        size += len(text.text) if isinstance(text, Text) else 0
        if len(group) >= _TEXTS_AT_ONCE or size >= _CHARACTERS_AT_ONCE:
            yield group
            group, size = [], 0
    yield group


def _report(parts: Sequence[_Counts]) -> Report:
    kinds = sum((part.kinds for part in parts), Counter())
    return Report(
        texts=kinds.total(),
        documents=sum(part.documents for part in parts),
        tokens=sum(part.tokens for part in parts),
        truncated=sum(part.truncated for part in parts),
        unusable=tuple(record for part in parts for record in part.unusable)[:_LISTED],
        num_unusable=sum(part.num_unusable for part in parts),
        spelled=sum(part.spelled for part in parts),
        kinds=dict(kinds),
    )


def _check(counts: _Counts, name: str, limit: float) -> None:
    """Stop if too few of a source's records can be used, unless all may be unusable."""
    if limit == 1:
        return
    usable = counts.kinds.total()
    go_on = "repair it, or go on with the others by data.max_unusable = 1 (--data.max-unusable 1)"
    if not usable:
        raise ValueError(f"no usable record in {name}: {_report([counts])}")
    if counts.cut_short is not None:
        raise ValueError(f"{counts.cut_short}: the records behind it cannot be read; {go_on}")
    share = counts.num_unusable / (usable + counts.num_unusable)
    if share > limit:
        raise ValueError(
            f"{name}: {share:.0%} of its records cannot be used, more than data.max_unusable = {limit:g}; "
            f"{go_on}\n{_report([counts])}"
        )
