"""Speculative decoding: a cheap draft guesses tokens, the model checks several of them in one call.

A call reads the last written token and `k` guesses, and keeps the state after each. Guesses are accepted from
the left, a guess `d` with probability `min(1, p(d) / q(d))`, where `p` and `q` are the model's and the
draft's distributions after all filters. The first refused one is replaced by a token drawn from
`max(p - q, 0)`, so that every token is distributed as in plain decoding; greedy texts are the same, but for
ties within rounding. Each row then takes the state after its last accepted token.

Source: Leviathan et al. 2023, arXiv:2211.17192.
"""

from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mamba2_jax.generation.drafts import (
    Context,
    Draft,
    DraftState,
    Guesses,
    TokenHistory,
    after_guesses,
    fold,
    guess,
    read_by_draft,
    write,
)
from mamba2_jax.generation.loop import keys_of_rows, logprob_of
from mamba2_jax.generation.processors import Processor, bind_rows
from mamba2_jax.generation.sampling import Sampler, choose_token, token_probabilities
from mamba2_jax.generation.state import DecodeState
from mamba2_jax.models.mamba2 import Mamba2ForCausalLM
from mamba2_jax.typing import Array, Float, Int


class Speculation(NamedTuple):
    """Carry of speculative decoding: both states have read all tokens but the last written one."""

    state: DecodeState
    draft: Any
    """State of the draft, `DraftState`."""
    last: Int[Array, " b"]
    """The last written token."""
    passes: Int[Array, " b"]
    """Calls of the model."""


def begin(
    state: DecodeState,
    draft_state: DraftState,
    sampler: Sampler,
    key: Array | None,
    processors: tuple[Processor, ...] = (),
    *,
    eos: tuple[int, ...],
) -> Speculation:
    """Choose the first token after prompts that model and draft have read; call inside `jit`."""
    zero = jnp.zeros(state.lengths.shape, jnp.int32)
    row_keys = keys_of_rows(key, len(zero))
    keys = None if row_keys is None else fold(row_keys, zero)
    first = choose_token(state.logits, sampler, state.seen, keys, bind_rows(processors, state.tokens, zero))
    state = _add(state, first[:, None], zero + 1, state.logits[:, None], jnp.asarray(eos, jnp.int32))
    return Speculation(state, draft_state, first, zero)


def speculate(
    model: Mamba2ForCausalLM,
    draft: Draft,
    start: Speculation,
    sampler: Sampler,
    key: Array | None,
    budget: Int[Array, ""],
    until: Int[Array, ""],
    processors: tuple[Processor, ...] = (),
    *,
    num_draft: int,
    eos: tuple[int, ...],
) -> Speculation:
    """Decode as `loop.decode`, several tokens per call of the model; call inside `jit`.

    Goes on until each row has ended or has `until` new tokens, or a few more, up to `budget`.
    """
    batch, vocab = start.state.logits.shape
    row_keys = keys_of_rows(key, batch)
    ends = jnp.asarray(eos, jnp.int32)
    until = jnp.minimum(until, budget)

    def is_active(state):
        return ~state.finished & (state.lengths < until)

    def check_guesses(carry):
        state, draft_state, last, passes = carry
        active = is_active(state)
        keys = None if row_keys is None else fold(row_keys, state.lengths)
        context = Context(state.tokens, state.lengths, state.seen, keys, sampler, processors, vocab)
        guesses = guess(draft, draft_state, last, num_draft, context)
        read = jnp.concatenate([last[:, None], guesses.tokens], axis=1)  # (b, k + 1)
        out = model.backbone.forward(read, None, None, state.cache, None, every_state=True)
        logits = model.logits(out.last_hidden_state)  # (b, k + 1, v)
        wanted = _probabilities(logits, guesses.tokens, context)
        accepted, token = accept(wanted, guesses, None if keys is None else fold(keys, num_draft + 1))

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
        return Speculation(state, after_guesses(draft_state, guesses, index, active), last, passes + active)

    return jax.lax.while_loop(lambda carry: is_active(carry.state).any(), check_guesses, start)


def finish(model: Mamba2ForCausalLM, draft: Draft, done: Speculation) -> tuple[DecodeState, DraftState]:
    """Read the last written tokens too: return the states of model and draft after exactly the text."""
    state = done.state
    out = model.backbone.forward(done.last[:, None], None, None, state.cache, None)
    state = replace(state, cache=out.cache, logits=model.logits(out.last_hidden_state[:, 0]))
    if isinstance(done.draft, TokenHistory):  # of the prompts
        return state, read_by_draft(draft, done.draft, state.tokens, state.lengths)
    return state, read_by_draft(draft, done.draft, done.last[:, None], jnp.ones_like(state.lengths))


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
    logits: Float[Array, "b n v"], guesses: Int[Array, "b k"], context: Context
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
        tokens = jnp.repeat(write(context.tokens, guesses, context.counts), positions, axis=0)
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
        logprobs = write(logprobs, logprob_of(logits, written), state.lengths, valid)
    if seen is not None:
        seen = seen.at[jnp.arange(seen.shape[0])[:, None], written].max(valid)
    return replace(
        state,
        tokens=write(state.tokens, written, state.lengths, valid),
        lengths=state.lengths + count,
        finished=state.finished | (jnp.isin(written, ends) & valid).any(axis=1),
        logprobs=logprobs,
        seen=seen,
    )
