"""Streaming generation: text is yielded during decoding, in chunks of whole characters."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from mamba2_jax.generation.drafts import DraftState
from mamba2_jax.generation.options import Options, make_options
from mamba2_jax.generation.request import check_request
from mamba2_jax.generation.sources import TokenSource, token_sources
from mamba2_jax.generation.text import (
    IncrementalDecoder,
    first_stop,
    possible_stop,
    prompt_tokens,
    render_chat,
    rendered_tokens,
)
from mamba2_jax.models.cache import Mamba2Cache
from mamba2_jax.models.mamba2 import Mamba2ForCausalLM
from mamba2_jax.tokenizer import SpecialTokenIds, special_token_ids


def stream(
    model: Mamba2ForCausalLM,
    tokenizer: Any,
    prompt: str | Sequence[Mapping[str, Any]],
    *,
    max_new_tokens: int,
    stop: str | Sequence[str] = (),
    add_special_tokens: bool = True,
    **options: Any,
) -> "TextStream":
    """Continue a prompt and yield the new text in chunks while decoding.

    Args:
        model: the model.
        tokenizer: as `load_tokenizer` returns it.
        prompt: the text to continue. A bos token is added if the tokenizer adds one, except to a prompt that
            begins with it, and with a `cache` that has read tokens. Or messages, dicts `role` and `content`,
            to answer under the tokenizer's chat template; special tokens that they spell are text.
        max_new_tokens: maximum number of new tokens.
        stop: stop strings; the text ends before the first of them.
        add_special_tokens: False: the prompt has all special tokens that it needs, such as a chat template's.
        **options: all others of `generate`, but `num_return_sequences` and `inputs_embeds`. By default,
            `eos_token_id` is all end ids of the tokenizer and the model, and `vocab_size` the tokenizer's.
            With `num_beams` or `best_of` the text comes as a whole at the end.

    Returns:
        An iterator over chunks of text, with attributes `tokens`, `num_tokens`, `finish_reason` and `cache`.

    Raises:
        TypeError: an unknown option.
        ValueError: an invalid argument, named in the message; raised by this call, not by the iterator.

    >>> from mamba2_jax import load_tokenizer
    >>> model, tokenizer = Mamba2ForCausalLM.from_pretrained(), load_tokenizer()
    >>> pieces = stream(model, tokenizer, "import os", max_new_tokens=8)
    >>> text = "".join(pieces)
    >>> pieces.num_tokens, pieces.finish_reason
    (8, 'length')
    >>> more = "".join(stream(model, tokenizer, "\\n", max_new_tokens=8, cache=pieces.cache))
    """
    given = stream_options({"max_new_tokens": max_new_tokens, **options})
    if isinstance(prompt, str):
        goes_on = isinstance(given.cache, Mamba2Cache) and bool(np.any(given.cache.position))
        ids = prompt_tokens(tokenizer, prompt, goes_on=goes_on or not add_special_tokens)
    elif _are_messages(prompt):
        ids = rendered_tokens(tokenizer, *render_chat(tokenizer, prompt))
    else:
        raise ValueError(
            f"stream: prompt must be a string, or messages with role and content, got {type(prompt).__name__}"
        )
    return start_streams("stream", model, tokenizer, ids, stop, given)[0]


def stream_options(given: Mapping[str, Any]) -> Options:
    """Make the options of a stream, which is one text.

    Raises:
        TypeError: an unknown option.
        ValueError: an option of `generate` that means nothing here.
    """
    options = make_options("stream", given)
    if options.num_return_sequences != 1:
        raise ValueError(
            f"stream: num_return_sequences={options.num_return_sequences!r}: a stream is one text; use "
            "generate, or call stream with several keys"
        )
    if options.inputs_embeds is not None:
        raise ValueError("stream: inputs_embeds: a stream continues a text; use generate")
    return options


def start_streams(
    name: str,
    model: Mamba2ForCausalLM,
    tokenizer: Any,
    ids: list[int],
    stop: str | Sequence[str],
    options: Options,
) -> list["TextStream"]:
    """Check the arguments of the function `name` and start a stream for each text that `options` want.

    Raises:
        ValueError: an invalid argument, named in the message.
    """
    stops = (stop,) if isinstance(stop, str) else stop
    if not isinstance(stops, Sequence) or any(not isinstance(s, str) or not s for s in stops):
        raise ValueError(f"{name}: stop={stop!r} must be non-empty strings")
    if not ids:
        raise ValueError(f"{name}: prompt is empty; give it at least one character")
    special = special_token_ids(tokenizer, model.config)
    defaults = {
        "eos_token_id": end_ids(model, special),
        "pad_token_id": special.pad,
        "vocab_size": max(tokenizer.get_vocab().values()) + 1,
    }
    missing = {option: value for option, value in defaults.items() if getattr(options, option) is None}
    request = check_request(name, model, [ids], None, dataclasses.replace(options, **missing))
    return [
        TextStream(source, tokenizer, ids, tuple(stops), request.eos)
        for source in token_sources(model, request)
    ]


def _are_messages(prompt: Any) -> bool:
    def is_message(message: Any) -> bool:
        return isinstance(message, Mapping) and isinstance(message.get("role"), str) and "content" in message

    return isinstance(prompt, Sequence) and len(prompt) > 0 and all(map(is_message, prompt))


def end_ids(model: Mamba2ForCausalLM, special: SpecialTokenIds) -> tuple[int, ...]:
    """Return all ids that end a text: those of `generation_config.json`, then the tokenizer's or config's."""
    return tuple(dict.fromkeys((*model.generation_end_ids, *special.eos)))


class TextStream(Iterator[str]):
    """Iterator over chunks of text; its attributes are final once it is exhausted.

    Chunks hold whole characters: bytes of an incomplete character are held back until the next token, and
    text that may begin a stop string is held back until the following text decides.
    """

    tokens: list[int]
    """Tokens read so far, the eos and those of a stop string included."""
    text: str
    """Text yielded so far."""
    prompt_ids: list[int]
    """Tokens of the prompt."""
    finish_reason: str | None
    """None until the text ends; then `"eos"`, `"stop"` or `"length"`."""

    def __init__(
        self,
        source: TokenSource,
        tokenizer,
        prompt_ids: list[int],
        stop: tuple[str, ...],
        eos: tuple[int, ...],
    ):
        self.tokens, self.text = [], ""
        self.prompt_ids = prompt_ids
        self.finish_reason = None
        self._source = source
        self._stop = stop
        self._eos = eos
        self._pieces = self._run(source.blocks(), IncrementalDecoder(tokenizer, prompt_ids))

    def __next__(self) -> str:
        """Return the next chunk of text, never empty."""
        piece = next(self._pieces)
        self.text += piece
        return piece

    @property
    def num_tokens(self) -> int:
        """Return the number of tokens decoded so far, the eos included."""
        return len(self.tokens)

    @property
    def cache(self) -> Mamba2Cache:
        """Return the state after the prompt and exactly `tokens`, to go on from; at any time."""
        return self._source.cache_after(len(self.tokens))

    @property
    def draft_cache(self) -> DraftState | None:
        """Return the draft's state after the same tokens as `cache`; None without a draft."""
        return self._source.draft_cache_after(len(self.tokens))

    @property
    def logprobs(self) -> list[float] | None:
        """Return the log-probability of each of `tokens`, with `return_logprobs=True`."""
        logprobs = self._source.logprobs
        return None if logprobs is None else logprobs[: len(self.tokens)]

    @property
    def comes_whole(self) -> bool:
        """Return whether the text comes as a whole at the end: with beams, or the best of several."""
        return self._source.is_whole

    @property
    def passes(self) -> int | None:
        """Return the calls of the model after the prompt, with a draft."""
        return self._source.passes

    @property
    def prompt_cache(self) -> Mamba2Cache:
        """Return the state after the prompt."""
        return self._source.cache_after(0)

    @property
    def prompt_draft_cache(self) -> DraftState | None:
        """Return the draft's state after the prompt; None without a draft."""
        return self._source.draft_cache_after(0)

    def _run(self, blocks: Iterator[list[int]], decoder: IncrementalDecoder) -> Iterator[str]:
        waiting = ""
        for text in self._texts(blocks, decoder):
            waiting += text
            cut = first_stop(waiting, self._stop)
            if cut is not None:
                self.finish_reason = "stop"
                waiting = waiting[:cut]
                break
            ready = len(waiting) - possible_stop(waiting, self._stop)
            if ready:
                yield waiting[:ready]
                waiting = waiting[ready:]
        if waiting:
            yield waiting

    def _texts(self, blocks: Iterator[list[int]], decoder: IncrementalDecoder) -> Iterator[str]:
        for token in (token for block in blocks for token in block):
            self.tokens.append(token)
            if token in self._eos:
                self.finish_reason = "eos"
                break
            yield decoder.push(token)
        else:
            self.finish_reason = "length"
        yield decoder.flush()
