"""Reading of JSON files, which hold lines, an array or objects over several lines, in bounded memory."""

import codecs
import itertools
import json
import pathlib
from collections.abc import Iterator
from typing import Any

from mamba2_jax.training.data.records import Record, Unusable

_BLOCK = 1 << 20


def read_json(file: Any, path: pathlib.Path) -> Iterator[Record | Unusable]:
    """Yield the records of a file of JSON lines, of an array, or of objects written over several lines.

    Args:
        file: binary stream of UTF-8.
        path: its file, for messages.
    """
    number, first = 0, b"\n"
    while first and not first.strip():
        number, first = number + 1, file.readline(_BLOCK)  # an array on one line may be larger than memory
    array = first.lstrip().startswith(b"[")
    if not array and not first.endswith(b"\n"):
        first += file.readline()
    if not array and _parses(first):
        yield from _read_lines(first, number, file, path)
        return
    values = _Values(first, file)
    try:
        for index, value in enumerate(values, start=1):
            yield from _unwrapped(value, f"{path}[{index}]" if array else f"{path}: record {index}")
    except (ValueError, RecursionError) as error:
        if array or values.count:
            reason = f"is not JSON from there on ({_reason(error)})"
            yield Unusable(f"{path}: after record {values.count}", reason, ends=True)
        else:  # of JSON lines, the first may be broken
            yield from _read_lines(values.seen, number, file, path)


def _parses(line: bytes) -> bool:
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True


def _reason(error: Exception) -> str:
    return str(error) or "it is nested too deeply"


def _read_lines(seen: bytes, number: int, file: Any, path: pathlib.Path) -> Iterator[Record | Unusable]:
    """Read JSON lines; blank lines hold no record.

    Args:
        seen: what has been read of the file, from line `number` on.
        number: line number of the first line in `seen`.
        file: the rest.
        path: the file, for messages.
    """
    *lines, tail = seen.split(b"\n")
    for index, line in enumerate(itertools.chain(lines, [tail + file.readline()], file)):
        if not line.strip():
            continue
        where = f"{path}:{number + index}"
        try:
            record = json.loads(line.decode("utf-8"))
        except UnicodeDecodeError as error:
            yield Unusable(where, f"is not UTF-8 (byte {error.start} of the line)")
        except (ValueError, RecursionError) as error:
            yield Unusable(where, f"is not JSON ({_reason(error)})")
        else:
            yield Record(where, record)


class _Values:
    """Iterator over JSON values that follow each other, or are the elements of one array, in bounded memory.

    Args:
        seen: the beginning of the stream.
        file: its rest.
    """

    def __init__(self, seen: bytes, file: Any):
        self._file, self._decoder = file, json.JSONDecoder()
        self._utf8 = codecs.getincrementaldecoder("utf-8")()
        self._text, self._at, self._ended = self._utf8.decode(seen), 0, False
        self.seen = seen
        """Bytes read before the first value was complete."""
        self.count = 0
        self._in_array = False

    def __iter__(self) -> Iterator[Any]:
        while self._skip_space():
            letter = self._text[self._at]
            if letter == "[" and not self._in_array and not self.count:
                self._in_array = True
                self._at += 1
            elif letter == "]" and self._in_array:
                self._at += 1
                if self._skip_space():
                    raise ValueError("text follows the end of the array")
                return
            elif letter == "," and self._in_array and self.count:
                self._at += 1
            else:
                value = self._next_value()
                self.count += 1
                yield value
        if self._in_array:
            raise ValueError("the array has no end")

    def _skip_space(self) -> bool:
        """Move to the next character that is not a space; return False at the end of the file."""
        while True:
            while self._at < len(self._text) and self._text[self._at].isspace():
                self._at += 1
            if self._at < len(self._text):
                return True
            if not self._more():
                return False

    def _next_value(self) -> Any:
        while True:
            try:
                value, end = self._decoder.raw_decode(self._text, self._at)
            except json.JSONDecodeError as error:
                cut = error.msg.startswith("Unterminated") or error.pos >= len(self._text) - 10
                if not (cut and self._more()):
                    raise
                continue
            if end == len(self._text) and not isinstance(value, dict | list | str) and self._more():
                continue  # a number that goes on in the next block
            self._at = end
            return value

    def _more(self) -> bool:
        """Read on, by as much as is held already, so that a long value is parsed a few times only."""
        if self._ended:
            return False
        self._text, self._at = self._text[self._at :], 0
        data = self._file.read(max(_BLOCK, len(self._text)))
        if not self.count:
            self.seen += data
        self._ended = not data
        self._text += self._utf8.decode(data, final=self._ended)
        return True


def _unwrapped(value: Any, where: str) -> Iterator[Record | Unusable]:
    """Yield a value as a record, or the records in the one list of objects of `{"data": [...]}`."""
    if isinstance(value, dict):
        lists = [name for name, held in value.items() if isinstance(held, list) and held]
        inner = [name for name in lists if all(isinstance(item, dict) for item in value[name])]
        if len(inner) == 1 and inner[0] in ("data", "train", "rows", "records", "examples"):
            for number, item in enumerate(value[inner[0]], start=1):
                yield Record(f"{where}: {inner[0]}[{number}]", item)
            return
    yield Record(where, value)
