"""Rendering of conversations by the tokenizer's chat template, with the spans of the assistant's turns."""

import json
import re
from collections.abc import Mapping
from typing import Any

from mamba2_jax.special_tokens import marked, unmarked
from mamba2_jax.training.data.records import Record, Text, Unusable, name_of, parsed

# Roles of ShareGPT and its relatives, in the words of chat templates.
_ROLES = {
    "human": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant", "model": "assistant",
    "function_call": "assistant", "observation": "tool", "function_response": "tool",
}  # fmt: skip


class _Unfit(Exception):
    """A conversation that cannot be rendered; the message is the reason."""


class Chats:
    """Renderer of conversations.

    Args:
        tokenizer: a tokenizer of transformers; without a chat template, conversations raise.
        options: variables for the template.
        specials: pattern of the special tokens, to be read as text where a message spells one; or None.
    """

    def __init__(self, tokenizer: Any, options: Mapping[str, Any], specials: re.Pattern[str] | None = None):
        self._tokenizer, self._options, self._specials = tokenizer, options, specials
        self.template = getattr(tokenizer, "chat_template", None)

    def text_of(self, record: Record, messages: Any, field: str, trained_from: int = 0) -> Text | Unusable:
        """Render a conversation; the spans are what each turn of the assistant adds to its prompt.

        Turns of `weight` 0 are not trained on. The record's `tools`, `documents` and `chat_template_kwargs`
        are passed to the template.

        Args:
            record: holds the conversation.
            messages: list of dicts `role`, `content`, or `from`, `value`.
            field: name of the field, for messages.
            trained_from: index of the first message that may be trained on.

        Raises:
            ValueError: the tokenizer has no chat template.
        """
        where = record.where
        if self.template is None:
            raise ValueError(
                f"{where}: holds {field!r}, and the tokenizer has no chat template; name one with "
                "data.chat_template (--data.chat-template FILE), or write the conversations as 'prompt' and "
                "'completion'"
            )
        try:
            variables = self._variables(record)
            turns = _turns(messages, field, record)
            trained = [i for i, turn in enumerate(turns) if _is_trained(turn, i) and i >= trained_from]
            turns = [{name: turn[name] for name in turn if name != "weight"} for turn in turns]
            turns = [{**self._marked(turn), "role": turn["role"]} for turn in turns]
            turns, text = self._render_whole(turns, variables)
            spans = self._spans(turns, text, trained, variables)
        except _Unfit as error:
            return Unusable(where, str(error))
        except Exception as error:  # templates are programs and can raise anything
            reason = f"{field!r} does not fit the chat template ({type(error).__name__}: {error})"
            return Unusable(where, reason[:500])
        if not any(text[begin:end].strip() for begin, end in spans):
            return Unusable(where, f"{field!r} has no turn of the assistant to train on")
        text, spelled, spans = unmarked(text, spans)
        spans, spelled = tuple(spans), tuple(spelled)
        return Text(text, spans, where, special_tokens=False, spelled=spelled, kind=field)

    def _variables(self, record: Record) -> dict[str, Any]:
        fields = record.fields
        found = dict(self._options)
        for name in ("tools", "documents"):
            value = parsed(fields.get(name))
            if value:
                if not isinstance(value, list):
                    raise _Unfit(f"{name!r} is {name_of(value)}, not a list")
                found[name] = self._marked(_without_none(value) if record.filled else value)
        extra = parsed(fields.get("chat_template_kwargs"))
        if extra:
            if not isinstance(extra, Mapping):
                raise _Unfit(f"'chat_template_kwargs' is {name_of(extra)}, not an object")
            found |= self._marked({name: value for name, value in extra.items() if value is not None})
        return found

    def _marked(self, value: Any) -> Any:
        try:
            return marked(value, self._specials)
        except ValueError as error:
            raise _Unfit(str(error)) from None

    def _render(self, turns: list[dict[str, Any]], variables: Mapping[str, Any], prompt: bool = False) -> str:
        return self._tokenizer.apply_chat_template(
            turns, tokenize=False, add_generation_prompt=prompt, **variables
        )

    def _render_whole(self, turns: list[dict[str, Any]], variables: Mapping[str, Any]) -> tuple[list, str]:
        """Render all turns; also return them as rendered, since templates differ in what calls need.

        Beside `tool_calls`, some templates want no content, others an empty one: the first that raises
        nothing, writes no "None", and writes every call, is taken.
        """
        if all(turn["content"] is not None for turn in turns):
            return turns, self._checked(turns, self._render(turns, variables))
        empty = [{**turn, "content": turn["content"] or ""} for turn in turns]
        absent = [{k: v for k, v in turn.items() if k != "content" or v is not None} for turn in turns]
        failure: Exception | None = None
        nones = json.dumps([turns, variables], default=str).count("None")
        for candidate in (turns, absent, empty):
            try:
                text = self._checked(candidate, self._render(candidate, variables))
            except Exception as error:  # templates are programs and can raise anything
                failure = error
                continue
            if text.count("None") <= nones or candidate is empty:
                return candidate, text
        raise failure or _Unfit("the chat template writes None for an absent content")

    def _checked(self, turns: list[dict[str, Any]], text: str) -> str:
        for number, turn in enumerate(turns, start=1):
            for call in turn.get("tool_calls") or []:
                name = call.get("function", call).get("name")
                if not isinstance(name, str) or name not in text:
                    raise _Unfit(f"the chat template does not write the call of {name!r} in message {number}")
        return text

    def _spans(self, turns: list, text: str, trained: list[int], variables: Mapping) -> list[tuple[int, int]]:
        spans = []
        for i in trained:
            after = self._render(turns[: i + 1], variables)
            begin = len(self._render(turns[:i], variables, prompt=True)) if i else 0
            if not i:  # no prompt can be rendered before the first message
                begin = self._begin_of_first(turns, text, after, variables)
            elif not after.startswith(self._render(turns[:i], variables, prompt=True)):
                begin = -1
            if begin < 0 or not text.startswith(after):
                raise _Unfit("the chat template changes earlier turns when later ones come")
            spans.append((begin, len(after)))
        return spans

    def _begin_of_first(self, turns: list, text: str, after: str, variables: Mapping) -> int:
        """Find where the assistant's text begins in a first message: behind what prompts for a turn."""
        prompted = self._render(turns, variables, prompt=True)
        prompt = prompted[len(text) :] if prompted.startswith(text) else ""
        content = after.rfind((turns[0].get("content") or "").strip())
        begin = after.rfind(prompt, 0, content) if content > 0 else after.find(prompt)
        return begin + len(prompt) if prompt and begin >= 0 else max(content, 0)


def _turns(messages: Any, field: str, record: Record) -> list[dict[str, Any]]:
    """Return the messages as dicts with `role` and `content`, which is None beside `tool_calls` only."""
    if not isinstance(messages, list):
        raise _Unfit(f"{field!r} is {name_of(messages)}, not a list of messages")
    turns = []
    system = record.fields.get("system")
    if isinstance(system, str) and system and field.startswith("conversation"):
        turns.append({"role": "system", "content": system})
    for number, message in enumerate(messages, start=1):
        if not isinstance(message, Mapping):
            raise _Unfit(f"message {number} is {name_of(message)}, not an object")
        turn = {name: value for name, value in message.items() if value is not None}
        if record.filled:
            turn = _without_none(turn)
        role = turn.pop("from", None) if "role" not in turn else turn["role"]
        if not isinstance(role, str):
            raise _Unfit(f"message {number} has no 'role'")
        if "content" not in turn:
            turn["content"] = turn.pop("value", None)
        if "tool_calls" in turn:
            turn["tool_calls"] = _calls(turn["tool_calls"], number)
        elif role == "function_call":
            turn |= {"tool_calls": _calls(turn["content"], number), "content": None}
        turn["content"] = _content(turn, number)
        turns.append({"role": _ROLES.get(role, role), **{k: v for k, v in turn.items() if k != "role"}})
    return turns


def _calls(calls: Any, number: int) -> list[dict[str, Any]]:
    """Return tool calls as objects, with arguments written as JSON text parsed: templates write JSON."""
    calls = parsed(calls)
    calls = [calls] if isinstance(calls, Mapping) else calls
    if not isinstance(calls, list) or not all(isinstance(call, Mapping) for call in calls):
        raise _Unfit(f"message {number} has tool calls that are no list of objects")
    found = []
    for call in calls:
        function = call.get("function", call)
        if not isinstance(function, Mapping):
            raise _Unfit(f"message {number} has a tool call whose 'function' is {name_of(function)}")
        function = {**function, "arguments": parsed(function.get("arguments", {}))}
        rest = (
            {name: value for name, value in call.items() if name != "function"} if "function" in call else {}
        )
        found.append({"type": "function", **rest, "function": function})
    return found


def _content(turn: Mapping[str, Any], number: int) -> str | None:
    content = turn["content"]
    if isinstance(content, list):  # parts, as of models that see images
        texts = [part.get("text") for part in content if isinstance(part, Mapping)]
        texts = [text for text in texts if isinstance(text, str)]
        if len(texts) < len(content):
            raise _Unfit(f"message {number} has parts that are no text, e.g. images")
        return "".join(texts)
    if content is None and turn.get("tool_calls"):
        return None
    if not isinstance(content, str):
        raise _Unfit(f"message {number} has content that is {name_of(content)}, not a string")
    return content


def _is_trained(turn: Mapping[str, Any], index: int) -> bool:
    weight = turn.get("weight", 1)
    if weight not in (0, 1):
        raise _Unfit(f"message {index + 1} has weight {weight!r}; only 0 and 1 are known")
    return turn["role"] == "assistant" and bool(weight)


def _without_none(value: Any) -> Any:
    """Remove fields that are None, which Arrow fills in for absent ones, at every depth."""
    if isinstance(value, Mapping):
        return {name: _without_none(held) for name, held in value.items() if held is not None}
    return [_without_none(held) for held in value] if isinstance(value, list) else value
