"""Compute the kernels' inputs per chunk: log-decay and dt per token and head, document bounds per token.

XLA computes them before the kernel starts. In a chunk, token `s` enters the output at `q >= s` with weight

    dt[s] * exp(A * (dt[s+1] + ... + dt[q])) = dt[s] * exp2(log_decay[q] - log_decay[s])

where `log_decay` is the base-2 logarithm of the decay from the chunk's start through a token. A token enters
its own output with weight dt exactly, however large the logarithms are.

Kernels take differences of `log_decay`, a float32. To limit cancellation for slow tokens beside tokens that
wipe the state, each token's logarithm is clamped at -160, where exp2 is 0, and the cumulative sum is exact
until one final rounding. In a chunk of 64 tokens the sum stays above -10240, so that the relative error of a
weight is at most `2**-10 * log(2)`: a fifth of bfloat16's rounding error; 1.4 times float16's behind 52
tokens that wipe the state, and less behind fewer. `log_decay` never increases, so no difference has the wrong
sign.
"""

import math

import jax
import jax.numpy as jnp
from jax import lax

LOWEST = -160.0  # exp2 of it is 0 in float32


def decays(dt: jax.Array, A: jax.Array, chunk: int) -> jax.Array:
    """Return log_decay and dt as `(b, h, c, 2, chunk)` float32, from `dt (b, l, h)` padded with zeros."""
    dt = split(dt.astype(jnp.float32), chunk).transpose(0, 3, 1, 2)  # (b, h, c, chunk)
    of_tokens = jnp.maximum(dt * (A.astype(jnp.float32) * math.log2(math.e))[:, None, None], LOWEST)
    # Multiples of 1/512 below 160: a sum of 64 has 23 bits, hence is exact. The remainders stay below 1/512.
    coarse = jnp.floor(of_tokens * 512) / 512
    coarse, rest = jnp.cumsum(jnp.stack([coarse, of_tokens - coarse]), axis=-1)
    log_decay = lax.cummin(coarse + rest, axis=3)
    return jnp.stack([log_decay, dt], axis=3)


def document_ends(segment_ids: jax.Array, chunk: int) -> jax.Array:
    """Return, per chunk, the end of each token's document and the first document start.

    Returns:
        `(b, c, 2, chunk)` int32. Index 0 holds, per token, the position in the chunk of the last token of the
        same document. Index 1 holds, repeated for every token, the position of the first token in the chunk
        that starts a document, or `chunk` if none does.
    """
    starts = split(document_starts(segment_ids), chunk)  # (b, c, chunk); padding is False
    here = jnp.where(starts, jnp.arange(chunk, dtype=jnp.int32), chunk)
    at_or_after = lax.cummin(here, axis=2, reverse=True)
    after = jnp.concatenate([at_or_after[..., 1:], jnp.full_like(here[..., :1], chunk)], axis=-1)
    first = jnp.broadcast_to(at_or_after[..., :1], here.shape)
    return jnp.stack([after - 1, first], axis=2)


def document_starts(segment_ids: jax.Array) -> jax.Array:
    """Mark the tokens that reset the state, `(b, l)` bool: the start of each document but a row's first.

    Segment id 0 is padding and belongs to the preceding document; any other id that differs from its left
    neighbour's starts a document. The initial state is carried over padding to the row's first document.
    """
    left = jnp.pad(segment_ids[:, :-1], ((0, 0), (1, 0)))
    starts = (segment_ids != 0) & (segment_ids != left)
    return starts & (jnp.cumsum(starts, axis=1) > 1)


def split(array: jax.Array, chunk: int) -> jax.Array:
    """Split `(b, l, ...)` into `(b, c, chunk, ...)`, the last chunk padded with zeros."""
    missing = -array.shape[1] % chunk
    array = jnp.pad(array, ((0, 0), (0, missing)) + ((0, 0),) * (array.ndim - 2))
    return array.reshape(array.shape[0], -1, chunk, *array.shape[2:])
