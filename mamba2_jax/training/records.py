"""Reading of files, hub datasets and Python records into texts with the character spans to train on.

A record is one of

    {"text": "..."}                                          trains on the whole text
    {"prompt": "...", "completion": "..."}                   trains on the completion only
    {"messages": [{"role": "user", "content": "..."}, ...]}  trains on the assistant's turns only
"""

import dataclasses
import json
import pathlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from mamba2_jax.files import first_line

JSON_LINES = (".jsonl", ".ndjson", ".json")
PARQUET = (".parquet",)

Source = str | pathlib.Path | Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Text:
    """Text of one record, with the spans to train on."""

    text: str
    spans: tuple[tuple[int, int], ...]
    """Character offsets (begin, end) of the parts to train on."""
    where: str
    """Source of the record, e.g. file and line, for messages."""
    special_tokens: bool = True
    """Whether the tokenizer adds its special tokens and an eos; False if a chat template wrote them."""

    @property
    def whole(self) -> bool:
        """Whether the whole text is trained on, so that it may be split anywhere."""
        return self.spans == ((0, len(self.text)),)


@dataclasses.dataclass(frozen=True)
class Unusable:
    """Record that cannot be trained on, with the reason."""

    where: str
    reason: str

    def __str__(self) -> str:
        return f"{self.where}: {self.reason}"


def read_texts(
    sources: Iterable[Source], tokenizer: Any = None, *, text_field: str = "text", split: str = "train"
) -> Iterator[Text | Unusable]:
    """Yield the texts of all records of all sources, in order.

    Args:
        sources: files (JSON lines, Parquet, all others plain text), folders of files, ids of hub datasets,
            or records as dicts; pass a plain string as `{"text": ...}`.
        tokenizer: with a chat template, for `messages`.
        text_field: field that holds the text of plain records.
        split: split of hub datasets.

    Yields:
        `Text`, or `Unusable` with the reason.

    Raises:
        FileNotFoundError: a source that is neither a file, a folder, nor a hub dataset.
        ValueError: a record has `messages`, but the tokenizer has no chat template.
    """
    for number, source in enumerate(sources, start=1):
        if isinstance(source, Mapping):
            yield _text_of(source, f"record {number}", tokenizer, text_field)
            continue
        path = pathlib.Path(source).expanduser()
        if path.is_dir():
            files = sorted(file for file in path.rglob("*") if file.is_file() and not _hidden(file, path))
            for file in files:
                yield from _read_file(file, tokenizer, text_field)
        elif path.exists():
            yield from _read_file(path, tokenizer, text_field)
        else:
            yield from _read_hub(str(source), tokenizer, text_field, split)


def _hidden(file: pathlib.Path, folder: pathlib.Path) -> bool:
    return any(part.startswith(".") for part in file.relative_to(folder).parts)


def _read_file(path: pathlib.Path, tokenizer: Any, text_field: str) -> Iterator[Text | Unusable]:
    suffix = path.suffix.lower()
    if suffix in JSON_LINES:
        yield from _read_json_lines(path, tokenizer, text_field)
    elif suffix in PARQUET:
        for number, record in enumerate(_parquet_rows(path), start=1):
            yield _text_of(record, f"{path}:{number}", tokenizer, text_field)
    else:
        try:
            text = path.read_bytes().decode("utf-8")
        except UnicodeDecodeError as error:
            yield Unusable(str(path), f"is not UTF-8 (byte {error.start})")
            return
        yield _text_of({"text": text}, str(path), tokenizer, "text")


def _read_json_lines(path: pathlib.Path, tokenizer: Any, text_field: str) -> Iterator[Text | Unusable]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            where = f"{path}:{number}"
            try:
                record = json.loads(line.decode("utf-8"))
            except UnicodeDecodeError as error:
                yield Unusable(where, f"is not UTF-8 (byte {error.start} of the line)")
            except (ValueError, RecursionError) as error:
                yield Unusable(where, f"is not JSON ({error})" if line.strip() else "is empty")
            else:
                yield _text_of(record, where, tokenizer, text_field)


def _parquet_rows(path: pathlib.Path) -> Iterator[dict[str, Any]]:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError as error:
        raise _missing(f"{path}: reading Parquet") from error
    try:
        with parquet.ParquetFile(path) as file:
            for rows in file.iter_batches():
                yield from rows.to_pylist()
    except (ArrowException, OSError) as error:
        raise ValueError(f"{path}: cannot be read as Parquet ({error})") from error


def _read_hub(name: str, tokenizer: Any, text_field: str, split: str) -> Iterator[Text | Unusable]:
    if name.startswith((".", "/", "~")) or name.count("/") > 1 or pathlib.Path(name).suffix:
        raise FileNotFoundError(f"{name}: no such file or folder")
    try:
        import datasets
    except ImportError as error:
        raise _missing(f"{name}: no file or folder of that name; reading a dataset of the hub") from error
    try:
        rows = datasets.load_dataset(name, split=split)
    except (OSError, ValueError) as error:
        reason = first_line(error)
        raise FileNotFoundError(
            f"{name}: no file or folder of that name here, and the Hugging Face hub did not give its split "
            f"{split!r} ({type(error).__name__}: {reason})"
        ) from error
    for number, record in enumerate(rows):
        yield _text_of(record, f"{name}[{number}]", tokenizer, text_field)


def _missing(what: str) -> ImportError:
    return ImportError(f"{what} needs the extra 'train': pip install 'mamba2-jax-flax[train]'")


def _text_of(record: Any, where: str, tokenizer: Any, text_field: str) -> Text | Unusable:
    """Convert a record to a `Text` or `Unusable` by the fields it has."""
    if not isinstance(record, Mapping):
        return Unusable(where, f"is a {type(record).__name__}, not an object with fields")
    if record.get(text_field) is not None:
        text = record[text_field]
        if not isinstance(text, str):
            return Unusable(where, f"{text_field!r} is not a string")
        return Text(text, ((0, len(text)),), where) if text.strip() else Unusable(where, "is empty")
    if record.get("prompt") is not None and record.get("completion") is not None:
        prompt, completion = record["prompt"], record["completion"]
        if not isinstance(prompt, str) or not isinstance(completion, str):
            return Unusable(where, "'prompt' or 'completion' is not a string")
        text = prompt + completion
        span = (len(prompt), len(text))
        return Text(text, (span,), where) if completion.strip() else Unusable(where, "'completion' is empty")
    if record.get("messages") is not None:
        return _conversation(record["messages"], where, tokenizer)
    fields = ", ".join(map(repr, record)) or "none"
    wanted = f"{text_field!r}, 'prompt' with 'completion', or 'messages'"
    return Unusable(where, f"has the fields {fields}; wants {wanted}")


def _conversation(messages: Any, where: str, tokenizer: Any) -> Text | Unusable:
    """Render a chat by the tokenizer's template; the spans are the characters each assistant turn adds."""
    if getattr(tokenizer, "chat_template", None) is None:
        raise ValueError(
            f"{where}: holds 'messages', and the tokenizer has no chat template; set its chat_template, or "
            "write the conversations as 'prompt' and 'completion'"
        )
    try:
        turns = [dict(message) for message in messages]
        roles = [turn["role"] for turn in turns]
        text = tokenizer.apply_chat_template(turns, tokenize=False)
        spans = []
        for i, role in enumerate(roles):
            if role != "assistant":
                continue
            before = tokenizer.apply_chat_template(turns[:i], tokenize=False, add_generation_prompt=True)
            after = tokenizer.apply_chat_template(turns[: i + 1], tokenize=False)
            if not (after.startswith(before) and text.startswith(after)):
                return Unusable(where, "the chat template changes earlier turns when later ones come")
            spans.append((len(before), len(after)))
    except Exception as error:  # templates are programs and can raise anything
        return Unusable(where, f"'messages' do not fit the chat template ({type(error).__name__}: {error})")
    if not any(text[begin:end].strip() for begin, end in spans):
        return Unusable(where, "'messages' has no turn of the assistant")
    return Text(text, tuple(spans), where, special_tokens=False)
