"""Special tokens in chats: those that a template writes are tokens, those that a message spells are text.

Marks go around the spellings in the messages before they are rendered; the rendered text tells both apart.

>>> pattern = re.compile("<end>")
>>> rendered = "user: " + marked("what is <end>?", pattern) + "<end>"
>>> text, spelled, _ = unmarked(rendered)
>>> text, spelled
('user: what is <end>?<end>', [(14, 19)])
>>> [text[begin:end] for begin, end, special in pieces(text, spelled, pattern) if special]
['<end>']
"""

import bisect
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

Span: TypeAlias = tuple[int, int]

_OPEN, _CLOSE = "\ufdd0", "\ufdd1"  # noncharacters of Unicode


class Unmarked(NamedTuple):
    """A rendered text without marks."""

    text: str
    spelled: list[Span]
    """Spans of the special tokens that messages spell."""
    spans: list[Span]
    """The given spans, moved."""


def special_pattern(tokenizer: Any) -> re.Pattern[str] | None:
    """Return the pattern of the spellings of a tokenizer's special tokens; None without any."""
    added = tokenizer.added_tokens_decoder.values()
    names = sorted((token.content for token in added if token.special), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, names))) if names else None


def marked(value: Any, pattern: re.Pattern[str] | None) -> Any:
    """Put marks around the special tokens that strings in `value` spell, at every depth.

    Raises:
        ValueError: a string holds the marks.
    """
    if isinstance(value, str):
        if _OPEN in value or _CLOSE in value:
            raise ValueError("holds U+FDD0 or U+FDD1, which are no characters")
        return pattern.sub(f"{_OPEN}\\g<0>{_CLOSE}", value) if pattern else value
    if isinstance(value, Mapping):
        return {name: marked(held, pattern) for name, held in value.items()}
    return [marked(held, pattern) for held in value] if isinstance(value, list) else value


def unmarked(text: str, spans: Sequence[Span] = ()) -> Unmarked:
    """Remove the marks from a text, and move spans of it along."""
    if _OPEN not in text:
        return Unmarked(text, [], list(spans))
    marks = [match.start() for match in re.finditer(f"[{_OPEN}{_CLOSE}]", text)]

    def moved(span: Span) -> Span:
        begin, end = (position - bisect.bisect_left(marks, position) for position in span)
        return begin, end

    spelled = [moved(pair.span()) for pair in re.finditer(f"{_OPEN}([^{_CLOSE}]*){_CLOSE}", text)]
    return Unmarked(re.sub(f"[{_OPEN}{_CLOSE}]", "", text), spelled, [moved(span) for span in spans])


def pieces(text: str, spelled: Sequence[Span], pattern: re.Pattern[str]) -> Iterator[tuple[int, int, bool]]:
    """Yield the spans of a text's special tokens and of what is between them: begin, end, whether special."""
    begin = 0
    for match in pattern.finditer(text):
        if any(match.start() < last and first < match.end() for first, last in spelled):
            continue
        if match.start() > begin:
            yield begin, match.start(), False
        yield *match.span(), True
        begin = match.end()
    if len(text) > begin:
        yield begin, len(text), False
