"""Validation of the arguments of `generate` and `stream`, and padding of prompts to bucketed lengths."""

import operator
import warnings
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mamba2_jax.generation.drafts import Draft, DraftState, check_draft_cache
from mamba2_jax.generation.options import Options
from mamba2_jax.generation.prefill import PIECE, padded_length, piece_size
from mamba2_jax.generation.processors import as_pytrees
from mamba2_jax.generation.sampling import Sampler, make_sampler, positive_integer
from mamba2_jax.generation.search import Search, check_search
from mamba2_jax.models.cache import Mamba2Cache, bucket
from mamba2_jax.models.inputs import batch_and_length, check_inputs
from mamba2_jax.models.mamba2 import Mamba2ForCausalLM
from mamba2_jax.ops.checks import is_concrete
from mamba2_jax.typing import Array, Float, Int


@dataclass(frozen=True)
class Request:
    """Validated arguments that `generate` and `stream` pass to `prefill` and `decode`."""

    input_ids: Int[Array, "b l"] | None
    attention_mask: Int[Array, "b l"] | None
    cache: Mamba2Cache | None
    inputs_embeds: Float[Array, "b l d"] | None
    sampler: Sampler
    processors: tuple[Any, ...]
    """Logits processors as pytrees."""
    key: Array | None
    budget: int
    """Maximum number of new tokens."""
    size: int
    """Tokens that the buffers hold, at least `budget`; few values, so that few programs are compiled."""
    piece: int
    """Tokens per piece of the prompt."""
    capacity: int
    """Slots in the key/value buffers of attention layers; 0 without such layers."""
    eos: tuple[int, ...]
    """Token ids that end a row."""
    pad: int
    """Token id that fills a row after its end."""
    search: Search
    draft: Draft | None
    draft_cache: DraftState | None


def check_request(
    name: str, model: Mamba2ForCausalLM, input_ids: Any, attention_mask: Any, options: Options
) -> Request:
    """Check the arguments of the function `name`, and pad concrete prompts to a bucketed length.

    Args:
        name: name of the calling function, for error messages.
        model: the model.
        input_ids: `(b, l)`.
        attention_mask: `(b, l)` of 0/1, or None.
        options: the options.

    Returns:
        The request; concrete prompts are padded on the right to `(b, bucket(l))`.

    Raises:
        ValueError: an invalid argument; the message names it.
    """
    config = model.config
    search = check_search(name, model, options)
    input_ids, attention_mask, _, cache, inputs_embeds = check_inputs(
        name, config, input_ids, attention_mask, None, options.cache, options.inputs_embeds
    )
    if attention_mask is not None and is_concrete(attention_mask):
        empty = np.flatnonzero(~np.asarray(attention_mask).any(axis=1))
        if empty.size:
            raise ValueError(f"{name}: row {empty[0]} has no token: its attention_mask is all 0")
    vocab_size = options.vocab_size
    if vocab_size is not None and positive_integer(name, "vocab_size", vocab_size) > config.vocab_size:
        raise ValueError(f"{name}: vocab_size={vocab_size} is above the model's {config.vocab_size}")
    eos, pad = _end_and_pad(name, model, options.eos_token_id, options.pad_token_id)
    if vocab_size is not None and options.eos_token_id is not None and max(eos, default=0) >= vocab_size:
        raise ValueError(
            f"{name}: eos_token_id={max(eos)} lies outside the ids 0..{vocab_size - 1} that can be chosen"
        )
    vocab_size = config.unpadded_vocab_size if vocab_size is None else vocab_size
    sampler = make_sampler(name, vocab_size=vocab_size, ends=eos, **options.sampling)
    key = options.key
    if sampler.temperature is None:
        key = None
    elif not _is_key(key):
        raise ValueError(f"{name}: sampling (temperature above 0) needs key, one like jax.random.key(0)")
    batch, length = batch_and_length(input_ids, inputs_embeds)
    draft_cache = check_draft_cache(name, options.draft, options.draft_cache, batch)
    if options.draft is not None and draft_cache is None and _has_read(cache):
        warnings.warn(
            f"{name}: the draft has not seen what cache has read, so that fewer of its guesses may be right; "
            "give draft_cache too",
            stacklevel=3,
        )
    piece = length if length <= PIECE else piece_size(length)
    if all(is_concrete(given) for given in (input_ids, attention_mask, inputs_embeds)):
        length = padded_length(length)
        input_ids, attention_mask, inputs_embeds = _pad(input_ids, attention_mask, inputs_embeds, pad, length)
    budget = positive_integer(name, "max_new_tokens", options.max_new_tokens)
    return Request(
        input_ids=input_ids,
        attention_mask=attention_mask,
        cache=cache,
        inputs_embeds=inputs_embeds,
        sampler=sampler,
        processors=as_pytrees(name, options.logits_processors),
        key=key,
        budget=budget,
        size=max(16, 1 << (budget - 1).bit_length()),
        piece=bucket(piece) if piece < length else length,
        # the model may read a guess for each token drafted, and forget it
        capacity=_capacity(model, options.draft, cache, length, budget + search.num_draft_tokens + 1),
        eos=eos,
        pad=pad,
        search=search,
        draft=options.draft,
        draft_cache=draft_cache,
    )


def _has_read(cache: Mamba2Cache | None) -> bool:
    """Return whether a cache has read tokens; False for a tracer, whose values are not known."""
    return cache is not None and is_concrete(cache.position) and bool(np.any(cache.position))


def _capacity(
    model: Mamba2ForCausalLM, draft: Any, cache: Mamba2Cache | None, length: int, budget: int
) -> int:
    """Return the key/value slots needed for cached tokens, prompt and new tokens; 0 without attention."""
    configs = [given.config for given in (model, draft) if isinstance(given, Mamba2ForCausalLM)]
    if not any(config.attends for config in configs):
        return 0
    past = 0
    if cache is not None:
        known = is_concrete(cache.position)
        past = int(np.max(cache.position)) if known else cache.capacity or 0  # a tracer: the upper bound
    return bucket(past + length + budget)


def _end_and_pad(name: str, model, eos_token_id, pad_token_id) -> tuple[tuple[int, ...], int]:
    """Return the eos ids and the pad id; the model's own where an argument is None."""
    limit = model.config.vocab_size
    eos = model.end_ids if eos_token_id is None else eos_token_id
    eos = _token_ids(name, "eos_token_id", () if eos is None else eos, limit)
    pad = model.config.pad_token_id if pad_token_id is None else pad_token_id
    if pad is None:
        pad = eos[0] if eos else 0
    (pad,) = _token_ids(name, "pad_token_id", (pad,), limit)
    return eos, pad


def _token_ids(name: str, option: str, ids, vocab_size: int) -> tuple[int, ...]:
    try:
        values = tuple(operator.index(i) for i in (ids if np.ndim(ids) else (ids,)))
    except TypeError:
        raise ValueError(f"{name}: {option}={ids!r} must be token ids known before tracing") from None
    for value in values:
        if not 0 <= value < vocab_size:
            raise ValueError(f"{name}: {option}={value} lies outside the vocabulary 0..{vocab_size - 1}")
    return values


def _is_key(key) -> bool:
    """Return whether `key` is a single random key, typed or a raw uint32 vector."""
    if not hasattr(key, "dtype"):
        return False
    typed = jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
    return key.ndim == 0 if typed else key.ndim == 1 and key.dtype == jnp.uint32


def _pad(input_ids, attention_mask, inputs_embeds, pad: int, length: int) -> tuple:
    """Pad concrete prompts on the right to `(b, length)`; right padding does not change the results."""
    batch, given = batch_and_length(input_ids, inputs_embeds)
    extra = ((0, 0), (0, length - given))
    if input_ids is not None:
        ids = np.pad(np.asarray(input_ids, np.int32), extra, constant_values=pad)
        input_ids = jnp.asarray(ids)
    else:
        inputs_embeds = jnp.pad(inputs_embeds, (*extra, (0, 0)))
    if given == 1:
        return input_ids, None, inputs_embeds
    mask = (
        np.ones((batch, given), np.int32) if attention_mask is None else np.asarray(attention_mask, np.int32)
    )
    return input_ids, jnp.asarray(np.pad(mask, extra)), inputs_embeds
