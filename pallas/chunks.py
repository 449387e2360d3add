"""What the kernels are told about each chunk of tokens: two numbers per token and head, two per token.

Computed by XLA before a kernel starts. In a chunk, token `s` enters the output at token `q >= s` with weight

    dt[s] * exp(A * (dt[s+1] + ... + dt[q])) = dt[s] * exp2(log_decay[q] - log_decay[s])

where `log_decay` is the base-2 logarithm of the decay from the chunk's start through a token. A token counts
for itself with exactly dt, however large the logarithms are.

Kernels take differences of `log_decay`, which is one float32. So that slow tokens keep their digits beside
some that wipe the state, each token's logarithm is bounded where exp2 of it is 0, and their sum is exact
until it is rounded, once. In a chunk of 64 tokens it lies above -10240, so that a weight is off by at most
`2**-10 * log(2)`: a fifth of bfloat16's rounding; 1.4 of float16's, behind 52 tokens that wipe the state, and
less behind fewer. It never rises, so that no difference has the wrong sign.
"""

import math

import jax
import jax.numpy as jnp
from jax import lax

LOWEST = -160.0  # exp2 of it is 0 in float32


def decays(dt: jax.Array, A: jax.Array, chunk: int) -> jax.Array:
    """Return `(b, h, c, 2, chunk)` float32: log_decay, dt. `dt (b, l, h)` is padded with zeros."""
    dt = split(dt.astype(jnp.float32), chunk).transpose(0, 3, 1, 2)  # (b, h, c, chunk)
    of_tokens = jnp.maximum(dt * (A.astype(jnp.float32) * math.log2(math.e))[:, None, None], LOWEST)
    # Multiples of 1/512 below 160: the sum of 64 has 23 bits. What is left is too small to be rounded much.
    coarse = jnp.floor(of_tokens * 512) / 512
    coarse, rest = jnp.cumsum(jnp.stack([coarse, of_tokens - coarse]), axis=-1)
    log_decay = lax.cummin(coarse + rest, axis=3)
    return jnp.stack([log_decay, dt], axis=3)


def document_ends(segment_ids: jax.Array, chunk: int) -> jax.Array:
    """Return where in the chunk each token's document ends, and where the first one starts.

    Returns:
        `(b, c, 2, chunk)` int32. The first row holds the position of the last token in the chunk of the same
        document. The second holds, at every token alike, the position of the first token in the chunk that
        starts a document, or `chunk` when none does.
    """
    starts = split(document_starts(segment_ids), chunk)  # (b, c, chunk); what is added starts nothing
    here = jnp.where(starts, jnp.arange(chunk, dtype=jnp.int32), chunk)
    at_or_after = lax.cummin(here, axis=2, reverse=True)
    after = jnp.concatenate([at_or_after[..., 1:], jnp.full_like(here[..., :1], chunk)], axis=-1)
    first = jnp.broadcast_to(at_or_after[..., :1], here.shape)
    return jnp.stack([after - 1, first], axis=2)


def document_starts(segment_ids: jax.Array) -> jax.Array:
    """Mark the tokens at which the state is reset, `(b, l)`: the first of each document but the row's first.

    Segment id 0 is padding and belongs to the document before it; any other id that differs from its left
    neighbour's starts a document. The initial state passes over padding to the row's first document.
    """
    left = jnp.pad(segment_ids[:, :-1], ((0, 0), (1, 0)))
    starts = (segment_ids != 0) & (segment_ids != left)
    return starts & (jnp.cumsum(starts, axis=1) > 1)


def split(array: jax.Array, chunk: int) -> jax.Array:
    """`(b, l, ...) -> (b, c, chunk, ...)`, the last chunk filled up with zeros."""
    missing = -array.shape[1] % chunk
    array = jnp.pad(array, ((0, 0), (0, missing)) + ((0, 0),) * (array.ndim - 2))
    return array.reshape(array.shape[0], -1, chunk, *array.shape[2:])
