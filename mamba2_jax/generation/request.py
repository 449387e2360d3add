"""What a caller of `generate` or `stream` asks for, checked, its prompts padded to a shared length."""

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
    """A checked request: what `generate` and `stream` hand to `prefill` and `decode`."""

    input_ids: Int[Array, "b l"]
    attention_mask: Int[Array, "b l"] | None
    cache: Mamba2Cache | None
    sampler: Sampler
    key: Array | None
    budget: int
    """New tokens at most."""
    capacity: int
    """Tokens that the buffers of attention layers shall hold; 0 without such layers."""
    eos: tuple[int, ...]
    """Ids that end a row."""
    pad: int
    """Fills a row after its end."""


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
    """Check everything a caller of `name` asked for, and pad concrete prompts to a shared length.

    Args:
        name: of the function, for messages.
        model: the model.
        input_ids: `(b, l)`.
        attention_mask: `(b, l)` of 0/1, or None.
        cache: of `b` rows, or None.
        max_new_tokens: and all further options as in `generate`.
        eos_token_id: see there.
        pad_token_id: see there.
        vocab_size: see there.
        key: see there.
        **sampling: see there.

    Returns:
        The request; prompts known before tracing are padded on the right to `(b, bucket(l))`.

    Raises:
        ValueError: arguments that do not fit, named.
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
    """Tokens that the buffers of attention layers shall hold: all before, the prompt, and the answer."""
    if not config.attends:
        return 0
    if cache is None:
        return length + bucket(budget)
    if is_concrete(cache.position):
        return bucket(int(np.max(cache.position)) + length + budget)
    return (cache.capacity or 0) + length + bucket(budget)  # inside a jit: the most that can be needed


def _end_and_pad(name: str, model, eos_token_id, pad_token_id) -> tuple[tuple[int, ...], int]:
    """The ids that end a row, and the one that fills it afterwards; the config's where not given."""
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
    """Whether `key` is one random key: a typed one, or the older vector of words."""
    if not hasattr(key, "dtype"):
        return False
    typed = jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
    return key.ndim == 0 if typed else key.ndim == 1 and key.dtype == jnp.uint32


def _pad_to_bucket(input_ids, attention_mask, pad: int) -> tuple[Array, Array | None]:
    """Pad on the right, which is exact, to a length that other prompts share."""
    batch, length = input_ids.shape
    mask = (
        np.ones((batch, length), np.int32) if attention_mask is None else np.asarray(attention_mask, np.int32)
    )
    extra = ((0, 0), (0, bucket(length) - length))
    ids = np.pad(np.asarray(input_ids, np.int32), extra, constant_values=pad)
    if length == 1:
        return jnp.asarray(ids), None
    return jnp.asarray(ids), jnp.asarray(np.pad(mask, extra))
