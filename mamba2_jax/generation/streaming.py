"""Streaming generation: text is yielded during decoding, in chunks of whole characters."""

from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from mamba2_jax.generation.loop import decode, prefill
from mamba2_jax.generation.processors import Processor
from mamba2_jax.generation.request import Request, check_request
from mamba2_jax.generation.state import DecodeState
from mamba2_jax.generation.text import IncrementalDecoder, first_stop, possible_stop, prompt_tokens
from mamba2_jax.models.cache import Mamba2Cache
from mamba2_jax.models.mamba2 import Mamba2ForCausalLM
from mamba2_jax.tokenizer import SpecialTokenIds, special_token_ids
from mamba2_jax.typing import Array

TOKENS_PER_CALL = 4  # a call has about a millisecond of overhead
SMALLEST_BUFFER = 1024  # tokens; every smaller budget runs the same program


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
    logits_processors: Sequence[Processor] = (),
    add_special_tokens: bool = True,
) -> "TextStream":
    """Continue a prompt and yield the new text in chunks while decoding.

    Args:
        model: the model.
        tokenizer: as `load_tokenizer` returns it.
        prompt: the text to continue. A bos token is added if the tokenizer adds one, except to a prompt that
            begins with it, and with a `cache` that has read tokens.
        max_new_tokens: maximum number of new tokens.
        stop: stop strings; the text ends before the first of them.
        temperature: see `generate`.
        top_k: see `generate`.
        top_p: see `generate`.
        min_p: see `generate`.
        repetition_penalty: see `generate`.
        eos_token_id: see `generate`; None: `end_ids` of the tokenizer and the model.
        key: see `generate`.
        cache: see `generate`.
        logits_processors: see `generate`.
        add_special_tokens: False: the prompt has all special tokens that it needs, such as a chat template's.

    Returns:
        An iterator over chunks of text, with attributes `tokens`, `num_tokens`, `finish_reason` and `cache`.

    Raises:
        ValueError: an invalid argument, named in the message; raised by this call, not by the iterator.

    >>> from mamba2_jax import load_tokenizer
    >>> model, tokenizer = Mamba2ForCausalLM.from_pretrained(), load_tokenizer()
    >>> pieces = stream(model, tokenizer, "import os", max_new_tokens=8)
    >>> text = "".join(pieces)
    >>> pieces.num_tokens, pieces.finish_reason
    (8, 'length')
    >>> more = "".join(stream(model, tokenizer, "\\n", max_new_tokens=8, cache=pieces.cache))
    """
    stops = (stop,) if isinstance(stop, str) else stop
    if not isinstance(stops, Sequence) or any(not isinstance(s, str) or not s for s in stops):
        raise ValueError(f"stream: stop={stop!r} must be non-empty strings")
    if not isinstance(prompt, str):
        raise ValueError(f"stream: prompt must be a string, got {type(prompt).__name__}")
    goes_on = isinstance(cache, Mamba2Cache) and bool(np.any(cache.position))
    ids = prompt_tokens(tokenizer, prompt, goes_on=goes_on or not add_special_tokens)
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
        eos_token_id=end_ids(model, special) if eos_token_id is None else eos_token_id,
        pad_token_id=special.pad,
        vocab_size=max(tokenizer.get_vocab().values()) + 1,
        key=key,
        logits_processors=logits_processors,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
    )
    return TextStream(BlockDecoder(model, request), tokenizer, ids, tuple(stops), request.eos)


def end_ids(model: Mamba2ForCausalLM, special: SpecialTokenIds) -> tuple[int, ...]:
    """Return all ids that end a text: those of `generation_config.json`, then the tokenizer's or config's."""
    return tuple(dict.fromkeys((*model.generation_end_ids, *special.eos)))


class BlockDecoder:
    """Decode a request of one row in blocks of up to `TOKENS_PER_CALL` tokens, and keep the last states.

    Args:
        model: the model.
        request: of one row.
    """

    def __init__(self, model: Mamba2ForCausalLM, request: Request):
        self._model, self._request = model, request
        self._before: DecodeState | None = None  # the state before the last block
        self._state: DecodeState | None = None
        self._prompt_cache: Mamba2Cache | None = None

    def blocks(self) -> Iterator[list[int]]:
        """Yield blocks of tokens; the first token alone, to show text early."""
        request, made, block = self._request, 0, 1
        while made < request.budget:
            self._before = state = self._started()
            limit = jnp.asarray(min(made + block, request.budget), jnp.int32)
            with self._model.backbone.on_its_device():  # not around the `yield`, where the caller's code runs
                self._state = state = _decode(
                    self._model,
                    state,
                    request.sampler,
                    request.key,
                    limit,
                    request.processors,
                    eos=request.eos,
                    pad=request.pad,
                )
            before, made, block = made, int(state.lengths[0]), TOKENS_PER_CALL
            yield state.tokens[0, before:made].tolist()
            if bool(state.finished[0]):
                return

    def cache_after(self, count: int) -> Mamba2Cache:
        """Return the state after the prompt and `count` tokens, 0 or in the last block.

        A block that a stop string cuts is read again up to there.
        """
        after = self._started()
        if count == 0 and self._prompt_cache is not None:
            return self._prompt_cache
        if count == int(after.lengths[0]) or self._before is None:
            return after.cache
        before = self._before
        done = int(before.lengths[0])
        if count == done:
            return before.cache
        tokens = jax.lax.dynamic_slice_in_dim(after.tokens, done, TOKENS_PER_CALL, axis=1)
        mask = (jnp.arange(TOKENS_PER_CALL) < count - done).astype(jnp.int32)[None]
        return self._model.backbone(tokens, mask, cache=before.cache).cache

    def _started(self) -> DecodeState:
        """Return the current state; reads the prompt first."""
        if self._state is not None:
            return self._state
        request = self._request
        with self._model.backbone.on_its_device():
            state = _prefill(
                self._model,
                request.input_ids,
                request.attention_mask,
                request.cache,
                request.sampler,
                size=max(request.size, SMALLEST_BUFFER),
                piece=request.piece,
                capacity=request.capacity,
                pad=request.pad,
            )
        self._state, self._prompt_cache = state, state.cache
        return state


_prefill = jax.jit(prefill, static_argnames=("size", "piece", "capacity", "pad"))
_decode = jax.jit(decode, static_argnames=("eos", "pad"))


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
        source: BlockDecoder,
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
    def prompt_cache(self) -> Mamba2Cache:
        """Return the state after the prompt."""
        return self._source.cache_after(0)

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
