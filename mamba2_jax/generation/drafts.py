"""Drafts of speculative decoding: a smaller model, or tokens that followed the same tokens earlier."""

from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from mamba2_jax.generation.prefill import read_prompts, to_the_left
from mamba2_jax.generation.processors import Processor, bind_rows
from mamba2_jax.generation.sampling import Sampler, choose_token, token_probabilities
from mamba2_jax.models.cache import Mamba2Cache, bucket
from mamba2_jax.models.mamba2 import Mamba2ForCausalLM
from mamba2_jax.ops.checks import is_concrete
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


class TokenHistory(NamedTuple):
    """Tokens that each row has read, padded on the right, and their number: the state of `PromptLookup`."""

    tokens: Int[Array, "b n"]
    lengths: Int[Array, " b"]

    def joined(self, tokens: Int[Array, "b m"], lengths: Int[Array, " b"]) -> "TokenHistory":
        """Append the first `lengths` of `tokens` to each row."""
        old, new = self.tokens.shape[1], tokens.shape[1]
        position = jnp.arange(old + new)
        start = self.lengths[:, None]
        text = jnp.where(
            position < start,
            self.tokens[:, jnp.minimum(position, old - 1)],
            jnp.take_along_axis(tokens, jnp.clip(position - start, 0, new - 1), axis=1),
        )
        return TokenHistory(text, self.lengths + lengths)


Draft: TypeAlias = Mamba2ForCausalLM | PromptLookup
DraftState: TypeAlias = Mamba2Cache | TokenHistory


class Guesses(NamedTuple):
    """Drafted tokens, and what the draft needs to go on."""

    tokens: Int[Array, "b k"]
    probabilities: Float[Array, "b k v"]
    """Distributions from which the tokens were drawn."""
    caches: Mamba2Cache | None
    """States of a draft model after the last token and each guess."""


class Context(NamedTuple):
    """What a draft knows of the rows: new tokens and their counts, ids seen, and options."""

    tokens: Int[Array, "b new"]
    counts: Int[Array, " b"]
    seen: Bool[Array, "b v"] | None
    keys: Array | None
    sampler: Sampler
    processors: tuple[Processor, ...]
    vocab_size: int


def check_draft_cache(name: str, draft: Any, draft_cache: Any, batch: int) -> DraftState | None:
    """Check that `draft_cache` is a state for `draft` with `batch` rows; shorten the buffer of a history.

    Raises:
        ValueError: the state of another kind of draft, or of other rows.
    """
    if draft_cache is None:
        return None
    if draft is None:
        raise ValueError(f"{name}: draft_cache needs draft, whose state it is")
    wanted = TokenHistory if isinstance(draft, PromptLookup) else Mamba2Cache
    if not isinstance(draft_cache, wanted):
        raise ValueError(
            f"{name}: draft_cache is a {type(draft_cache).__name__}; a draft {type(draft).__name__} has a "
            f"{wanted.__name__}"
        )
    read = draft_cache.lengths if isinstance(draft_cache, TokenHistory) else draft_cache.position
    if read.shape != (batch,):
        raise ValueError(f"{name}: draft_cache has {read.shape[0]} rows, the prompts have {batch}")
    if isinstance(draft_cache, TokenHistory):
        if not is_concrete(read) or not is_concrete(draft_cache.tokens):
            return draft_cache
        size = bucket(max(1, int(np.max(read))))  # few sizes, so that few programs are compiled
        tokens = np.asarray(draft_cache.tokens)[:, :size]
        tokens = np.pad(tokens, ((0, 0), (0, size - tokens.shape[1])))
        return TokenHistory(jnp.asarray(tokens), draft_cache.lengths)
    return draft_cache


def draft_state_of(draft: Draft, ids: list[int]) -> DraftState:
    """Return the state of a draft after one row of tokens, read without it."""
    size = bucket(len(ids))
    padded = np.zeros((1, size), np.int32)
    padded[0, : len(ids)] = ids
    if isinstance(draft, PromptLookup):
        return TokenHistory(jnp.asarray(padded), jnp.array([len(ids)], jnp.int32))
    mask = (np.arange(size) < len(ids)).astype(np.int32)[None]
    return draft.backbone(jnp.asarray(padded), jnp.asarray(mask)).cache


def start_draft(
    draft: Draft,
    input_ids: Int[Array, "b l"],
    mask: Array | None,
    before: DraftState | None,
    *,
    piece: int,
    capacity: int,
) -> DraftState:
    """Show prompts to a draft, after what it has read `before`; call inside `jit`."""
    if isinstance(draft, PromptLookup):
        mask = jnp.ones(input_ids.shape, bool) if mask is None else mask != 0
        read = TokenHistory(*to_the_left(input_ids, mask))
        return before.joined(*read) if isinstance(before, TokenHistory) else read
    cache = before if isinstance(before, Mamba2Cache) else None
    return read_prompts(draft, input_ids, mask, cache, piece=piece, capacity=capacity)[0]


def guess(
    draft: Draft, state: DraftState, last: Int[Array, " b"], num_draft: int, context: Context
) -> Guesses:
    """Guess `num_draft` tokens after `last`, which the draft has not read."""
    if isinstance(draft, PromptLookup):
        return _look_up(draft, state, num_draft, context)
    return _decode_guesses(draft, state, last, num_draft, context)


def after_guesses(
    state: DraftState, guesses: Guesses, index: Int[Array, " b"], active: Bool[Array, " b"]
) -> DraftState:
    """Return the state after guess `index`; rows that are not active keep theirs."""
    if guesses.caches is None or not isinstance(state, Mamba2Cache):
        return state  # a history is that of the prompts until the end
    return guesses.caches.after_token(index).where(active, state)


def read_by_draft(
    draft: Draft, state: DraftState, tokens: Int[Array, "b n"], lengths: Int[Array, " b"]
) -> DraftState:
    """Show the first `lengths` of `tokens` to a draft."""
    if isinstance(state, TokenHistory) or isinstance(draft, PromptLookup):
        return state.joined(tokens, lengths) if isinstance(state, TokenHistory) else state
    mask = jnp.arange(tokens.shape[1]) < lengths[:, None]
    return draft.backbone.forward(tokens, mask, None, state, None).cache


def _decode_guesses(
    model: Mamba2ForCausalLM, start: Any, last: Int[Array, " b"], num_draft: int, context: Context
) -> Guesses:
    def one_token(carry, index):
        cache, token, tokens, seen = carry
        out = model.backbone.forward(token[:, None], None, None, cache, None)
        process = bind_rows(context.processors, tokens, context.counts + index)
        logits = model.logits(out.last_hidden_state[:, 0])
        keys = None if context.keys is None else fold(context.keys, index)
        token = choose_token(logits, context.sampler, seen, keys, process)
        probabilities = token_probabilities(logits, context.sampler, seen, process)
        tokens = write(tokens, token[:, None], context.counts + index)
        seen = None if seen is None else seen.at[jnp.arange(len(token)), token].set(True)
        return (out.cache, token, tokens, seen), (token, probabilities, out.cache)

    carry = (start, last, context.tokens, context.seen)
    # one more than the guesses: the state after the last one, should all be accepted
    _, (tokens, probabilities, caches) = jax.lax.scan(one_token, carry, jnp.arange(num_draft + 1))
    tokens, probabilities, states = jax.tree.map(
        lambda a: jnp.moveaxis(a, 0, 1), (tokens, probabilities, caches)
    )
    # keys and values have no axis of tokens: slots beyond a row's position are unused
    states = replace(states, attention=jax.tree.map(lambda a: a[-1], caches.attention))
    return Guesses(tokens[:, :-1], probabilities[:, :-1], states)


def _look_up(lookup: PromptLookup, prompts: Any, num_draft: int, context: Context) -> Guesses:
    """Return the tokens after the latest earlier occurrence of the longest suffix that occurs twice."""
    text, known = prompts.joined(context.tokens, context.counts)  # (b, l + new), (b,)
    position = jnp.arange(text.shape[1])
    best = jnp.full(known.shape, -1)
    for size in range(1, lookup.ngram + 1):
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


def write(buffer: Array, values: Array, start: Int[Array, " b"], valid: Array | bool = True) -> Array:
    """Write `values (b, n)` into the rows of `buffer` from `start` on; drop those invalid or outside."""
    index = start[:, None] + jnp.arange(values.shape[1])
    index = jnp.where(valid, index, buffer.shape[1])
    return buffer.at[jnp.arange(buffer.shape[0])[:, None], index].set(values, mode="drop")


def fold(keys: Array, data: Any) -> Array:
    """Fold a number, or one per row, into the keys of all rows."""
    return jax.vmap(jax.random.fold_in, (0, 0 if jnp.ndim(data) else None))(keys, data)
