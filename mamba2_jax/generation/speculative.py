"""Speculative decoding: a cheap draft guesses tokens, the model checks several of them in one call.

A call reads the last written token and `k` guesses, and keeps the state after each. Guesses are accepted from
the left, a guess `d` with probability `min(1, p(d) / q(d))`, where `p` and `q` are the model's and the
draft's distributions after all filters. The first refused one is replaced by a token drawn from
`max(p - q, 0)`, so that every token is distributed as in plain decoding; greedy texts are the same, but for
ties within rounding. Each row then takes the state after its last accepted token.

Source: Leviathan et al. 2023, arXiv:2211.17192.
"""

from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mamba2_jax.generation.loop import keys_of_rows, logprob_of
from mamba2_jax.generation.prefill import read_prompts, to_the_left
from mamba2_jax.generation.processors import Processor, bind_rows
from mamba2_jax.generation.sampling import Sampler, choose_token, token_probabilities
from mamba2_jax.generation.state import DecodeState
from mamba2_jax.models.cache import Mamba2Cache
from mamba2_jax.models.mamba2 import Mamba2ForCausalLM
from mamba2_jax.typing import Array, Bool, Float, Int


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class PromptLookup:
    """Draft without a model: guesses what followed the last tokens earlier in prompt and text.

    Args:
        ngram: the longest sequence of last tokens that is looked up; then shorter ones.
    """

    ngram: int = field(default=3, metadata={"static": True})

    def __post_init__(self) -> None:
        """Check the length."""
        if not isinstance(self.ngram, int) or self.ngram < 1:
            raise ValueError(f"PromptLookup: ngram={self.ngram!r} must be an integer of at least 1")


class Guesses(NamedTuple):
    """Drafted tokens, and what the draft needs to go on."""

    tokens: Int[Array, "b k"]
    probabilities: Float[Array, "b k v"]
    """Distributions from which the tokens were drawn."""
    caches: Mamba2Cache | None
    """States of a draft model after the last token and each guess."""


class ModelDraft(NamedTuple):
    """A draft model and its state, which has read all but the last written token."""

    model: Mamba2ForCausalLM
    cache: Mamba2Cache

    def guess(self, last: Int[Array, " b"], num_draft: int, context: "_Context") -> Guesses:
        """Decode `num_draft` tokens after `last`."""

        def one_token(carry, index):
            cache, token, tokens, seen = carry
            out = self.model.backbone.forward(token[:, None], None, None, cache, None)
            process = bind_rows(context.processors, tokens, context.counts + index)
            logits = self.model.logits(out.last_hidden_state[:, 0])
            keys = None if context.keys is None else _fold(context.keys, index)
            token = choose_token(logits, context.sampler, seen, keys, process)
            probabilities = token_probabilities(logits, context.sampler, seen, process)
            tokens = _write(tokens, token[:, None], context.counts + index)
            seen = None if seen is None else seen.at[jnp.arange(len(token)), token].set(True)
            return (out.cache, token, tokens, seen), (token, probabilities, out.cache)

        start = (self.cache, last, context.tokens, context.seen)
        # one more than the guesses: the state after the last one, should all be accepted
        _, (tokens, probabilities, caches) = jax.lax.scan(one_token, start, jnp.arange(num_draft + 1))
        tokens, probabilities, states = jax.tree.map(
            lambda a: jnp.moveaxis(a, 0, 1), (tokens, probabilities, caches)
        )
        # keys and values have no axis of tokens: slots beyond a row's position are unused
        states = replace(states, attention=jax.tree.map(lambda a: a[-1], caches.attention))
        return Guesses(tokens[:, :-1], probabilities[:, :-1], states)

    def after(self, guesses: Guesses, index: Int[Array, " b"], active: Bool[Array, " b"]) -> "ModelDraft":
        """Go back to the state after guess `index`; rows that are not active keep theirs."""
        if guesses.caches is None:
            raise ValueError("ModelDraft.after: the guesses have no states; give those of this draft")
        return self._replace(cache=guesses.caches.after_token(index).where(active, self.cache))


class LookupDraft(NamedTuple):
    """Prompts `(b, l)`, without padding on the left, and their lengths."""

    lookup: PromptLookup
    prompts: Int[Array, "b l"]
    lengths: Int[Array, " b"]

    def guess(self, last: Int[Array, " b"], num_draft: int, context: "_Context") -> Guesses:
        """Return the tokens after the latest earlier occurrence of the longest suffix that occurs twice."""
        length = self.prompts.shape[1]
        position = jnp.arange(length + context.tokens.shape[1])
        new = jnp.clip(position - self.lengths[:, None], 0, context.tokens.shape[1] - 1)
        text = jnp.where(
            position < self.lengths[:, None],
            self.prompts[:, jnp.minimum(position, length - 1)],
            jnp.take_along_axis(context.tokens, new, axis=1),
        )  # (b, l + new)
        known = self.lengths + context.counts  # (b,)
        best = jnp.full(known.shape, -1)
        for size in range(1, self.lookup.ngram + 1):
            matches = position + size < known[:, None]  # a token follows, so it is not the suffix itself
            for back in range(1, size + 1):
                suffix = jnp.take_along_axis(text, jnp.maximum(known - back, 0)[:, None], axis=1)
                matches &= jnp.roll(text, back - size, axis=1) == suffix
            matches &= (known > size)[:, None]
            latest = jnp.where(matches, position + size, -1).max(axis=1)
            best = jnp.where(latest >= 0, latest, best)
        index = jnp.clip(best[:, None] + jnp.arange(num_draft), 0, text.shape[1] - 1)
        tokens = jnp.take_along_axis(text, index, axis=1)
        return Guesses(tokens, jax.nn.one_hot(tokens, context.vocab_size), None)

    def after(self, guesses: Guesses, index: Int[Array, " b"], active: Bool[Array, " b"]) -> "LookupDraft":
        """Return the draft itself: it has no state."""
        return self


class _Context(NamedTuple):
    """What a draft knows of the rows: new tokens and their counts, ids seen, and options."""

    tokens: Int[Array, "b new"]
    counts: Int[Array, " b"]
    seen: Bool[Array, "b v"] | None
    keys: Array | None
    sampler: Sampler
    processors: tuple[Processor, ...]
    vocab_size: int


def start_draft(
    draft: Mamba2ForCausalLM | PromptLookup,
    input_ids: Int[Array, "b l"],
    mask: Array | None,
    *,
    piece: int,
    capacity: int,
    copies: int,
) -> ModelDraft | LookupDraft:
    """Show the prompts to a draft, with `copies` rows of each; call inside `jit`."""
    if isinstance(draft, PromptLookup):
        mask = jnp.ones(input_ids.shape, bool) if mask is None else mask != 0
        prompts, lengths = to_the_left(input_ids, mask)
        return LookupDraft(draft, jnp.repeat(prompts, copies, axis=0), jnp.repeat(lengths, copies))
    cache, _ = read_prompts(draft, input_ids, mask, None, piece=piece, capacity=capacity)
    return ModelDraft(draft, cache.repeat(copies))


def decode_speculatively(
    model: Mamba2ForCausalLM,
    state: DecodeState,
    draft: ModelDraft | LookupDraft,
    sampler: Sampler,
    key: Array | None,
    budget: Int[Array, ""],
    processors: tuple[Processor, ...] = (),
    *,
    num_draft: int,
    eos: tuple[int, ...],
) -> tuple[DecodeState, Int[Array, " b"]]:
    """Decode as `loop.decode`, several tokens per call of the model; call inside `jit`.

    Returns:
        The state after exactly the written tokens, and the calls of the model per row.
    """
    batch, vocab = state.logits.shape
    row_keys = keys_of_rows(key, batch)
    ends = jnp.asarray(eos, jnp.int32)
    zero = jnp.zeros((batch,), jnp.int32)

    keys = None if row_keys is None else _fold(row_keys, zero)
    first = choose_token(state.logits, sampler, state.seen, keys, bind_rows(processors, state.tokens, zero))
    state = _add(state, first[:, None], zero + 1, state.logits[:, None], ends)

    def is_active(state):
        return ~state.finished & (state.lengths < budget)

    def check_guesses(carry):
        state, guesser, last, passes = carry
        active = is_active(state)
        keys = None if row_keys is None else _fold(row_keys, state.lengths)
        context = _Context(state.tokens, state.lengths, state.seen, keys, sampler, processors, vocab)
        guesses = guesser.guess(last, num_draft, context)
        read = jnp.concatenate([last[:, None], guesses.tokens], axis=1)  # (b, k + 1)
        out = model.backbone.forward(read, None, None, state.cache, None, every_state=True)
        logits = model.logits(out.last_hidden_state)  # (b, k + 1, v)
        wanted = _probabilities(logits, guesses.tokens, context)
        accepted, token = accept(wanted, guesses, None if keys is None else _fold(keys, num_draft + 1))

        order = jnp.arange(num_draft + 1)
        padded = jnp.pad(guesses.tokens, ((0, 0), (0, 1)))
        written = jnp.where(order < accepted[:, None], padded, token[:, None])
        is_end = jnp.isin(written, ends) & (order <= accepted[:, None])
        until_end = jnp.where(is_end.any(axis=1), jnp.argmax(is_end, axis=1), num_draft) + 1
        count = jnp.minimum(jnp.minimum(accepted + 1, until_end), budget - state.lengths)
        count = jnp.where(active, count, 0)

        index = jnp.maximum(count - 1, 0)
        cache = out.cache.after_token(index).where(active, state.cache)
        state = replace(_add(state, written, count, logits, ends), cache=cache)
        last = jnp.where(active, jnp.take_along_axis(written, index[:, None], axis=1)[:, 0], last)
        return state, guesser.after(guesses, index, active), last, passes + active

    start = (state, draft, first, zero)
    state, _, last, passes = jax.lax.while_loop(lambda carry: is_active(carry[0]).any(), check_guesses, start)
    out = model.backbone.forward(last[:, None], None, None, state.cache, None)
    return replace(state, cache=out.cache, logits=model.logits(out.last_hidden_state[:, 0])), passes


def accept(
    wanted: Float[Array, "b n v"], guesses: Guesses, keys: Array | None
) -> tuple[Int[Array, " b"], Int[Array, " b"]]:
    """Accept guesses from the left, so that the written tokens are distributed as `wanted`.

    Args:
        wanted: the model's distribution at each guess, and after the last one.
        guesses: the guesses `(b, k)`.
        keys: `(b,)` random keys; None: greedy.

    Returns:
        The number of accepted guesses, and the token to write after them.
    """
    p = jnp.take_along_axis(wanted[:, :-1], guesses.tokens[..., None], axis=2)[..., 0]  # (b, k)
    q = jnp.take_along_axis(guesses.probabilities, guesses.tokens[..., None], axis=2)[..., 0]
    if keys is None:
        u = jnp.zeros(p.shape)
    else:
        u = jax.vmap(lambda key: jax.random.uniform(jax.random.fold_in(key, 0), p.shape[1:]))(keys)
    accepted = jnp.cumprod(u * q < p, axis=1).sum(axis=1)
    at = accepted[:, None, None]
    p = jnp.take_along_axis(wanted, at, axis=1)[:, 0]  # (b, v)
    q = jnp.take_along_axis(jnp.pad(guesses.probabilities, ((0, 0), (0, 1), (0, 0))), at, axis=1)[:, 0]
    rest = jnp.maximum(p - q, 0)
    rest = jnp.where(rest.any(axis=1, keepdims=True), rest, p)  # p = q but for rounding
    if keys is None:
        return accepted, jnp.argmax(rest, axis=1).astype(jnp.int32)
    drawn = jax.vmap(lambda key, rest: jax.random.categorical(jax.random.fold_in(key, 1), jnp.log(rest)))
    return accepted, drawn(keys, rest).astype(jnp.int32)


def _probabilities(
    logits: Float[Array, "b n v"], guesses: Int[Array, "b k"], context: _Context
) -> Float[Array, "b n v"]:
    """Compute the model's distributions, each after the guesses to its left."""
    batch, positions, vocab = logits.shape
    flat = logits.reshape(-1, vocab)
    seen = context.seen
    if seen is not None:
        guessed = jax.nn.one_hot(guesses, vocab, dtype=jnp.int32)
        before = jnp.cumsum(jnp.pad(guessed, ((0, 0), (1, 0), (0, 0))), axis=1) > 0
        seen = (seen[:, None] | before).reshape(-1, vocab)
    process = None
    if context.processors:
        tokens = jnp.repeat(_write(context.tokens, guesses, context.counts), positions, axis=0)
        counts = (context.counts[:, None] + jnp.arange(positions)).reshape(-1)
        process = bind_rows(context.processors, tokens, counts)
    return token_probabilities(flat, context.sampler, seen, process).reshape(batch, positions, vocab)


def _add(
    state: DecodeState, written: Int[Array, "b n"], count: Int[Array, " b"], logits: Array, ends: Array
) -> DecodeState:
    """Append the first `count` of the written tokens to each row; `logits (b, n, v)` decided them."""
    order = jnp.arange(written.shape[1])
    valid = order < count[:, None]
    logprobs, seen = state.logprobs, state.seen
    if logprobs is not None:
        logprobs = _write(logprobs, logprob_of(logits, written), state.lengths, valid)
    if seen is not None:
        seen = seen.at[jnp.arange(seen.shape[0])[:, None], written].max(valid)
    return replace(
        state,
        tokens=_write(state.tokens, written, state.lengths, valid),
        lengths=state.lengths + count,
        finished=state.finished | (jnp.isin(written, ends) & valid).any(axis=1),
        logprobs=logprobs,
        seen=seen,
    )


def _write(buffer: Array, values: Array, start: Int[Array, " b"], valid: Array | bool = True) -> Array:
    """Write `values (b, n)` into the rows of `buffer` from `start` on; drop those invalid or outside."""
    index = start[:, None] + jnp.arange(values.shape[1])
    index = jnp.where(valid, index, buffer.shape[1])
    return buffer.at[jnp.arange(buffer.shape[0])[:, None], index].set(values, mode="drop")


def _fold(keys: Array, data: Any) -> Array:
    """Fold a number, or one per row, into the keys of all rows."""
    return jax.vmap(jax.random.fold_in, (0, 0 if jnp.ndim(data) else None))(keys, data)
