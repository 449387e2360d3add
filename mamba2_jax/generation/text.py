"""Text from tokens one at a time: whole characters, stop strings, and the token ids of a prompt."""

from collections.abc import Mapping, Sequence
from typing import Any

from mamba2_jax.special_tokens import Span, marked, pieces, special_pattern, unmarked

REPLACEMENT = "\ufffd"  # decoded from an incomplete character


def prompt_tokens(tokenizer: Any, prompt: str, *, goes_on: bool) -> list[int]:
    """Tokenize a prompt, with one bos token if the tokenizer begins texts with one.

    No special token is added to a text that goes on from a state, or that begins with the bos token itself,
    as chat templates write it.
    """
    bos = getattr(tokenizer, "bos_token", None)
    begun = goes_on or (bos is not None and prompt.startswith(bos))
    return tokenizer(prompt, add_special_tokens=not begun)["input_ids"]


def render_chat(
    tokenizer: Any, messages: Sequence[Mapping[str, str]], template: str | None = None
) -> tuple[str, list[Span]]:
    """Render messages, up to where an answer begins, by a chat template; None: the tokenizer's.

    Returns:
        The text, and the spans of the special tokens in it that messages spell.

    Raises:
        ValueError: no template, or one that refuses the messages.
    """
    from jinja2 import TemplateError

    template = template or tokenizer.chat_template
    if not template:
        raise ValueError("the tokenizer has no chat template; give chat_template")
    pattern = special_pattern(tokenizer)
    try:
        contents = [{**message, "content": marked(message["content"], pattern)} for message in messages]
    except ValueError as error:
        raise ValueError(f"a message {error}") from None
    try:
        rendered = tokenizer.apply_chat_template(
            contents, chat_template=template, tokenize=False, add_generation_prompt=True
        )
    except TemplateError as error:
        raise ValueError(f"the chat template refuses the messages: {error}") from error
    text, spelled, _ = unmarked(rendered)
    return text, spelled


def rendered_tokens(tokenizer: Any, text: str, spelled: Sequence[Span]) -> list[int]:
    """Tokenize what `render_chat` returns: special tokens that messages spell become ordinary ones."""
    if not spelled:
        return tokenizer(text, add_special_tokens=False)["input_ids"]
    pattern = special_pattern(tokenizer)
    if pattern is None:
        raise ValueError("a text has spelled special tokens, but the tokenizer has none")
    ids = []
    for begin, end, special in pieces(text, spelled, pattern):
        piece = text[begin:end]
        if special:
            ids.append(tokenizer.convert_tokens_to_ids(piece))
        else:
            ids += tokenizer(piece, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    return ids


def text_after(tokenizer: Any, prompt: Sequence[int], tokens: Sequence[int], *, special: bool) -> str:
    """Decode tokens as the continuation of a prompt, with or without special tokens."""
    before, whole = (
        tokenizer.decode(ids, skip_special_tokens=not special, clean_up_tokenization_spaces=False)
        for ids in ([*prompt], [*prompt, *tokens])
    )
    return whole[len(before) :]


class IncrementalDecoder:
    """Incremental detokenizer: takes one token at a time, returns text in whole characters.

    Decodes the tokens of the last returned text again together with the new ones: tokenizers treat the first
    token of a text differently, and bytes decode only from the start of a character.

    Args:
        tokenizer: with `decode`.
        prompt_ids: tokens of the prompt, as context of the first new token.
    """

    def __init__(self, tokenizer, prompt_ids: Sequence[int] = ()):
        self._tokenizer = tokenizer
        self._told: list[int] = []  # tokens of the last returned text
        self._new: list[int] = list(prompt_ids)  # tokens whose text is not returned yet
        self.flush()

    def push(self, token: int) -> str:
        """Add a token; return the text that is complete now, possibly empty."""
        self._new.append(token)
        if self._decode(self._told + self._new).endswith(REPLACEMENT):
            return ""  # an incomplete character, or invalid bytes
        return self.flush()

    def flush(self) -> str:
        """Return all text that is still held back, complete characters or not."""
        piece = self._decode(self._told + self._new)[len(self._decode(self._told)) :]
        if piece:
            self._told, self._new = self._new, []
        return piece

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def first_stop(text: str, stop: tuple[str, ...]) -> int | None:
    """Return the start index of the stop string that ends first in `text`; None without any."""
    places = [(text.find(s) + len(s), text.find(s)) for s in stop if s in text]
    return min(places)[1] if places else None


def possible_stop(text: str, stop: tuple[str, ...]) -> int:
    """Return the length of the longest suffix of `text` that is a proper prefix of a stop string."""
    longest = 0
    for s in stop:
        for size in range(min(len(s) - 1, len(text)), longest, -1):
            if text.endswith(s[:size]):
                longest = size
                break
    return longest
