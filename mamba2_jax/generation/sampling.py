"""Choice of the next token from logits: greedy or sampling, with filters in transformers' order.

Repetition penalty, temperature, top-k, top-p, min-p; each step filters the output of the previous one.
"""

import math
import operator
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
    """

    temperature: Float[Array, ""] | None = None
    top_p: Float[Array, ""] | None = None
    min_p: Float[Array, ""] | None = None
    repetition_penalty: Float[Array, ""] | None = None
    top_k: int | None = field(default=None, metadata={"static": True})
    vocab_size: int | None = field(default=None, metadata={"static": True})


def make_sampler(
    name: str,
    *,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float | None = None,
    vocab_size: int | None = None,
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
        temperature=None if greedy else jnp.asarray(temperature, jnp.float32),
        top_p=_traced(top_p, neutral=1),
        min_p=_traced(min_p, neutral=0),
        repetition_penalty=_traced(repetition_penalty, neutral=1),
        top_k=top_k,
        vocab_size=vocab_size,
    )


def choose_token(
    logits: Float[Array, "b v"], sampler: Sampler, seen: Bool[Array, "b v"] | None, keys: Array | None
) -> Int[Array, " b"]:
    """Choose the next token of each row.

    Args:
        logits: `(b, v)` float32.
        sampler: sampling options.
        seen: `(b, v)`, true for ids already in the row; used by the repetition penalty only.
        keys: `(b,)` random keys, one per row, so that a row's text does not depend on the other rows.

    Returns:
        `(b,)` int32 token ids.
    """
    if sampler.vocab_size is not None and sampler.vocab_size < logits.shape[-1]:
        is_token = jnp.arange(logits.shape[-1]) < sampler.vocab_size
        logits = jnp.where(is_token, logits, -jnp.inf)
    if sampler.repetition_penalty is not None and seen is not None:
        penalty = sampler.repetition_penalty
        logits = jnp.where(seen, jnp.where(logits < 0, logits * penalty, logits / penalty), logits)
    if sampler.temperature is None or keys is None:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    filtered = filter_logits(logits / jnp.maximum(sampler.temperature, 1e-6), sampler)
    drawn = jax.vmap(jax.random.categorical)(keys, filtered)
    return jnp.where(sampler.temperature > 0, drawn, jnp.argmax(logits, axis=-1)).astype(jnp.int32)


def filter_logits(logits: Float[Array, "b v"], sampler: Sampler) -> Float[Array, "b v"]:
    """Set logits excluded by top-k, top-p and min-p, in that order, to -inf; at least one token stays."""
    if sampler.top_k is not None:
        k = min(sampler.top_k, logits.shape[-1])
        kth = jax.lax.top_k(logits, k)[0][:, -1:]
        logits = jnp.where(logits < kth, -jnp.inf, logits)
    if sampler.top_p is not None:
        probabilities = jax.nn.softmax(logits, axis=-1)
        ordered = jnp.sort(probabilities, axis=-1, descending=True)
        before = jnp.cumsum(ordered, axis=-1) - ordered  # total probability of the more likely tokens
        least = jnp.min(jnp.where(before < sampler.top_p, ordered, jnp.inf), axis=-1, keepdims=True)
        logits = jnp.where(probabilities < least, -jnp.inf, logits)
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


def _traced(value, neutral: float) -> Array | None:
    if value is None or (is_concrete(value) and value == neutral):
        return None
    return jnp.asarray(value, jnp.float32)
