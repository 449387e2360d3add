"""Encoding of texts into token ids, and cutting these into documents of at most a row."""

from collections.abc import Iterator
from itertools import groupby
from typing import Any, NamedTuple

import numpy as np

from mamba2_jax.special_tokens import pieces, special_pattern
from mamba2_jax.training.data.records import Text


class Piece(NamedTuple):
    """One document: a text, or a part of a long one."""

    tokens: np.ndarray  # (length,) int32
    trained: np.ndarray  # (length,) bool: whether the token is a target of the loss
    num_bytes: int  # UTF-8 bytes of the text of all targets


class Encoder:
    """Encodes texts with a fast tokenizer. Special tokens that a text spells are text.

    Args:
        tokenizer: a fast tokenizer of transformers.
        special_tokens_in_text: whether such spellings are the special tokens instead.

    Raises:
        ValueError: not a fast tokenizer.
    """

    def __init__(self, tokenizer: Any, special_tokens_in_text: bool = False):
        if not getattr(tokenizer, "is_fast", False):
            raise ValueError(
                "load_documents: wants a fast tokenizer of transformers, as load_tokenizer returns"
            )
        self._tokenizer = tokenizer
        self.specials = special_pattern(tokenizer)
        """Pattern of the spellings of special tokens."""
        self._split = not special_tokens_in_text

    def encode(self, texts: list[Text]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield token ids `(l,)` and character offsets `(l, 2)` per text.

        The tokenizer's special tokens, and an eos, go around a text that no chat template wrote.
        """
        for (special, spelled), alike in groupby(
            texts, key=lambda text: (text.special_tokens, bool(text.spelled))
        ):
            if spelled and self._split:
                for text in alike:
                    yield self._encode_between(text)
                continue
            group = list(alike)
            encoded = self._call([text.text for text in group], special, split=special and self._split)
            for text, ids, offsets in zip(group, *encoded, strict=True):
                yield self._ended(text, ids, offsets) if special else (ids, offsets)

    def _call(self, texts: list[str], special: bool, split: bool) -> tuple[list, list]:
        encoded = self._tokenizer(
            texts,
            add_special_tokens=special,
            split_special_tokens=split,
            return_offsets_mapping=True,
            verbose=False,
        )
        ids = [np.array(row, np.int32) for row in encoded["input_ids"]]
        return ids, [np.array(row, np.int64).reshape(-1, 2) for row in encoded["offset_mapping"]]

    def _ended(self, text: Text, ids: np.ndarray, offsets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Add the eos at the end of a plain text; take off what marks ends where a text goes on."""
        eos = self._tokenizer.eos_token_id
        end = len(text.text)
        if text.ends and eos is not None and (not len(ids) or ids[-1] != eos):
            ids, offsets = np.append(ids, np.int32(eos)), np.append(offsets, [[end, end]], axis=0)
        if not (text.begins and text.ends):
            added = offsets[:, 0] == offsets[:, 1]
            inner = np.flatnonzero(~added)
            first = 0 if text.begins or not len(inner) else inner[0]
            last = len(ids) if text.ends or not len(inner) else inner[-1] + 1
            ids, offsets = ids[first:last], offsets[first:last]
        return ids, offsets

    def _encode_between(self, text: Text) -> tuple[np.ndarray, np.ndarray]:
        """Encode a template's text: its own special tokens as such, those that messages spell as text."""
        if self.specials is None:
            raise ValueError("a text has spelled special tokens, but the tokenizer has none")
        ids, offsets = [], []
        for begin, end, special in pieces(text.text, text.spelled, self.specials):
            piece = text.text[begin:end]
            if special:
                ids.append(np.array([self._tokenizer.convert_tokens_to_ids(piece)], np.int32))
                offsets.append(np.array([[begin, end]], np.int64))
            else:
                (found,), (where,) = self._call([piece], special=False, split=True)
                ids.append(found)
                offsets.append(where + begin)
        return np.concatenate(ids), np.concatenate(offsets)


def cut(text: Text, ids: np.ndarray, offsets: np.ndarray, max_length: int) -> tuple[list[Piece], bool]:
    """Cut a text into documents of at most `max_length` tokens; also return whether it was truncated.

    A text that is trained on as a whole is split so that each document begins with the last token of the
    previous one: every token is then predicted once. Other texts are truncated.

    Args:
        text: the text.
        ids: its token ids, `(l,)`.
        offsets: characters of each token, `(l, 2)`.
        max_length: tokens per document.
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
        pieces.append(Piece(ids[here], trained[here], sum(len(span.encode()) for span in spans)))
    return pieces, not text.whole and len(ids) > max_length
