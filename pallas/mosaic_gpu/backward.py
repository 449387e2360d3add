r"""Run the scan's backward pass on Hopper: two kernels, and sums of vectors in XLA.

    saved states, x, B, C, dt (from the forward pass)          dy, the gradient of the final state
            |                                                         |
            |              `mosaic_backward_walk`: dx, and the gradient of the state after every chunk
            |                                                         |
            '----- `mosaic_backward_chunks`: dB, dC, and six vectors per strip and chunk
                                         |
                            XLA: the gradients of dt, A and D

No atomics: every element is written by one block, in a fixed order, so the results are deterministic. No
array over token pairs reaches HBM; states do once per 64 tokens, saved by the forward pass, and as many state
gradients. Saving one state per 256 tokens and recomputing the others halved the traffic, but a training step
took 1.4 times as long on an H200 (`benchmarks/results/h200.md`).
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from mamba2_jax.pallas import chunks
from mamba2_jax.pallas.mosaic_gpu import (
    backward_chunks as mosaic_backward_chunks,
)
from mamba2_jax.pallas.mosaic_gpu import (
    backward_walk as mosaic_backward_walk,
)
from mamba2_jax.pallas.mosaic_gpu.forward import whole_tiles
from mamba2_jax.pallas.mosaic_gpu.plan import CHUNK, MULTIPROCESSORS, STRIP


class Gradients(NamedTuple):
    """Gradients of the scan's inputs; those of A and D are per batch row, to be summed by the caller."""

    x: jax.Array  # (b, l, h, p) compute dtype
    dt: jax.Array  # (b, l, h) float32
    A: jax.Array  # (b, h) float32
    B: jax.Array  # (b, l, g, n) compute dtype
    C: jax.Array  # (b, l, g, n) compute dtype
    D: jax.Array  # (b, h, p) float32
    initial_state: jax.Array  # (b, h, p, n) float32


def backward(
    x: jax.Array,
    dt: jax.Array,
    A: jax.Array,
    B: jax.Array,
    C: jax.Array,
    D: jax.Array | None,
    saved_states: jax.Array,
    segment_ids: jax.Array | None,
    dy: jax.Array,
    final_gradient: jax.Array,
    *,
    splits: int | None = None,
    pieces: int | None = None,
    interpret: Any = None,
) -> Gradients:
    """Compute all gradients of the scan. Shapes and meaning as in `mosaic_gpu.forward.forward`.

    Args:
        x: `(b, l, h, p)`, bfloat16 or float16, p 64 or 128 (float32 too in the interpreter).
        dt: `(b, l, h)` float32.
        A: `(h,)`.
        B: `(b, l, g, n)`, n 64, 128 or 256.
        C: `(b, l, g, n)`.
        D: `(h,)`, `(h, p)` or None.
        saved_states: `(b, ceil(l / 64), h, p, n)`, from the forward pass.
        segment_ids: `(b, l)` int32 or None.
        dy: `(b, l, h, p)`, the gradient of y.
        final_gradient: `(b, h, p, n)` float32, the gradient of the final state.
        splits: number of blocks that share a group's heads in the chunk kernel; None for `choose_splits`.
        pieces: number of pieces per row in the walk; None for the choice of `plan.choose_pieces`.
        interpret: None on a GPU, or what `bridge.interpreter` returned.
    """
    batch, length, heads, head_dim = x.shape
    groups, state_dim = B.shape[2:]
    strips = heads * (head_dim // STRIP)

    def in_strips(tokens):
        return whole_tiles(tokens).reshape(batch, -1, strips, STRIP)

    decays = chunks.decays(dt, A, CHUNK)
    documents = None if segment_ids is None else chunks.document_ends(segment_ids, CHUNK)
    D_strips = None
    if D is not None:
        D_strips = jnp.broadcast_to(D.reshape(heads, -1).astype(jnp.float32), (heads, head_dim))
        D_strips = D_strips.reshape(strips, STRIP)

    x_strips, dy_strips = in_strips(x), in_strips(dy.astype(x.dtype))
    B_tiles, C_tiles = whole_tiles(B), whole_tiles(C)
    dx, state_gradients, initial_gradient = mosaic_backward_walk.walk(
        dy_strips,
        B_tiles,
        C_tiles,
        decays,
        documents,
        D_strips,
        final_gradient.astype(jnp.float32).reshape(batch, strips, STRIP, state_dim),
        pieces=pieces,
        interpret=interpret,
    )
    if splits is None:
        splits = choose_splits(batch, length, groups, strips // groups, state_dim)
    dB, dC, vectors = mosaic_backward_chunks.gradients(
        x_strips,
        dy_strips,
        saved_states.reshape(batch, -1, strips, STRIP, state_dim),
        state_gradients,
        B_tiles,
        C_tiles,
        decays,
        documents,
        splits=splits,
        interpret=interpret,
    )
    ddt, dA, dD = _sum_vectors(vectors, decays[:, :, :, 1], A.astype(jnp.float32))
    return Gradients(
        x=dx.reshape(batch, -1, heads, head_dim)[:, :length],
        dt=ddt[:, :length],
        A=dA,
        B=dB.sum(0)[:, :length].astype(B.dtype) if splits > 1 else dB[0, :, :length],
        C=dC.sum(0)[:, :length].astype(C.dtype) if splits > 1 else dC[0, :, :length],
        D=dD.reshape(batch, heads, head_dim),
        initial_state=initial_gradient.reshape(batch, heads, head_dim, state_dim),
    )


def choose_splits(batch: int, length: int, groups: int, strips_per_group: int, state_dim: int) -> int:
    """Return the number of blocks among which the chunk kernel splits a group's strips.

    A block processes one chunk of a group and fills an SM. With several splits, each writes its own float32
    sums, and this traffic pays off only while SMs are idle. So: as many as leave every block an SM of its
    own, none without strips.
    """
    blocks = batch * -(-length // CHUNK) * groups * max(1, state_dim // 128)
    splits = max(1, min(MULTIPROCESSORS // blocks, strips_per_group))
    return -(-strips_per_group // -(-strips_per_group // splits))


def _sum_vectors(vectors: jax.Array, dt: jax.Array, A: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return the gradients of dt `(b, l', h)`, A `(b, h)` and D `(b, strips, 64)` from the chunks' vectors.

    The decay of token `k` is a factor of every pair with its source before `k` and its target at or after
    `k`: two tokens of the chunk (`across`), entering state and token (`read`), token and leaving state
    (`left`), or both states (`over`). All are plain sums of products, without cancellation.
    """
    batch, heads, chunks, _ = dt.shape
    # Blocks that share a wide state's columns all hold the full sums that do not depend on these columns.
    inside, across, x_dy = (vectors[0, ..., i, :] for i in (0, 1, 5))
    read, left, over = (vectors[..., i, :].sum(0) for i in (2, 3, 4))  # (b, strips, c, 64)
    inside, across, read, left, over = (
        vector.reshape(batch, heads, -1, chunks, CHUNK).sum(2)
        for vector in (inside, across, read, left, over)
    )
    from_on = jnp.tril(jnp.ones((CHUNK, CHUNK), jnp.float32))  # [token, upper bound]
    exact = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)
    behind, before = exact(read, from_on), exact(dt * left, 1 - from_on)
    d_decay = across + behind + before + over.sum(-1, keepdims=True)  # of dt * A, (b, h, c, 64)
    ddt = inside + left + A[:, None, None] * d_decay
    return ddt.reshape(batch, heads, -1).swapaxes(1, 2), (dt * d_decay).sum((2, 3)), x_dy.sum(2)
