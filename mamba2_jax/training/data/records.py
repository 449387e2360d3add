"""Conversion of records into texts with the character spans to train on.

A record is one of

    {"text": "..."}                                          trains on the whole text
    {"prompt": "...", "completion": "..."}                   trains on the completion only
    {"messages": [{"role": "user", "content": "..."}, ...]}  trains on the assistant's turns only
    {"prompt": [messages], "completion": [messages]}         on the assistant's turns of the completion
    {"conversations": [{"from": "human", "value": "..."}]}   as messages (ShareGPT)
    {"instruction": "...", "input": "...", "output": "..."}  trains on the output only (Alpaca): as messages,
                                                             or in Alpaca's words without a chat template
"""

import dataclasses
import json
import pathlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mamba2_jax.training.data.chats import Chats

Source = str | pathlib.Path | Mapping[str, Any]

_FIELDS = ("messages", "conversations", "prompt", "completion", "instruction", "output")
_NAMES = {
    str: "a string", bool: "a boolean", int: "a number", float: "a number", list: "a list", dict: "an object",
    type(None): "null", bytes: "bytes",
}  # fmt: skip
_ALPACA = (
    "Below is an instruction that describes a task{paired}. Write a response that appropriately completes "
    "the request.\n\n### Instruction:\n{instruction}\n\n{context}### Response:\n"
)


@dataclasses.dataclass(frozen=True)
class Record:
    """One record as stored."""

    where: str
    """Source of the record, e.g. file and line, for messages."""
    fields: Any
    filled: bool = False
    """Whether the storage fills absent fields with None, as Arrow does."""


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
    spelled: tuple[tuple[int, int], ...] = ()
    """In the text of a chat template, offsets of special tokens that a message spells: they are text."""
    begins: bool = True
    ends: bool = True
    """Whether a plain text begins and ends here; a large file is read as several texts."""
    kind: str = "text"
    """Fields that the text was made of, for the report."""

    @property
    def whole(self) -> bool:
        """Whether the whole text is trained on, so that it may be split anywhere."""
        return self.spans == ((0, len(self.text)),)


@dataclasses.dataclass(frozen=True)
class Unusable:
    """Record that cannot be trained on, with the reason."""

    where: str
    reason: str
    ends: bool = False
    """Whether the rest of the file could not be read either."""

    def __str__(self) -> str:
        return f"{self.where}: {self.reason}"


def text_of(record: Record, chats: "Chats", text_field: str) -> Text | Unusable:
    """Convert a record to a `Text` or `Unusable` by the fields it has.

    Raises:
        ValueError: the record is a conversation, but the tokenizer has no chat template.
    """
    found = _convert(record, chats, text_field)
    if isinstance(found, Text):
        try:
            found.text.encode()
        except UnicodeEncodeError as error:
            code = f"\\u{ord(found.text[error.start]):04x}"
            return Unusable(
                record.where, f"holds {code}, half of a surrogate pair, at character {error.start}"
            )
    return found


def _convert(record: Record, chats: "Chats", text_field: str) -> Text | Unusable:
    fields, where = record.fields, record.where
    if not isinstance(fields, Mapping):
        return Unusable(where, f"is {name_of(fields)}, not an object with fields")
    has = {name for name, value in fields.items() if value is not None}
    if text_field in has:
        return _plain(fields[text_field], text_field, where)
    if {"prompt", "completion"} <= has:
        prompt, completion = fields["prompt"], fields["completion"]
        if isinstance(prompt, list) and isinstance(completion, list):
            return chats.text_of(record, [*prompt, *completion], "completion", trained_from=len(prompt))
        return _completion(prompt, completion, ("prompt", "completion"), where)
    for name in ("messages", "conversations", "conversation"):
        if name in has:
            return chats.text_of(record, fields[name], name)
    if {"instruction", "output"} <= has:
        return _alpaca(record, chats)
    null = [name for name in (text_field, *_FIELDS) if name in fields.keys() - has]
    if null:
        return Unusable(where, f"{null[0]!r} is null")
    names = ", ".join(map(repr, fields)) or "none"
    return Unusable(
        where,
        f"has the fields {names[:300]}; wants {text_field!r}, 'prompt' with 'completion', 'messages', "
        "'conversations', or 'instruction' with 'output'",
    )


def name_of(value: Any) -> str:
    """Return the JSON name of a value's type, e.g. "a number"."""
    return _NAMES.get(type(value), f"a {type(value).__name__}")


def _plain(text: Any, field: str, where: str) -> Text | Unusable:
    if not isinstance(text, str):
        return Unusable(where, f"{field!r} is {name_of(text)}, not a string")
    return Text(text, ((0, len(text)),), where) if text.strip() else Unusable(where, "is empty")


def _completion(prompt: Any, completion: Any, names: tuple[str, str], where: str) -> Text | Unusable:
    for name, value in zip(names, (prompt, completion), strict=True):
        if not isinstance(value, str):
            return Unusable(where, f"{name!r} is {name_of(value)}, not a string")
    if not completion.strip():
        return Unusable(where, f"{names[1]!r} is empty")
    text = prompt + completion
    return Text(text, ((len(prompt), len(text)),), where, kind=" and ".join(names))


def _alpaca(record: Record, chats: "Chats") -> Text | Unusable:
    fields, where = record.fields, record.where
    names = ("instruction", "input", "output", "system")
    values = {name: "" if fields.get(name) is None else fields[name] for name in names}
    for name, value in values.items():
        if not isinstance(value, str):
            return Unusable(where, f"{name!r} is {name_of(value)}, not a string")
    instruction, given, output, _ = values.values()
    if not output.strip():
        return Unusable(where, "'output' is empty")
    if chats.template is None:
        if values["system"] or fields.get("history"):
            return Unusable(where, "has a 'system' or 'history', which needs a chat template")
        context = f"### Input:\n{given}\n\n" if given else ""
        paired = ", paired with an input that provides further context" if given else ""
        prompt = _ALPACA.format(paired=paired, instruction=instruction, context=context)
        return _completion(prompt, output, ("instruction", "output"), where)
    messages = [{"role": "system", "content": values["system"]}] if values["system"] else []
    history = fields.get("history") or []
    if not isinstance(history, list) or not all(
        isinstance(pair, list) and len(pair) == 2 for pair in history
    ):
        return Unusable(where, "'history' is not a list of pairs of strings")
    question = f"{instruction}\n\n{given}" if given else instruction
    for asked, answer in (*history, (question, output)):
        messages += [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]
    return chats.text_of(record, messages, "instruction and output")


def parsed(value: Any) -> Any:
    """Return the value that a JSON string holds; anything else unchanged."""
    if isinstance(value, str):
        try:
            return json.loads(value)
        except ValueError:
            pass
    return value
