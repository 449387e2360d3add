r"""SSD in chunks, in plain XLA: matrix products instead of a scan over tokens.

Unrolled, the recurrence is one masked matrix product, `y = (L * C B^T) (dt x)` with
`L[q, s] = exp(sum of dt A over s+1 .. q)` for `s <= q`. That matrix is semiseparable: below its
diagonal blocks it has rank `n`. So the row is split into chunks and

1. inside each chunk, the masked product is computed directly;
2. each chunk is reduced to its final state for an initial state of zeros;
3. a short recurrence over the chunks combines these into the state that enters each chunk;
4. the entering state's contribution to `y` is added at each token of the chunk.

Source: Dao & Gu 2024, arXiv:2405.21060, section 6.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from mamba2_jax.ops.on_cpu.gradients import product
from mamba2_jax.ops.scan.decay import log_decay, log_decays
from mamba2_jax.ops.segments import document_index
from mamba2_jax.typing import Array, Float, Int


class Chunks(NamedTuple):
    """Inputs of `c` neighbouring chunks of `q` tokens; heads are split by the group `g` of their B and C."""

    x: Array  # (b, c, g, q, h*p) compute dtype; h is heads per group here
    dt: Array  # (b, c, g, h, q) float32
    B: Array  # (b, c, g, q, n) compute dtype
    C: Array  # (b, c, g, q, n) compute dtype
    document: Array | None  # (b, c, q) int32, index of each token's document in the row
    document_before: Array | None  # (b, c) int32, the document of the token before the chunk


@partial(jax.jit, static_argnames=("chunk_size", "chunks_per_step"))
def ssd_chunked(
    x: Float[Array, "b l h p"],
    dt: Float[Array, "b l h"],
    A: Float[Array, " h"],
    B: Float[Array, "b l g n"],
    C: Float[Array, "b l g n"],
    D: Float[Array, "h *p"] | None,
    initial_state: Float[Array, "b h p n"],
    segment_ids: Int[Array, "b l"] | None,
    *,
    chunk_size: int,
    chunks_per_step: int,
) -> tuple[Float[Array, "b l h p"], Float[Array, "b h p n"]]:
    """Run the four steps over the row, `chunks_per_step` chunks per scan step. Arguments as in `ops.ssd`.

    With one chunk per step, all intermediates of a step stay in a CPU's cache; with all chunks in one step, a
    GPU runs large batched products. The numbers are the same.
    """
    batch, length, num_heads, head_dim = x.shape
    num_groups, state_dim = B.shape[2:]
    heads = num_heads // num_groups

    chunk_size = min(chunk_size, length)
    num_chunks = -(-length // chunk_size)
    chunks_per_step = min(chunks_per_step, num_chunks)
    num_steps = -(-num_chunks // chunks_per_step)
    padding = num_steps * chunks_per_step * chunk_size - length

    def split(array, pad_mode="constant"):
        """Reshape (b, l, ...) to (steps, b, c, q, ...); tokens padded at the end have dt = 0."""
        if padding:
            array = jnp.pad(array, ((0, 0), (0, padding)) + ((0, 0),) * (array.ndim - 2), mode=pad_mode)
        array = array.reshape(batch, num_steps, chunks_per_step, chunk_size, *array.shape[2:])
        return jnp.moveaxis(array, 1, 0)

    grouped_dt = split(dt.reshape(batch, length, num_groups, heads))  # (steps, b, c, q, g, h)
    grouped_dt = jnp.moveaxis(grouped_dt, 3, -1)  # (steps, b, c, g, h, q)
    chunks = Chunks(
        x=split(x.reshape(batch, length, num_groups, heads * head_dim)).swapaxes(3, 4),
        dt=grouped_dt,
        B=split(B).swapaxes(3, 4),
        C=split(C).swapaxes(3, 4),
        document=None,
        document_before=None,
    )
    if segment_ids is not None:
        document = split(document_index(segment_ids), "edge")  # (steps, b, c, q)
        last = jnp.moveaxis(document[..., -1], 0, 1).reshape(batch, -1)  # (b, steps*c)
        before = jnp.pad(last[:, :-1], ((0, 0), (1, 0)), constant_values=1)
        before = jnp.moveaxis(before.reshape(batch, num_steps, chunks_per_step), 1, 0)
        chunks = chunks._replace(document=document, document_before=before)

    A = A.reshape(num_groups, heads)
    D = None if D is None else D.reshape(num_groups, heads, -1).astype(dt.dtype)  # (g, h, 1 or p)
    state = initial_state.reshape(batch, num_groups, heads * head_dim, state_dim).swapaxes(2, 3)
    # Recompute a step in the backward pass instead of saving its pair matrices: memory O(l), not O(l q).
    step = jax.checkpoint(partial(_step, A=A, D=D), prevent_cse=False)
    # Unroll by two: what in the second step does not depend on the first one's state runs on other CPU cores.
    # Not for an odd number of steps: XLA would slice off the last step, which copies all inputs.
    unroll = 2 - num_steps % 2
    state, y = jax.lax.scan(step, state, chunks, unroll=unroll)  # y (steps, b, c, q, g, h, p)

    y = jnp.moveaxis(y, 0, 1).reshape(batch, -1, num_heads, head_dim)[:, :length]
    return y, state.swapaxes(2, 3).reshape(batch, num_heads, head_dim, state_dim)


def _step(
    state: Float[Array, "b g n hp"], chunks: Chunks, A: Float[Array, "g h"], D: Float[Array, "g h _"] | None
) -> tuple[Float[Array, "b g n hp"], Float[Array, "b c q g h p"]]:
    """Run the four steps on the chunks of one scan step; return the final state and `y`."""
    x, dt, B, C, document, document_before = chunks
    compute = x.dtype
    batch, num_chunks, num_groups, chunk_size, _ = x.shape
    heads = dt.shape[3]
    head_dim = x.shape[-1] // heads

    # Log decays, <= 0: from the chunk's start through a token and from the token to the chunk's end, both
    # (b, c, g, h, q); and between two tokens, (b, c, g, h, q, s).
    log_from_start, log_to_end, log_between = log_decays(log_decay(dt, A[..., None]))

    # Which pairs of tokens interact, which tokens read the entering state, and which add to the final state.
    pairs = jnp.tril(jnp.ones((chunk_size, chunk_size), bool))  # (q, s)
    if document is not None and document_before is not None:
        pairs = pairs & (document[..., :, None] == document[..., None, :])  # (b, c, q, s)
        pairs = pairs[:, :, None]
        entered = (document == document_before[..., None])[:, :, None, None]  # (b, c, 1, 1, q)
        leaves = (document == document[..., -1:])[:, :, None, None]  # (b, c, 1, 1, s)
        passes = (document[..., -1] == document_before)[:, :, None, None]  # (b, c, 1, 1)
    else:
        entered = leaves = passes = True

    # 1. Inside each chunk.
    scores = jnp.where(pairs, product("bcgqn,bcgsn->bcgqs", C, B), 0.0)  # once per group
    weights = _repeat(scores, heads, axis=3) * jnp.exp(log_between)  # (b, c, g, h, q, s)
    x_heads = x.reshape(batch, num_chunks, num_groups, chunk_size, heads, head_dim)
    x_heads = jnp.moveaxis(x_heads, -2, 3)  # (b, c, g, h, s, p)
    x_dt = x_heads * _repeat(dt, head_dim, axis=-1)
    y = product("bcghqs,bcghsp->bcghqp", weights.astype(compute), x_dt.astype(compute))

    # 2. The state each chunk adds: every token, decayed to the chunk's end.
    to_end = jnp.where(leaves, jnp.exp(log_to_end), 0.0)  # (b, c, g, h, s)
    x_to_end = (x_dt * _repeat(to_end, head_dim, axis=-1)).astype(compute)
    x_to_end = jnp.moveaxis(x_to_end, 3, -2).reshape(x.shape)
    left = product("bcgns,bcgsk->bcgnk", B.swapaxes(-1, -2), x_to_end)  # k = h*p

    # 3. The recurrence over chunks.
    kept = jnp.where(passes, jnp.exp(log_from_start[..., -1]), 0.0)  # (b, c, g, h)
    kept = _repeat(kept, head_dim, axis=-1).reshape(*kept.shape[:3], -1)  # (b, c, g, k)
    kept = _repeat(kept, left.shape[-2], axis=-2)  # (b, c, g, n, k)
    entering, state = _pass_states(state, kept, left)

    # 4. The entering state, read out at each token.
    from_start = jnp.where(entered, jnp.exp(log_from_start), 0.0)  # (b, c, g, h, q)
    read = product("bcgqn,bcgnk->bcgqk", C, entering.astype(compute))
    read = read.reshape(batch, num_chunks, num_groups, chunk_size, heads, head_dim)
    y = y + jnp.moveaxis(read, -2, 3) * _repeat(from_start, head_dim, axis=-1)

    if D is not None:
        # In this order the gradient is summed over tokens first, which leaves few numbers to sum over rows.
        skip = jnp.broadcast_to(D, (batch, num_chunks, *D.shape))  # (b, c, g, h, 1 or p)
        if D.shape[-1] == 1:
            skip = _repeat(skip[..., 0], head_dim, axis=-1)
        y = y + x_heads * _repeat(skip, chunk_size, axis=-2)
    return state, jnp.moveaxis(y.astype(compute), 4, 2)  # (b, c, q, g, h, p)


def _pass_states(
    state: Float[Array, "b g n k"], kept: Float[Array, "b c g n k"], left: Float[Array, "b c g n k"]
) -> tuple[Float[Array, "b c g n k"], Float[Array, "b g n k"]]:
    """Apply `state <- kept * state + left` chunk by chunk; return the state entering each, and the last."""
    if left.shape[1] == 1:
        return state[:, None], kept[:, 0] * state + left[:, 0]

    def chunk(state, inputs):
        kept, left = inputs
        return kept * state + left, state

    state, entering = jax.lax.scan(chunk, state, (jnp.moveaxis(kept, 1, 0), jnp.moveaxis(left, 1, 0)))
    return jnp.moveaxis(entering, 0, 1), state


def _repeat(array: Array, count: int, axis: int) -> Array:
    """Broadcast `array (*left, *right)` to `(*left, count, *right)`, the new axis at `axis`.

    Spelled out, because a training step took a quarter longer with the broadcasts of `*` (XLA on a CPU, JAX
    0.10).
    """
    axis %= array.ndim + 1
    others = tuple(other for other in range(array.ndim + 1) if other != axis)
    shape = (*array.shape[:axis], count, *array.shape[axis:])
    return jax.lax.broadcast_in_dim(array, shape, others)
