"""Beam search with the sequences and scores of transformers, the rows of the state reordered at each step."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from mamba2_jax.generation.prefill import PIECE, piece_size, read_prompts
from mamba2_jax.generation.processors import Processor, bind
from mamba2_jax.generation.sampling import Sampler, adjust_logits
from mamba2_jax.generation.search import Search
from mamba2_jax.generation.state import DecodeState
from mamba2_jax.models.cache import Mamba2Cache
from mamba2_jax.models.mamba2 import Mamba2ForCausalLM
from mamba2_jax.typing import Array, Bool, Float, Int

_NEVER = -1e9  # score of a slot without a text, as in transformers


class Beams(NamedTuple):
    """Texts per prompt, best first."""

    tokens: Int[Array, "b k new"]
    lengths: Int[Array, "b k"]
    scores: Float[Array, "b k"]

    def take(self, index: Int[Array, "b n"]) -> "Beams":
        """Select texts of each prompt."""
        return jax.tree.map(lambda a: jax.vmap(lambda row, i: row[i])(a, index), self)


class _Carry(NamedTuple):
    cache: Mamba2Cache  # of b * k rows
    logits: Float[Array, "bk v"]
    seen: Bool[Array, "bk v"] | None
    running: Beams  # scores are sums of log-probabilities
    ended: Beams
    has_ended: Bool[Array, "b k"]
    improvable: Bool[Array, " b"]  # a running text may still beat the ended ones
    goes_on: Bool[Array, ""]
    step: Int[Array, ""]


def beam_search(
    model: Mamba2ForCausalLM,
    state: DecodeState,
    sampler: Sampler,
    processors: tuple[Processor, ...],
    budget: Int[Array, ""],
    search: Search,
    *,
    eos: tuple[int, ...],
    pad: int,
) -> tuple[DecodeState, Float[Array, " n"]]:
    """Search the texts of highest score after prompts that `state` has read; call inside `jit`.

    Returns:
        The state of the best `num_return_sequences` texts per prompt, and their scores.
    """
    batch, vocab = state.logits.shape
    width, size = search.num_beams, state.tokens.shape[1]
    keep = min(max(2, 1 + len(eos)) * width, width * vocab)  # enough that `width` of them go on
    first = jnp.arange(width) == 0  # one beam at the start, else all would be the same
    empty = Beams(
        jnp.full((batch, width, size), pad, jnp.int32),
        jnp.zeros((batch, width), jnp.int32),
        jnp.full((batch, width), _NEVER, jnp.float32),
    )

    def one_token(carry: _Carry) -> _Carry:
        step = carry.step
        flat = carry.running.tokens.reshape(batch * width, size)
        log_p = adjust_logits(
            jax.nn.log_softmax(carry.logits), sampler, carry.seen, bind(processors, flat, step)
        ).reshape(batch, width, vocab)
        sums, index = jax.lax.top_k((log_p + carry.running.scores[..., None]).reshape(batch, -1), keep)
        beam, token = index // vocab, (index % vocab).astype(jnp.int32)  # (b, keep)
        found = carry.running.take(beam)
        found = Beams(found.tokens.at[:, :, step].set(token), found.lengths + 1, sums)
        ends = jnp.isin(token, jnp.asarray(eos, jnp.int32)) if eos else jnp.zeros(token.shape, bool)
        ends |= step + 1 >= budget

        penalized = sums + ends * _NEVER
        best = jax.lax.top_k(penalized, width)[1]
        running = found._replace(scores=penalized).take(best)
        rows = (jnp.arange(batch)[:, None] * width + jnp.take_along_axis(beam, best, axis=1)).reshape(-1)
        ended, has_ended = _merge(carry, found, ends, search)

        next_token = running.tokens[:, :, step].reshape(-1)
        out = model.backbone.forward(next_token[:, None], None, None, carry.cache[rows], None)
        seen = None
        if carry.seen is not None:
            seen = carry.seen[rows].at[jnp.arange(batch * width), next_token].set(True)
        improvable = carry.improvable & _may_improve(running, ended, has_ended, step + 1, budget, search)
        done = (search.early_stopping is True) & has_ended.all()
        return _Carry(
            cache=out.cache,
            logits=model.logits(out.last_hidden_state[:, 0]),
            seen=seen,
            running=running,
            ended=ended,
            has_ended=has_ended,
            improvable=improvable,
            goes_on=improvable.any() & ~done & ~ends.all(),
            step=step + 1,
        )

    forked = state.repeat(width)
    start = _Carry(
        cache=forked.cache,
        logits=forked.logits,
        seen=forked.seen,
        running=empty._replace(scores=jnp.broadcast_to(jnp.where(first, 0.0, _NEVER), (batch, width))),
        ended=empty,
        has_ended=jnp.zeros((batch, width), bool),
        improvable=jnp.ones((batch,), bool),
        goes_on=jnp.ones((), bool),
        step=jnp.zeros((), jnp.int32),
    )
    found = jax.lax.while_loop(lambda carry: carry.goes_on, one_token, start).ended
    return _state_after(model, state, found, search)


def _merge(
    carry: _Carry, found: Beams, ends: Bool[Array, "b keep"], search: Search
) -> tuple[Beams, Bool[Array, "b k"]]:
    """Keep the best of the ended texts and those of the first `k` continuations that end now."""
    width = search.num_beams
    ends = ends & (jnp.arange(ends.shape[1]) < width)
    scores = found.scores / (carry.step + 1).astype(jnp.float32) ** search.length_penalty
    closed = ~carry.improvable
    if search.early_stopping is True:
        closed |= carry.has_ended.all(axis=1)
    scores = scores + closed[:, None] * _NEVER + ~ends * _NEVER
    both = jax.tree.map(
        lambda a, b: jnp.concatenate([a, b], axis=1), carry.ended, found._replace(scores=scores)
    )
    best = jax.lax.top_k(both.scores, width)[1]
    has_ended = jnp.concatenate([carry.has_ended, ends], axis=1)
    return both.take(best), jnp.take_along_axis(has_ended, best, axis=1)


def _may_improve(running, ended, has_ended, length, budget, search: Search) -> Bool[Array, " b"]:
    """Return whether the best running text could beat an ended one, by transformers' rule."""
    reach = budget if search.early_stopping == "never" and search.length_penalty > 0 else length
    best = running.scores[:, :1] / reach.astype(jnp.float32) ** search.length_penalty
    worst = jnp.where(has_ended, ended.scores.min(axis=1, keepdims=True), _NEVER)
    return (best > worst).any(axis=1)


def _state_after(
    model: Mamba2ForCausalLM, state: DecodeState, found: Beams, search: Search
) -> tuple[DecodeState, Float[Array, " n"]]:
    """Read the chosen texts once more from the prompts' state, in parallel: no ended beam's state is kept."""
    count = search.num_return_sequences
    tokens, lengths, scores = (a[:, :count].reshape(-1, *a.shape[2:]) for a in found)
    size = tokens.shape[1]
    mask = jnp.arange(size) < lengths[:, None]
    state = state.repeat(count)
    piece = size if size <= PIECE else piece_size(size)
    cache, hidden = read_prompts(model, tokens, mask, state.cache, piece=piece)
    after = DecodeState(
        cache=cache,
        logits=model.logits(hidden),
        finished=jnp.ones(lengths.shape, bool),
        seen=None,
        tokens=tokens,
        lengths=lengths,
        logprobs=None,
        step=state.step,
    )
    return after, scores
