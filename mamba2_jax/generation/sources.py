"""Tokens of a text as they are decoded, in blocks, and the states of model and draft after them."""

from collections.abc import Iterator
from functools import cached_property
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mamba2_jax.generation.decoding import GenerateOutput, write_texts
from mamba2_jax.generation.drafts import DraftState, TokenHistory, read_by_draft, start_draft
from mamba2_jax.generation.loop import decode, prefill
from mamba2_jax.generation.request import Request
from mamba2_jax.generation.speculative import begin, speculate
from mamba2_jax.generation.state import DecodeState
from mamba2_jax.models.cache import Mamba2Cache, bucket
from mamba2_jax.models.mamba2 import Mamba2ForCausalLM

TOKENS_PER_CALL = 4  # a call has about a millisecond of overhead
SMALLEST_BUFFER = 1024  # tokens; every smaller budget runs the same program


class _Snapshot(NamedTuple):
    """States after the prompt and the first `read` new tokens."""

    read: int
    cache: Mamba2Cache
    draft: DraftState | None


class Reader:
    """The prompt of a request of one row, read when it is first needed, and calls of the compiled functions.

    Args:
        model: the model.
        request: of one row.
    """

    def __init__(self, model: Mamba2ForCausalLM, request: Request):
        self.model, self.request = model, request

    @cached_property
    def state(self) -> DecodeState:
        """Return the state of the decode loop after the prompt."""
        request = self.request
        # a buffer for many budgets, but beams read all of theirs once more
        size = request.size if request.search.decodes_whole else max(request.size, SMALLEST_BUFFER)
        return self.call(
            _prefill,
            self.model,
            request.input_ids,
            request.attention_mask,
            request.cache,
            request.sampler,
            size=size,
            piece=request.piece,
            capacity=request.capacity,
            pad=request.pad,
            with_logprobs=request.search.needs_logprobs,
        )

    @cached_property
    def prompt(self) -> _Snapshot:
        """Return the states of model and draft after the prompt."""
        request, draft = self.request, None
        if request.draft is not None:
            draft = self.call(
                _start_draft,
                request.draft,
                request.input_ids,
                request.attention_mask,
                request.draft_cache,
                piece=request.piece,
                capacity=request.capacity,
            )
        return _Snapshot(0, self.state.cache, draft)

    @cached_property
    def texts(self) -> GenerateOutput:
        """Return whole texts, decoded together."""
        request = self.request
        return self.call(
            _write_texts,
            self.model,
            request.draft,
            self.state,
            self.prompt.draft,
            request.sampler,
            request.processors,
            request.key,
            jnp.asarray(request.budget, jnp.int32),
            search=request.search,
            eos=request.eos,
            pad=request.pad,
        )

    def call(self, function: Any, *args: Any, **options: Any) -> Any:
        """Call a compiled function on the model's device."""
        with self.model.backbone.on_its_device():  # not around a `yield`, where the caller's code runs
            return function(*args, **options)

    def read_on(self, start: _Snapshot, tokens: list[int]) -> _Snapshot:
        """Read tokens after those of a snapshot; few lengths are compiled."""
        count = len(tokens)
        size = TOKENS_PER_CALL if count <= TOKENS_PER_CALL else bucket(count)
        ids = np.zeros((1, size), np.int32)
        ids[0, :count] = tokens
        mask = (np.arange(size) < count).astype(np.int32)[None]
        cache = self.model.backbone(jnp.asarray(ids), jnp.asarray(mask), cache=start.cache).cache
        draft = start.draft
        if isinstance(draft, Mamba2Cache):
            draft = self.call(_read_by_draft, self.request.draft, draft, ids, np.array([count], np.int32))
        return _Snapshot(start.read + count, cache, draft)


class TokenSource:
    """One text of a request, in blocks of tokens. Subclasses decode.

    Args:
        reader: reads the prompt.
    """

    tokens: list[int]
    """Tokens decoded so far."""
    logprobs: list[float] | None
    """Their log-probabilities, if requested."""
    passes: int | None = None
    """Calls of the model after the prompt, with a draft."""
    is_whole = False
    """Whether all tokens come in one block."""

    def __init__(self, reader: Reader):
        self._reader, self._request = reader, reader.request
        self.tokens = []
        self.logprobs = [] if self._request.search.return_logprobs else None
        self._snapshots: list[_Snapshot] = []  # before and after the last block

    def blocks(self) -> Iterator[list[int]]:
        """Yield blocks of tokens."""
        raise NotImplementedError

    def cache_after(self, count: int) -> Mamba2Cache:
        """Return the model's state after the prompt and the first `count` tokens."""
        return self._after(count).cache

    def draft_cache_after(self, count: int) -> DraftState | None:
        """Return the draft's state after the prompt and the first `count` tokens; None without a draft."""
        read = self._reader.prompt.draft
        if not isinstance(read, TokenHistory):
            return self._after(count).draft
        text = [*np.asarray(read.tokens)[0, : int(read.lengths[0])].tolist(), *self.tokens[:count]]
        return TokenHistory(jnp.asarray([text], jnp.int32), jnp.asarray([len(text)], jnp.int32))

    def _after(self, count: int) -> _Snapshot:
        """Return a snapshot, read on from the last one before `count`."""
        known = [at for at in (self._reader.prompt, *self._snapshots) if at.read <= count]
        last = max(known, key=lambda at: at.read)
        if last.read < count:
            last = self._reader.read_on(last, self.tokens[last.read : count])
            self._snapshots.append(last)
        return last

    def _add(
        self, state: DecodeState | GenerateOutput, draft: DraftState | None, row: int = 0, unread: int = 0
    ) -> list[int]:
        """Take over what a row has beyond `tokens`, and the states, which lack the last `unread` tokens.

        Returns:
            The new tokens.
        """
        made, count = len(self.tokens), int(np.asarray(state.lengths)[row])
        block = np.asarray(state.tokens)[row, made:count].tolist()
        if self.logprobs is not None and state.logprobs is not None:
            self.logprobs += np.asarray(state.logprobs)[row, made:count].tolist()
        self.tokens += block
        cache = state.cache if state.cache.batch == 1 else state.cache[row]
        self._snapshots = [*self._snapshots[-1:], _Snapshot(count - unread, cache, draft)]
        return block


class BlockSource(TokenSource):
    """Decode up to `TOKENS_PER_CALL` tokens per call; the first token alone, to show text early."""

    def blocks(self) -> Iterator[list[int]]:
        """Yield blocks of tokens."""
        request, state, block = self._request, self._reader.state, 1
        while len(self.tokens) < request.budget:
            limit = jnp.asarray(min(len(self.tokens) + block, request.budget), jnp.int32)
            state = self._reader.call(
                _decode,
                self._reader.model,
                state,
                request.sampler,
                request.key,
                limit,
                request.processors,
                eos=request.eos,
                pad=request.pad,
            )
            yield self._add(state, None)
            if np.asarray(state.finished)[0]:
                return
            block = TOKENS_PER_CALL


class DraftSource(TokenSource):
    """Decode with a draft: each call checks guesses until there are at least `TOKENS_PER_CALL` new tokens."""

    def blocks(self) -> Iterator[list[int]]:
        """Yield blocks of tokens."""
        request, prompt = self._request, self._reader.prompt
        sampling = request.sampler, request.key
        done = self._reader.call(
            _begin, self._reader.state, prompt.draft, *sampling, request.processors, eos=request.eos
        )
        until = 1  # which there is already: compiles, so that the text does not halt after its first token
        while True:
            done = self._reader.call(
                _speculate,
                self._reader.model,
                request.draft,
                done,
                *sampling,
                jnp.asarray(request.budget, jnp.int32),
                jnp.asarray(until, jnp.int32),
                request.processors,
                num_draft=request.search.num_draft_tokens,
                eos=request.eos,
            )
            self.passes = int(np.asarray(done.passes)[0])
            yield self._add(done.state, done.draft, unread=1)
            if np.asarray(done.state.finished)[0] or len(self.tokens) >= request.budget:
                return
            until = len(self.tokens) + TOKENS_PER_CALL


class WholeSource(TokenSource):
    """One of several texts that are decoded together, by beam search or as samples: a single block.

    Args:
        reader: shared by the texts.
        row: which of them.
    """

    is_whole = True

    def __init__(self, reader: Reader, row: int):
        super().__init__(reader)
        self._row = row

    def blocks(self) -> Iterator[list[int]]:
        """Yield all tokens at once."""
        texts, row = self._reader.texts, self._row
        draft = jax.tree.map(lambda leaf: leaf[row : row + 1], texts.draft_cache)
        if texts.passes is not None:
            self.passes = int(texts.passes[row])
        yield self._add(texts, draft, row)


def token_sources(model: Mamba2ForCausalLM, request: Request) -> list[TokenSource]:
    """Return a source for each text that a request of one prompt wants."""
    reader, search = Reader(model, request), request.search
    if search.decodes_whole:
        return [WholeSource(reader, row) for row in range(search.num_return_sequences)]
    return [BlockSource(reader) if request.draft is None else DraftSource(reader)]


_prefill = jax.jit(prefill, static_argnames=("size", "piece", "capacity", "pad", "with_logprobs"))
_decode = jax.jit(decode, static_argnames=("eos", "pad"))
_start_draft = jax.jit(start_draft, static_argnames=("piece", "capacity"))
_read_by_draft = jax.jit(read_by_draft)
_begin = jax.jit(begin, static_argnames=("eos",))
_speculate = jax.jit(speculate, static_argnames=("num_draft", "eos"))
_write_texts = jax.jit(write_texts, static_argnames=("search", "eos", "pad"))
