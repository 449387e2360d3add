"""Choice of the next token from logits: greedy or sampling, with filters in transformers' order.

Repetition penalty, logits processors, temperature, top-k, top-p, min-p; each step filters the output of the
previous one.
"""

import math
import operator
from collections.abc import Callable
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp

from mamba2_jax.ops.checks import is_concrete
from mamba2_jax.typing import Array, Bool, Float, Int


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Sampler:
    """Sampling options as a pytree. Floats are leaves, so changing a value does not recompile.

    Args:
        temperature: divides the logits; None is greedy.
        top_k: keep the k most likely tokens.
        top_p: keep the most likely tokens that together reach this probability.
        min_p: keep tokens with at least this fraction of the highest probability.
        repetition_penalty: divides positive and multiplies negative logits of tokens already in the row.
        vocab_size: ids from this one on are padding and never chosen; None: every id is a token.
        ends: ids that end a text; tokens also in the padding.
    """

    temperature: Float[Array, ""] | None = None
    top_p: Float[Array, ""] | None = None
    min_p: Float[Array, ""] | None = None
    repetition_penalty: Float[Array, ""] | None = None
    top_k: int | None = field(default=None, metadata={"static": True})
    vocab_size: int | None = field(default=None, metadata={"static": True})
    ends: tuple[int, ...] = field(default=(), metadata={"static": True})


def make_sampler(
    name: str,
    *,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float | None = None,
    vocab_size: int | None = None,
    ends: tuple[int, ...] = (),
) -> Sampler:
    """Check the sampling options of the function `name`; options without effect become None.

    Raises:
        ValueError: an option out of range, or a filter with greedy decoding; the message names it.
    """
    _check_range(name, "temperature", temperature, lambda t: 0 <= t < math.inf, "at least 0 (0 is greedy)")
    _check_range(name, "top_p", top_p, lambda p: 0 < p <= 1, "in (0, 1]")
    _check_range(name, "min_p", min_p, lambda p: 0 <= p <= 1, "in [0, 1]")
    _check_range(
        name,
        "repetition_penalty",
        repetition_penalty,
        lambda r: 0 < r < math.inf,
        "positive (1 changes nothing)",
    )
    if temperature is None:
        raise ValueError(f"{name}: temperature=None must be a number; 0 is greedy")
    if top_k is not None:
        top_k = positive_integer(name, "top_k", top_k)
    greedy = is_concrete(temperature) and temperature == 0
    if greedy:
        filters = {"top_k": top_k, "top_p": top_p, "min_p": min_p}
        for option, value in filters.items():
            if value is not None:
                raise ValueError(f"{name}: {option}={value} needs sampling: set temperature above 0")
    return Sampler(
        temperature=None if greedy else _traced(temperature),
        top_p=_traced(top_p, neutral=1),
        min_p=_traced(min_p, neutral=0),
        repetition_penalty=_traced(repetition_penalty, neutral=1),
        top_k=top_k,
        vocab_size=vocab_size,
        ends=ends,
    )


def choose_token(
    logits: Float[Array, "b v"],
    sampler: Sampler,
    seen: Bool[Array, "b v"] | None,
    keys: Array | None,
    process: Callable[[Array], Array] | None = None,
) -> Int[Array, " b"]:
    """Choose the next token of each row.

    Args:
        logits: `(b, v)` float32.
        sampler: sampling options.
        seen: `(b, v)`, true for ids already in the row; used by the repetition penalty only.
        keys: `(b,)` random keys, one per row, so that a row's text does not depend on the other rows.
        process: the logits processors, from logits to logits.

    Returns:
        `(b,)` int32 token ids.
    """
    logits = adjust_logits(logits, sampler, seen, process)
    if sampler.temperature is None or keys is None:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    drawn = jax.vmap(jax.random.categorical)(keys, temper_and_filter(logits, sampler))
    return jnp.where(sampler.temperature > 0, drawn, jnp.argmax(logits, axis=-1)).astype(jnp.int32)


def token_probabilities(
    logits: Float[Array, "b v"],
    sampler: Sampler,
    seen: Bool[Array, "b v"] | None,
    process: Callable[[Array], Array] | None = None,
) -> Float[Array, "b v"]:
    """Compute the distribution from which `choose_token` draws; greedy: all on one token."""
    logits = adjust_logits(logits, sampler, seen, process)
    greedy = jax.nn.one_hot(jnp.argmax(logits, axis=-1), logits.shape[-1])
    if sampler.temperature is None:
        return greedy
    drawn = jax.nn.softmax(temper_and_filter(logits, sampler), axis=-1)
    return jnp.where(sampler.temperature > 0, drawn, greedy)


def adjust_logits(
    logits: Float[Array, "b v"],
    sampler: Sampler,
    seen: Bool[Array, "b v"] | None,
    process: Callable[[Array], Array] | None = None,
) -> Float[Array, "b v"]:
    """Exclude padding of the vocabulary, apply the repetition penalty, then the logits processors."""
    if sampler.vocab_size is not None and sampler.vocab_size < logits.shape[-1]:
        is_token = jnp.arange(logits.shape[-1]) < sampler.vocab_size
        if sampler.ends:
            is_token = is_token.at[jnp.asarray(sampler.ends)].set(True)
        logits = jnp.where(is_token, logits, -jnp.inf)
    if sampler.repetition_penalty is not None and seen is not None:
        penalty = sampler.repetition_penalty
        penalized = jnp.where(logits < 0, logits * penalty, logits / penalty)
        # finite also after a low temperature, whatever the penalty
        logits = jnp.where(seen, jnp.minimum(penalized, 1e30), logits)
    return logits if process is None else process(logits)


def temper_and_filter(logits: Float[Array, "b v"], sampler: Sampler) -> Float[Array, "b v"]:
    """Divide logits by the temperature, and set those that the filters exclude to -inf."""
    if sampler.temperature is None:
        return filter_logits(logits, sampler)
    return filter_logits(logits / jnp.clip(sampler.temperature, 1e-6, 1e30), sampler)


def filter_logits(logits: Float[Array, "b v"], sampler: Sampler) -> Float[Array, "b v"]:
    """Set logits excluded by top-k, top-p and min-p, in that order, to -inf; at least one token stays."""
    if sampler.top_k is not None:
        k = min(sampler.top_k, logits.shape[-1])
        kth = jax.lax.top_k(logits, k)[0][:, -1:]
        logits = jnp.where(logits < kth, -jnp.inf, logits)
    if sampler.top_p is not None:
        # From the least likely token on, as transformers: of equally likely tokens, the last ids stay.
        order = jnp.argsort(logits, axis=-1)
        ascending = jnp.take_along_axis(logits, order, axis=-1)
        excluded = jnp.cumsum(jax.nn.softmax(ascending, axis=-1), axis=-1) <= 1 - sampler.top_p
        excluded = excluded.at[:, -1].set(False)
        rows = jnp.arange(logits.shape[0])[:, None]
        excluded = jnp.zeros_like(excluded).at[rows, order].set(excluded, unique_indices=True)
        logits = jnp.where(excluded, -jnp.inf, logits)
    if sampler.min_p is not None:
        probabilities = jax.nn.softmax(logits, axis=-1)
        least = sampler.min_p * probabilities.max(axis=-1, keepdims=True)
        logits = jnp.where(probabilities < least, -jnp.inf, logits)
    return logits


def positive_integer(name: str, option: str, value) -> int:
    """Return `value` as an int of at least 1.

    Raises:
        ValueError: not an integer, a tracer, or below 1; the message names `option`.
    """
    try:
        number = operator.index(value)
    except TypeError:
        raise ValueError(f"{name}: {option}={value!r} must be an integer known before tracing") from None
    if number < 1:
        raise ValueError(f"{name}: {option}={number} must be at least 1")
    return number


def _check_range(name: str, option: str, value, is_valid, wanted: str) -> None:
    if value is None:
        return
    if not isinstance(value, int | float) and getattr(value, "ndim", None) != 0:
        raise ValueError(f"{name}: {option}={value!r} must be one number, {wanted}")
    if is_concrete(value) and not is_valid(float(value)):
        raise ValueError(f"{name}: {option}={value} must be {wanted}")


def _traced(value, neutral: float | None = None) -> Array | None:
    """Return an option as a float32 leaf, within float32's range; None for one without effect."""
    if value is None or (is_concrete(value) and value == neutral):
        return None
    if not is_concrete(value):
        return jnp.asarray(value, jnp.float32)
    limits = jnp.finfo(jnp.float32)
    return jnp.asarray(min(max(float(value), float(limits.tiny)), float(limits.max)), jnp.float32)
