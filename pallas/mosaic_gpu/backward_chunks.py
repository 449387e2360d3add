r"""Run the second backward kernel: gradients of B and C, and the terms of the gradients of dt, A and D.

A block owns one chunk of 64 tokens of a group and loops over the group's strips of 64 channels. Within a
chunk, let `a[i]` be the decay from its start through token `i`, `w[j]` the decay after token `j` to its end,
`H` the entering state, `G` the gradient of the leaving state, and, for `j <= i` in one document,

    pairs[j, i] = (x[j] . dy[i]) a[i] / a[j]            scores[j, i] = B[j] . C[i]

the gradients are sums over the strips,

    dB[j] = sum  w[j] dt[j] G^T x[j]  +  sum_i dt[j] pairs[j, i] C[i]
    dC[i] = sum  a[i] H^T dy[i]       +  sum_j dt[j] pairs[j, i] B[j]

and the gradients of dt and A are summed by XLA from five vectors per strip:

    inside[j]  = sum_i pairs[j, i] scores[j, i]                       pairs of the chunk, by source
    across[k]  = sum over j < k <= i  dt[j] pairs[j, i] scores[j, i]  pairs that span the decay of token k
    read[i]    = a[i] C[i]^T H^T dy[i]                                entering state and token i
    left[j]    = w[j] B[j]^T G^T x[j]                                 token j and leaving state
    over       = a[end] <H, G>                                        both states; 64 partial sums

These sum the terms that a token's decay multiplies, never differences of larger sums, so strong decay causes
no cancellation. A sixth vector holds `sum_i x[i] dy[i]` per channel, the gradient of D.

`H` and `G` of every chunk are in HBM, from the forward pass and the backward walk, so that blocks are
independent. A copying warpgroup prefetches up to three strips; two computing warpgroups take half of
state_dim each, and half of the targets `i` of the pairs:

    for each strip    pairs,  d_scores += dt pairs,  inside,  across,  over
                      dC += a (dy H),  read
                      dB += w dt (x G),  left
    at the end        dB += d_scores C,  dC += d_scores^T B
"""

import functools
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.typing import DTypeLike
from mamba2_jax.pallas.mosaic_gpu import bridge as gpu
from mamba2_jax.pallas.mosaic_gpu.backward_sums import HALF, VECTORS, ChunkPlace, Sums
from mamba2_jax.pallas.mosaic_gpu.bridge import plgpu
from mamba2_jax.pallas.mosaic_gpu.plan import CHUNK, STRIP, ChunkPlan

COPY_REGISTERS, COMPUTE_REGISTERS = 24, 240  # per thread; sum 3 * 168, as a block starts with


def gradients(x, dy, states, state_gradients, B, C, decays, documents, *, splits=1, interpret=None):
    """Compute dB, dC and the six vectors described in the module's docstring.

    Args:
        x: `(b, l, strips, 64)`, compute dtype; `l` is a multiple of 8 and at least 64.
        dy: as x.
        states: `(b, c, strips, 64, n)`, compute dtype: the state that enters each chunk.
        state_gradients: as states: the gradient of the state that leaves each chunk.
        B: `(b, l, g, n)`, compute dtype.
        C: `(b, l, g, n)`.
        decays: `(b, h, c, 2, 64)` float32: log2 of the decay from the chunk's start, and dt.
        documents: `(b, c, 2, 64)` int32, as from `chunks.document_ends`, or None.
        splits: number of blocks that share a group's strips, so that there are enough to fill a GPU.
        interpret: None on a GPU, or what `bridge.interpreter` returned.

    Returns:
        dB: `(splits, b, c * 64, g, n)`, to be summed over the splits; float32 if `splits > 1`, otherwise
            compute dtype.
        dC: as dB.
        vectors: `(parts, b, strips, c, VECTORS, 64)` float32, to be summed over the parts.
    """
    batch, length, strips, _ = x.shape
    groups, state_dim = B.shape[2:]
    plan = ChunkPlan(
        chunks=-(-length // CHUNK),
        strips_per_group=strips // groups,
        strips_per_head=strips // decays.shape[1],
        state_dim=state_dim,
        splits=splits,
    )
    inputs = {"x": x, "dy": dy, "states": states, "state_gradients": state_gradients, "B": B, "C": C}
    inputs["decays"] = decays
    if documents is not None:
        inputs["documents"] = documents
    sums = (splits, batch, plan.chunks * CHUNK, groups, state_dim)
    sums = jax.ShapeDtypeStruct(sums, x.dtype if splits == 1 else jnp.float32)
    vectors = (plan.parts, batch, strips, plan.chunks, VECTORS, CHUNK)
    outputs = {"dB": sums, "dC": sums, "vectors": jax.ShapeDtypeStruct(vectors, jnp.float32)}

    def ssd_backward_chunks(*refs, **smem):
        hbm = SimpleNamespace(**dict(zip([*inputs, *outputs], refs, strict=True)))
        _block(plan, hbm, SimpleNamespace(**smem), interpret is not None)

    run = gpu.kernel(
        ssd_backward_chunks,
        outputs=tuple(outputs.values()),
        scratch=_scratch(plan, x.dtype, documents is not None),
        grid={"part": plan.parts * splits, "batch": batch, "group": groups, "chunk": plan.chunks},
        warpgroups=3,
        interpret=interpret,
    )
    return run(*inputs.values())


def _scratch(plan: ChunkPlan, dtype: DTypeLike, documents: bool) -> dict[str, Any]:
    """Declare shared memory and barriers of a block; tiles are 32 columns wide, so that halves are slices."""
    tiles = functools.partial(gpu.tiles, dtype=dtype, width=HALF)
    stages = plan.stages
    scratch = {
        # Shared by all strips.
        "B": tiles(plan.halves, CHUNK, plan.half),
        "C": tiles(plan.halves, CHUNK, plan.half),
        "scores": tiles(2, CHUNK, HALF),
        "before": tiles(CHUNK, CHUNK),
        # One slot per pipeline stage, filled by TMA.
        "x": tiles(stages, CHUNK, STRIP),
        "dy": tiles(stages, CHUNK, STRIP),
        "entering": tiles(stages, 2, STRIP, plan.half),
        "leaving": tiles(stages, 2, STRIP, plan.half),
        # Two copies: one buffer cannot be loaded both as a vector over rows and as one over columns.
        "decays": plgpu.SMEM((stages, 2, CHUNK), jnp.float32),
        "column_decays": plgpu.SMEM((stages, CHUNK), jnp.float32),
        # Results of the current strip.
        "pairs": tiles(2, CHUNK, HALF),
        "vectors": plgpu.SMEM((2, 2, VECTORS, CHUNK), jnp.float32),
        "summed": plgpu.SMEM((2, VECTORS // 2, CHUNK), jnp.float32),
        "resident": plgpu.Barrier(num_arrivals=2 * plan.halves + documents),
        "full": plgpu.Barrier(num_arrivals=8, num_barriers=stages),
        "empty": plgpu.Barrier(num_arrivals=2, num_barriers=stages),
        "both": plgpu.Barrier(num_arrivals=2),
    }
    if documents:
        scratch["documents"] = plgpu.SMEM((2, CHUNK), jnp.int32)
    return scratch


def _block(plan: ChunkPlan, hbm: SimpleNamespace, smem: SimpleNamespace, interpreted: bool) -> None:
    """Run a warpgroup of the block: two compute, the third copies."""
    warpgroup = lax.axis_index("warpgroup")

    @pl.when(warpgroup < 2)
    def _():
        plgpu.set_max_registers(COMPUTE_REGISTERS, action="increase")
        Sums(plan, hbm, smem, _place(plan), warpgroup, interpreted).run()

    @pl.when(warpgroup == 2)
    def _():
        plgpu.set_max_registers(COPY_REGISTERS, action="decrease")
        _copy(plan, hbm, smem, _place(plan))


def _place(plan: ChunkPlan) -> ChunkPlace:
    """Compute the indices of the block's work from its grid indices."""
    group, part = lax.axis_index("group"), lax.axis_index("part")
    split = lax.div(part, jnp.int32(plan.parts))
    past = split * plan.strips_per_split
    return ChunkPlace(
        batch=lax.axis_index("batch"),
        group=group,
        chunk=lax.axis_index("chunk"),
        part=lax.rem(part, jnp.int32(plan.parts)),
        split=split,
        strip=group * plan.strips_per_group + past,
        strips=jnp.minimum(plan.strips_per_split, plan.strips_per_group - past),
    )


def _copy(plan: ChunkPlan, hbm: SimpleNamespace, smem: SimpleNamespace, place: ChunkPlace) -> None:
    """Run the copying warpgroup: load B and C once, then prefetch strips into free slots."""
    tokens = pl.ds(place.chunk * CHUNK, CHUNK)
    for half in range(plan.halves):
        columns = pl.ds(half * plan.half, plan.half)
        for array, tile in ((hbm.B, smem.B), (hbm.C, smem.C)):
            source = array.at[place.batch, tokens, place.group, columns]
            plgpu.copy_gmem_to_smem(source, tile.at[half], smem.resident)
    if hasattr(hbm, "documents"):
        plgpu.copy_gmem_to_smem(hbm.documents.at[place.batch, place.chunk], smem.documents, smem.resident)

    @pl.loop(jnp.int32(0), place.strips)
    def _(index):
        strip, slot = place.strip + index, lax.rem(index, jnp.int32(plan.stages))
        fill = functools.partial(plgpu.copy_gmem_to_smem, barrier=smem.full.at[slot])
        pl.when(index >= plan.stages)(lambda: plgpu.barrier_wait(smem.empty.at[slot]))
        decays = hbm.decays.at[place.batch, lax.div(strip, jnp.int32(plan.strips_per_head)), place.chunk]
        fill(decays, smem.decays.at[slot])
        fill(decays.at[0], smem.column_decays.at[slot])
        fill(hbm.x.at[place.batch, tokens, strip], smem.x.at[slot])
        fill(hbm.dy.at[place.batch, tokens, strip], smem.dy.at[slot])
        for half in range(2):
            columns = pl.ds((place.part * 2 + half) * plan.half, plan.half)
            for array, tile in ((hbm.states, smem.entering), (hbm.state_gradients, smem.leaving)):
                fill(array.at[place.batch, place.chunk, strip, :, columns], tile.at[slot, half])

    @pl.loop(jnp.maximum(place.strips - plan.stages, 0), place.strips)
    def _(index):
        plgpu.barrier_wait(smem.empty.at[lax.rem(index, jnp.int32(plan.stages))])
