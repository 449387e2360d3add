"""A chat whose history is a state: each turn reads only what is new, and what was read can be saved.

>>> from mamba2_jax import Mamba2ForCausalLM, load_tokenizer
>>> template = "{% for m in messages %}# {{ m.role }}: {{ m.content }}\\n{% endfor %}# assistant:"
>>> chat = Conversation(Mamba2ForCausalLM.from_pretrained(), load_tokenizer(), chat_template=template)
>>> answer = "".join(chat.say("import os", max_new_tokens=4))
>>> [message["role"] for message in chat.messages]
['user', 'assistant']
"""

import json
import os
from collections.abc import Sequence
from typing import Any, NamedTuple

from mamba2_jax.generation.drafts import Draft, DraftState, draft_state_of
from mamba2_jax.generation.streaming import TextStream, start_streams, stream_options
from mamba2_jax.generation.text import render_chat, rendered_tokens, text_after
from mamba2_jax.models.cache import Mamba2Cache
from mamba2_jax.models.cache_file import read_notes
from mamba2_jax.models.mamba2 import Mamba2ForCausalLM

_NOTE = "conversation"


class _Read(NamedTuple):
    """A state, and the text that it has read, special tokens included."""

    text: str
    cache: Mamba2Cache | None
    draft: Draft | None = None
    draft_cache: DraftState | None = None


class Conversation:
    """Messages under a chat template, and the model's state after them.

    A turn continues the longest text that a kept state has read. Where the template changes what was
    written before, such as spaces at an answer's end, the state before that answer goes on, or all is read
    again: the result is that of the whole text.

    Args:
        model: the model.
        tokenizer: as `load_tokenizer` returns it.
        system: content of a first message of the role "system".
        chat_template: Jinja template; None: the tokenizer's own.

    Raises:
        ValueError: there is no chat template.
    """

    def __init__(
        self,
        model: Mamba2ForCausalLM,
        tokenizer: Any,
        *,
        system: str | None = None,
        chat_template: str | None = None,
    ):
        template = chat_template or tokenizer.chat_template
        if not template:
            raise ValueError("Conversation: the tokenizer has no chat template; give chat_template")
        self._model, self._tokenizer, self._template = model, tokenizer, template
        self._system = system
        self._answer: TextStream | None = None  # of the last turn; its end is not yet in `_messages`
        self.reset()

    @property
    def messages(self) -> list[dict[str, str]]:
        """Return all messages so far, also an answer that is being written."""
        self._settle()
        return [dict(message) for message in self._messages]

    def reset(self) -> None:
        """Forget all messages but the system's."""
        self._answer = None
        self._messages = [] if self._system is None else [{"role": "system", "content": self._system}]
        self._prompt = ""
        self._states: Sequence[_Read] = ()
        self._draft: Draft | None = None  # of the last turn

    def say(
        self, text: str, *, max_new_tokens: int, stop: str | Sequence[str] = (), **options: Any
    ) -> TextStream:
        """Add a message of the user and return the answer as a stream, which may be left at any time.

        Args:
            text: the message; special tokens that it spells are text.
            max_new_tokens: maximum number of new tokens.
            stop: stop strings; the answer ends before the first of them.
            **options: options of `stream`; `cache` and `draft_cache` are the conversation's own.

        Raises:
            ValueError: an option of `stream`, or a message that the template refuses.
        """
        self._settle()
        messages = [*self._messages, {"role": "user", "content": text}]
        try:
            prompt, spelled = render_chat(self._tokenizer, messages, self._template)
        except ValueError as error:
            raise ValueError(f"Conversation: {error}") from error
        known = [read for read in self._states if prompt.startswith(read.text) and prompt != read.text]
        read = max(known, key=lambda read: len(read.text), default=_Read("", None))
        given = {"max_new_tokens": max_new_tokens, "cache": read.cache, **options}
        draft = given.get("draft")
        if read.text and draft is not None:
            given["draft_cache"] = self._draft_cache_after(read, draft)
        begin = len(read.text)
        ids = rendered_tokens(
            self._tokenizer,
            prompt[begin:],
            [(max(first, begin) - begin, last - begin) for first, last in spelled if last > begin],
        )
        options_of_all = stream_options(given)
        (answer,) = start_streams("stream", self._model, self._tokenizer, ids, stop, options_of_all)
        self._messages, self._prompt, self._answer, self._draft = messages, prompt, answer, draft
        return answer

    def _draft_cache_after(self, read: _Read, draft: Draft) -> DraftState:
        """Return the draft's state after a text; reads the text anew if another draft, or none, was used."""
        if read.draft is draft and read.draft_cache is not None:
            return read.draft_cache
        return draft_state_of(draft, rendered_tokens(self._tokenizer, read.text, ()))

    def save(self, file: str | os.PathLike[str]) -> None:
        """Write messages and state as one file of `Mamba2Cache.save`.

        Raises:
            ValueError: nothing has been said.
        """
        self._settle()
        read = self._states[-1] if self._states else None
        if read is None or read.cache is None:
            raise ValueError("Conversation.save: nothing has been said")
        note = {"messages": self._messages, "read": read.text}
        read.cache.save(file, self._model, notes={_NOTE: json.dumps(note)})

    def load(self, file: str | os.PathLike[str]) -> None:
        """Go on with a saved conversation, in place of this one.

        Raises:
            FileNotFoundError: no such file.
            ValueError: not a saved conversation, or one of another model.
        """
        cache = Mamba2Cache.load(file, self._model)
        try:
            note = json.loads(read_notes(file)[_NOTE])
            messages = [
                {key: str(message[key]) for key in ("role", "content")} for message in note["messages"]
            ]
            read = _Read(str(note["read"]), cache)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{file}: a saved state, but not of a conversation") from error
        self._answer, self._messages, self._states = None, messages, (read,)

    def _settle(self) -> None:
        """Add the last answer to the messages, as far as it was written."""
        answer, self._answer = self._answer, None
        if answer is None:
            return
        shown = answer.text
        if answer.finish_reason is None:  # left early: also what was read and not yet shown
            shown = text_after(self._tokenizer, answer.prompt_ids, answer.tokens, special=False)
        self._messages.append({"role": "assistant", "content": shown})
        raw = text_after(self._tokenizer, answer.prompt_ids, answer.tokens, special=True)
        self._states = (
            _Read(self._prompt, answer.prompt_cache, self._draft, answer.prompt_draft_cache),
            _Read(self._prompt + raw, answer.cache, self._draft, answer.draft_cache),
        )
