"""Streaming generation: text is yielded during decoding, in chunks of whole characters."""

from collections.abc import Iterator, Sequence
from functools import partial

import jax
import jax.numpy as jnp

from mamba2_jax.generation.decoding import DecodeState, decode, prefill
from mamba2_jax.generation.request import Request, check_request
from mamba2_jax.models.cache import Mamba2Cache
from mamba2_jax.models.mamba2 import Mamba2ForCausalLM
from mamba2_jax.tokenizer import special_token_ids
from mamba2_jax.typing import Array

TOKENS_PER_CALL = 4  # a call has about a millisecond of overhead
REPLACEMENT = "\ufffd"  # decoded from an incomplete character


def stream(
    model: Mamba2ForCausalLM,
    tokenizer,
    prompt: str,
    *,
    max_new_tokens: int,
    stop: str | Sequence[str] = (),
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float | None = None,
    eos_token_id: int | tuple[int, ...] | None = None,
    key: Array | None = None,
    cache: Mamba2Cache | None = None,
) -> "TextStream":
    """Continue a prompt and yield the new text in chunks while decoding.

    Args:
        model: the model.
        tokenizer: as `load_tokenizer` returns it.
        prompt: the text to continue.
        max_new_tokens: maximum number of new tokens.
        stop: stop strings; the text ends before the first of them.
        temperature: see `generate`.
        top_k: see `generate`.
        top_p: see `generate`.
        min_p: see `generate`.
        repetition_penalty: see `generate`.
        eos_token_id: see `generate`; None: taken from the tokenizer or the config by `special_token_ids`.
        key: see `generate`.
        cache: see `generate`.

    Returns:
        An iterator over chunks of text, with attributes `num_tokens` and `finish_reason`.

    Raises:
        ValueError: an invalid argument, named in the message; raised by this call, not by the iterator.

    >>> from mamba2_jax import load_tokenizer
    >>> model, tokenizer = Mamba2ForCausalLM.from_pretrained(), load_tokenizer()
    >>> pieces = stream(model, tokenizer, "import os", max_new_tokens=8)
    >>> text = "".join(pieces)
    >>> pieces.num_tokens, pieces.finish_reason
    (8, 'length')
    """
    stops = (stop,) if isinstance(stop, str) else stop
    if not isinstance(stops, Sequence) or any(not isinstance(s, str) or not s for s in stops):
        raise ValueError(f"stream: stop={stop!r} must be non-empty strings")
    if not isinstance(prompt, str):
        raise ValueError(f"stream: prompt must be a string, got {type(prompt).__name__}")
    ids = tokenizer(prompt)["input_ids"]
    if not ids:
        raise ValueError("stream: prompt is empty; give it at least one character")
    special = special_token_ids(tokenizer, model.config)
    request = check_request(
        "stream",
        model,
        [ids],
        None,
        cache,
        max_new_tokens=max_new_tokens,
        eos_token_id=special.eos if eos_token_id is None else eos_token_id,
        pad_token_id=special.pad,
        vocab_size=len(tokenizer),
        key=key,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
    )
    return TextStream(_blocks(model, request), tokenizer, ids, tuple(stops), request.eos)


def _blocks(model: Mamba2ForCausalLM, request: Request) -> Iterator[list[int]]:
    """Yield blocks of up to `TOKENS_PER_CALL` tokens; the first token alone, to show text early."""
    state = _prefill(
        model,
        request.input_ids,
        request.attention_mask,
        request.cache,
        request.sampler,
        capacity=request.capacity,
    )
    made, block = 0, 1
    while made < request.budget:
        block = jnp.asarray(min(block, request.budget - made), jnp.int32)
        state, tokens, lengths, _ = _decode(
            model,
            state,
            request.sampler,
            request.key,
            block,
            size=TOKENS_PER_CALL,
            eos=request.eos,
            pad=request.pad,
        )
        count = int(lengths[0])
        yield tokens[0, :count].tolist()
        if bool(state.finished[0]):
            return
        made, block = made + count, TOKENS_PER_CALL


_prefill = jax.jit(prefill, static_argnames="capacity")


@partial(jax.jit, static_argnames=("size", "eos", "pad"), donate_argnames="state")
def _decode(model, state: DecodeState, sampler, key, budget, *, size, eos, pad):
    return decode(model, state, sampler, key, budget, size=size, eos=eos, pad=pad)


class TextStream(Iterator[str]):
    """Iterator over chunks of text; `num_tokens` and `finish_reason` are final once it is exhausted.

    Chunks hold whole characters: bytes of an incomplete character are held back until the next token, and
    text that may begin a stop string is held back until the following text decides.
    """

    num_tokens: int
    """Number of tokens decoded so far, the eos included."""
    finish_reason: str | None
    """None until the text ends; then `"eos"`, `"stop"` or `"length"`."""

    def __init__(
        self,
        blocks: Iterator[list[int]],
        tokenizer,
        prompt_ids: list[int],
        stop: tuple[str, ...],
        eos: tuple[int, ...],
    ):
        self.num_tokens = 0
        self.finish_reason = None
        self._stop = stop
        self._eos = eos
        self._pieces = self._run(blocks, IncrementalDecoder(tokenizer, prompt_ids))

    def __next__(self) -> str:
        """Return the next chunk of text, never empty."""
        return next(self._pieces)

    def _run(self, blocks: Iterator[list[int]], decoder: "IncrementalDecoder") -> Iterator[str]:
        waiting = ""
        for text in self._texts(blocks, decoder):
            waiting += text
            cut = _first_stop(waiting, self._stop)
            if cut is not None:
                self.finish_reason = "stop"
                waiting = waiting[:cut]
                break
            ready = len(waiting) - _possible_stop(waiting, self._stop)
            if ready:
                yield waiting[:ready]
                waiting = waiting[ready:]
        if waiting:
            yield waiting

    def _texts(self, blocks: Iterator[list[int]], decoder: "IncrementalDecoder") -> Iterator[str]:
        for token in (token for block in blocks for token in block):
            self.num_tokens += 1
            if token in self._eos:
                self.finish_reason = "eos"
                break
            yield decoder.push(token)
        else:
            self.finish_reason = "length"
        yield decoder.flush()


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


def _first_stop(text: str, stop: tuple[str, ...]) -> int | None:
    """Return the start index of the stop string that ends first in `text`; None without any."""
    places = [(text.find(s) + len(s), text.find(s)) for s in stop if s in text]
    return min(places)[1] if places else None


def _possible_stop(text: str, stop: tuple[str, ...]) -> int:
    """Return the length of the longest suffix of `text` that is a proper prefix of a stop string."""
    longest = 0
    for s in stop:
        for size in range(min(len(s) - 1, len(text)), longest, -1):
            if text.endswith(s[:size]):
                longest = size
                break
    return longest
