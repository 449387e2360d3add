"""Run the scan's forward pass on Hopper: one kernel that walks the chunks with the state in registers.

A block has three warpgroups. One copies; two compute, each a strip of 64 channels of a head, and share B and
C in shared memory (`plan` cuts the work, `forward_walk` holds the code of the warpgroups):

    HBM         x  B  C  decays                                    y    saved states
                      |                                            ^         ^
    copying           | TMA, `stages` chunks ahead                 | TMA     |
                      v          "full" ->   <- "empty"            |         |
    SMEM        [x B C ..]    [x B C ..]    [x B C ..]             y         |
                      |                                            ^         |
    computing         +---> walk a strip, chunk after chunk -------+---------+
                            (the state stays in registers)

All matrices are computed transposed, channels in rows: the left operand of a product (the state, x, or
decayed x) then comes from registers, which minimizes shared-memory reads. Counted per chunk of 64 tokens at
head_dim 64 and state_dim 128: tensor cores 896 clocks, shared memory 1020 to 1150, HBM about 1400 at
3.0 TB/s. On an H200 an iteration takes 2.2 us, 4400 clocks: the bound is none of these but latency, the chain
of dependent products and elementwise work within an iteration.

Budget of a block: 504 registers for one thread of each warpgroup, 232 per computing thread (64 of them for
the state at state_dim 128) and 40 per copying thread; at state_dim 256, where the state takes 128, 240 and
24, and a few constants spill. 227 KB of shared memory hold 4, 3 or 2 stages at state_dim 64, 128 or 256. One
block fills an SM.

Precision: products take 16-bit operands and accumulate in float32; decays and the carried state are float32.
"""

from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.typing import DTypeLike
from mamba2_jax.pallas.chunks import decays, document_ends
from mamba2_jax.pallas.mosaic_gpu import bridge as gpu
from mamba2_jax.pallas.mosaic_gpu.bridge import plgpu
from mamba2_jax.pallas.mosaic_gpu.forward_walk import Walk, copy, place_of_block
from mamba2_jax.pallas.mosaic_gpu.plan import CHUNK, STRIP, STRIPS_PER_BLOCK, Plan, make_plan


def forward(
    x: jax.Array,
    dt: jax.Array,
    A: jax.Array,
    B: jax.Array,
    C: jax.Array,
    D: jax.Array | None,
    initial_state: jax.Array,
    segment_ids: jax.Array | None,
    *,
    save_states: bool = False,
    pieces: int | None = None,
    interpret: Any = None,
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """Run the forward scan. Shapes and meaning as in `ops.ssd`.

    Args:
        x: `(b, l, h, p)`, bfloat16 or float16, p 64 or 128 (float32 too in the interpreter).
        dt: `(b, l, h)` float32, 0 at padding.
        A: `(h,)`.
        B: `(b, l, g, n)`, n 64, 128 or 256.
        C: `(b, l, g, n)`.
        D: `(h,)`, `(h, p)` or None.
        initial_state: `(b, h, p, n)` float32.
        segment_ids: `(b, l)` int32 or None.
        save_states: whether to return the states that enter the chunks, for the backward pass.
        pieces: number of pieces per row; None for the choice of `plan.choose_pieces`.
        interpret: None on a GPU, or what `bridge.interpreter` returned.

    Returns:
        y: `(b, l, h, p)` in the dtype of x.
        final_state: `(b, h, p, n)` float32.
        saved_states: `(b, ceil(l / 64), h, p, n)` in the dtype of x: the state before tokens 0, 64, 128...,
            before the reset by a document that starts there. None without `save_states`.
    """
    batch, length, heads, head_dim = x.shape
    groups, state_dim = B.shape[2:]
    plan = make_plan(
        batch,
        length,
        heads,
        groups,
        head_dim,
        state_dim,
        itemsize=x.dtype.itemsize,
        documents=segment_ids is not None,
        save_states=save_states,
        pieces=pieces,
    )
    inputs = {
        "x": whole_tiles(x).reshape(batch, -1, plan.strips, STRIP),
        "B": whole_tiles(B),
        "C": whole_tiles(C),
        "decays": decays(dt, A, CHUNK),
        "initial": initial_state.astype(jnp.float32).reshape(batch, plan.strips, STRIP, state_dim),
    }
    if D is not None:
        D = jnp.broadcast_to(D.reshape(heads, -1).astype(jnp.float32), (heads, head_dim))
        inputs["D"] = D.reshape(plan.strips, STRIP)
    if segment_ids is not None:
        inputs["documents"] = document_ends(segment_ids, CHUNK)

    outputs = {
        "y": jax.ShapeDtypeStruct(inputs["x"].shape, x.dtype),
        "final": jax.ShapeDtypeStruct(inputs["initial"].shape, jnp.float32),
    }
    if save_states:
        shape = (batch, plan.chunks, plan.strips, STRIP, state_dim)
        outputs["saved"] = jax.ShapeDtypeStruct(shape, x.dtype)

    def ssd_forward(*refs, **smem):
        hbm = SimpleNamespace(**dict(zip([*inputs, *outputs], refs, strict=True)))
        smem, place, warpgroup = (
            SimpleNamespace(**smem),
            place_of_block(plan),
            lax.axis_index("warpgroup"),
        )

        @pl.when(warpgroup < STRIPS_PER_BLOCK)
        def _():
            plgpu.set_max_registers(plan.compute_registers, action="increase")
            Walk(plan, hbm, smem, place, warpgroup, interpret is not None).run()

        @pl.when(warpgroup == STRIPS_PER_BLOCK)
        def _():
            plgpu.set_max_registers(plan.copy_registers, action="decrease")
            copy(plan, hbm, smem, place)

    run = gpu.kernel(
        ssd_forward,
        outputs=tuple(outputs.values()),
        scratch=_scratch(plan, x.dtype, "documents" in inputs, save_states, interpret is not None),
        grid={"piece": len(plan.piece_ends), "batch": batch, "block": groups * plan.blocks_per_group},
        warpgroups=STRIPS_PER_BLOCK + 1,
        interpret=interpret,
    )
    y, final, *saved = run(*inputs.values())
    y = y.reshape(batch, -1, heads, head_dim)[:, :length]
    saved_states = saved[0].reshape(batch, -1, heads, head_dim, state_dim) if saved else None
    return y, final.reshape(initial_state.shape), saved_states


def whole_tiles(array: jax.Array) -> jax.Array:
    """Pad `(b, l, ...)` to a multiple of 8 tokens and at least one chunk.

    TMA clips a copy past the array's end, but only in whole tiles of 8 tokens, and no copy may be larger than
    the array.
    """
    length = array.shape[1]
    missing = max(-(-length // 8) * 8, CHUNK) - length
    return jnp.pad(array, ((0, 0), (0, missing), (0, 0), (0, 0))) if missing else array


def _scratch(
    plan: Plan, dtype: DTypeLike, documents: bool, save_states: bool, interpreted: bool
) -> dict[str, Any]:
    """Declare the shared memory and barriers of a block; `plan.smem_bytes` counts them."""
    stages, pair = plan.stages, STRIPS_PER_BLOCK
    scratch = {
        # One slot per pipeline stage, filled by TMA.
        "x": gpu.tiles(stages, pair, CHUNK, STRIP, dtype=dtype),
        "B": gpu.tiles(stages, CHUNK, plan.state_dim, dtype=dtype),
        "C": gpu.tiles(stages, CHUNK, plan.state_dim, dtype=dtype),
        # Two copies: one buffer cannot be loaded both as a vector over rows and as one over columns.
        "row_decays": plgpu.SMEM((stages, plan.heads_per_block, 2, CHUNK), jnp.float32),
        "column_decays": plgpu.SMEM((stages, plan.heads_per_block, CHUNK), jnp.float32),
        # One per computing warpgroup.
        "from_start": plgpu.SMEM((pair, CHUNK), jnp.float32),
        "to_end": plgpu.SMEM((pair, CHUNK), jnp.float32),
        "weights": gpu.tiles(pair, CHUNK, CHUNK, dtype=dtype),
        "y": gpu.tiles(pair, CHUNK, STRIP, dtype=dtype),
        "full": plgpu.Barrier(num_arrivals=4 + pair + documents, num_barriers=stages),
        "empty": plgpu.Barrier(num_arrivals=pair, num_barriers=stages),
    }
    if documents:
        scratch["documents"] = plgpu.SMEM((stages, 2, CHUNK), jnp.int32)
    if save_states:
        scratch["saved"] = gpu.tiles(pair, STRIP, plan.state_blocks[0][1], dtype=dtype)
    if interpreted:  # for left operands that are in registers on a GPU
        scratch["operand"] = gpu.tiles(pair, STRIP, max(CHUNK, plan.state_blocks[0][1]), dtype=dtype)
    return scratch
