"""Validation of the arguments of `generate` and `stream`, and padding of prompts to bucketed lengths."""

import operator
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from mamba2_jax.config import Mamba2Config
from mamba2_jax.generation.sampling import Sampler, make_sampler, positive_integer
from mamba2_jax.models.cache import Mamba2Cache, bucket
from mamba2_jax.models.inputs import check_inputs
from mamba2_jax.models.mamba2 import Mamba2ForCausalLM
from mamba2_jax.ops.checks import is_concrete
from mamba2_jax.typing import Array, Int


@dataclass(frozen=True)
class Request:
    """Validated arguments that `generate` and `stream` pass to `prefill` and `decode`."""

    input_ids: Int[Array, "b l"]
    attention_mask: Int[Array, "b l"] | None
    cache: Mamba2Cache | None
    sampler: Sampler
    key: Array | None
    budget: int
    """Maximum number of new tokens."""
    capacity: int
    """Slots in the key/value buffers of attention layers; 0 without such layers."""
    eos: tuple[int, ...]
    """Token ids that end a row."""
    pad: int
    """Token id that fills a row after its end."""


def check_request(
    name: str,
    model: Mamba2ForCausalLM,
    input_ids,
    attention_mask,
    cache,
    *,
    max_new_tokens,
    eos_token_id,
    pad_token_id,
    vocab_size,
    key,
    **sampling,
) -> Request:
    """Check the arguments of the function `name`, and pad concrete prompts to a bucketed length.

    Args:
        name: name of the calling function, for error messages.
        model: the model.
        input_ids: `(b, l)`.
        attention_mask: `(b, l)` of 0/1, or None.
        cache: with `b` rows, or None.
        max_new_tokens: see `generate`.
        eos_token_id: see `generate`.
        pad_token_id: see `generate`.
        vocab_size: see `generate`.
        key: see `generate`.
        **sampling: temperature and filters, see `generate`.

    Returns:
        The request; concrete prompts are padded on the right to `(b, bucket(l))`.

    Raises:
        ValueError: an invalid argument; the message names it.
    """
    config = model.config
    input_ids, attention_mask, _, cache, _ = check_inputs(
        name, config, input_ids, attention_mask, None, cache, None
    )
    if attention_mask is not None and is_concrete(attention_mask):
        empty = np.flatnonzero(~np.asarray(attention_mask).any(axis=1))
        if empty.size:
            raise ValueError(f"{name}: row {empty[0]} has no token: its attention_mask is all 0")
    vocab_size = config.unpadded_vocab_size if vocab_size is None else vocab_size
    if vocab_size is not None and positive_integer(name, "vocab_size", vocab_size) > config.vocab_size:
        raise ValueError(f"{name}: vocab_size={vocab_size} is above the model's {config.vocab_size}")
    sampler = make_sampler(name, vocab_size=vocab_size, **sampling)
    if sampler.temperature is None:
        key = None
    elif not _is_key(key):
        raise ValueError(f"{name}: sampling (temperature above 0) needs key, one like jax.random.key(0)")
    eos, pad = _end_and_pad(name, model, eos_token_id, pad_token_id)
    if is_concrete(input_ids) and is_concrete(attention_mask):
        input_ids, attention_mask = _pad_to_bucket(input_ids, attention_mask, pad)
    budget = positive_integer(name, "max_new_tokens", max_new_tokens)
    capacity = _capacity(config, cache, input_ids.shape[1], budget)
    return Request(input_ids, attention_mask, cache, sampler, key, budget, capacity, eos, pad)


def _capacity(config: Mamba2Config, cache: Mamba2Cache | None, length: int, budget: int) -> int:
    """Return the key/value slots needed for cached tokens, prompt and new tokens; 0 without attention."""
    if not config.attn_layer_idx:
        return 0
    if cache is None:
        return length + bucket(budget)
    if is_concrete(cache.position):
        return bucket(int(np.max(cache.position)) + length + budget)
    return (cache.capacity or 0) + length + bucket(budget)  # position is a tracer: take the upper bound


def _end_and_pad(name: str, model, eos_token_id, pad_token_id) -> tuple[tuple[int, ...], int]:
    """Return the eos ids and the pad id; the config's where an argument is None."""
    eos = model.config.eos_token_id if eos_token_id is None else eos_token_id
    eos = _token_ids(name, "eos_token_id", () if eos is None else eos, model.config.vocab_size)
    pad = model.config.pad_token_id if pad_token_id is None else pad_token_id
    if pad is None:
        pad = eos[0] if eos else 0
    (pad,) = _token_ids(name, "pad_token_id", (pad,), model.config.vocab_size)
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


def _pad_to_bucket(input_ids, attention_mask, pad: int) -> tuple[Array, Array | None]:
    """Pad prompts on the right to `(b, bucket(l))`; right padding does not change the results."""
    batch, length = input_ids.shape
    mask = (
        np.ones((batch, length), np.int32) if attention_mask is None else np.asarray(attention_mask, np.int32)
    )
    extra = ((0, 0), (0, bucket(length) - length))
    ids = np.pad(np.asarray(input_ids, np.int32), extra, constant_values=pad)
    if length == 1:
        return jnp.asarray(ids), None
    return jnp.asarray(ids), jnp.asarray(np.pad(mask, extra))
