r"""Run the first backward kernel: walk a row from end to start, the state's gradient in registers.

This is the forward walk reversed in time. In a chunk, with `a[i]` the decay from its start through token `i`,
`w[j]` the decay after token `j` to its end, and `G` the gradient of the state that leaves it,

    dx[j] = dt[j] (w[j] G B[j] + sum over i >= j  dy[i] (C[i] . B[j]) a[i] / a[j]) + D dy[j]
    G     = G a[end] + sum_i  a[i] dy[i] C[i]^T

The kernel reads neither x nor the saved states. As in `forward`, a block has one copying warpgroup and two
computing ones, with a strip of 64 channels each and shared B and C; and a long row of few strips is cut into
pieces: a block first walks the chunks after its piece, updating only `G`.
"""

import functools
import itertools
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.typing import DTypeLike
from mamba2_jax.pallas.mosaic_gpu import bridge as gpu
from mamba2_jax.pallas.mosaic_gpu.bridge import plgpu, transposed
from mamba2_jax.pallas.mosaic_gpu.forward_walk import Place, place_of_block
from mamba2_jax.pallas.mosaic_gpu.plan import CHUNK, STRIP, Plan, choose_pieces, cut, state_width


def walk(dy, B, C, decays, documents, D, final_gradient, *, pieces=None, interpret=None):
    """Compute dx, the gradient of the state after each chunk, and that of the initial state.

    Args:
        dy: `(b, l, strips, 64)`, compute dtype; `l` is a multiple of 8 and at least 64.
        B: `(b, l, g, n)`, compute dtype.
        C: `(b, l, g, n)`.
        decays: `(b, h, c, 2, 64)` float32: log2 of the decay from the chunk's start, and dt.
        documents: `(b, c, 2, 64)` int32, as from `chunks.document_ends`, or None.
        D: `(strips, 64)` float32, or None.
        final_gradient: `(b, strips, 64, n)` float32.
        pieces: number of pieces per row; None for the choice of `plan.choose_pieces`.
        interpret: None on a GPU, or what `bridge.interpreter` returned.

    Returns:
        dx: as dy.
        state_gradients: `(b, c, strips, 64, n)`, compute dtype.
        initial_gradient: `(b, strips, 64, n)` float32.
    """
    batch, length, strips, _ = dy.shape
    heads, (groups, state_dim) = decays.shape[1], B.shape[2:]
    chunks = -(-length // CHUNK)
    blocks_per_group = -(-strips // groups // 2)
    if pieces is None:
        pieces = choose_pieces(batch * groups * blocks_per_group, chunks)
    ends = cut(chunks, pieces)
    plan = Plan(
        batch,
        chunks,
        heads,
        groups,
        strips // heads * STRIP,
        state_dim,
        stages=min(3 if state_dim <= 128 else 2, ends[0]),
        piece_ends=ends,  # counted from the row's end
    )
    inputs = {"dy": dy, "B": B, "C": C, "decays": decays, "final": final_gradient}
    inputs |= {name: array for name, array in (("documents", documents), ("D", D)) if array is not None}
    saved = (batch, chunks, *final_gradient.shape[1:])
    outputs = {
        "dx": jax.ShapeDtypeStruct(dy.shape, dy.dtype),
        "saved": jax.ShapeDtypeStruct(saved, dy.dtype),
        "initial": jax.ShapeDtypeStruct(final_gradient.shape, jnp.float32),
    }

    def ssd_backward_walk(*refs, **smem):
        hbm = SimpleNamespace(**dict(zip([*inputs, *outputs], refs, strict=True)))
        _block(plan, hbm, SimpleNamespace(**smem), interpret is not None)

    run = gpu.kernel(
        ssd_backward_walk,
        outputs=tuple(outputs.values()),
        scratch=_scratch(plan, dy.dtype, documents is not None),
        grid={"piece": pieces, "batch": batch, "block": groups * blocks_per_group},
        warpgroups=3,
        interpret=interpret,
    )
    return run(*inputs.values())


def _scratch(plan: Plan, dtype: DTypeLike, documents: bool) -> dict[str, Any]:
    """Declare the shared memory and barriers of a block."""
    stages = plan.stages
    scratch = {
        # One slot per pipeline stage, filled by TMA.
        "dy": gpu.tiles(stages, 2, CHUNK, STRIP, dtype=dtype),
        "B": gpu.tiles(stages, CHUNK, plan.state_dim, dtype=dtype),
        "C": gpu.tiles(stages, CHUNK, plan.state_dim, dtype=dtype),
        # Two copies: one buffer cannot be loaded both as a vector over rows and as one over columns.
        "row_decays": plgpu.SMEM((stages, 2, 2, CHUNK), jnp.float32),
        "column_decays": plgpu.SMEM((stages, 2, CHUNK), jnp.float32),
        # One per computing warpgroup.
        "weights": gpu.tiles(2, CHUNK, CHUNK, dtype=dtype),
        "state": gpu.tiles(2, STRIP, state_width(plan.state_dim), dtype=dtype),
        "decayed": gpu.tiles(2, CHUNK, STRIP, dtype=dtype),
        "full": plgpu.Barrier(num_arrivals=8 + documents, num_barriers=stages),
        "empty": plgpu.Barrier(num_arrivals=2, num_barriers=stages),
    }
    if documents:
        scratch["documents"] = plgpu.SMEM((stages, 2, CHUNK), jnp.int32)
    return scratch


def _block(plan: Plan, hbm: SimpleNamespace, smem: SimpleNamespace, interpreted: bool) -> None:
    """Run a warpgroup of the block: two compute, the third copies."""
    warpgroup = lax.axis_index("warpgroup")
    # Registers per computing and per copying thread; the three sum to the 3 * 168 a block starts with.
    wide = plan.state_dim > 128 or hasattr(hbm, "documents")
    computing, copying = (240, 24) if wide else (232, 40)

    @pl.when(warpgroup < 2)
    def _():
        plgpu.set_max_registers(computing, action="increase")
        _compute(plan, hbm, smem, place_of_block(plan), warpgroup, interpreted)

    @pl.when(warpgroup == 2)
    def _():
        plgpu.set_max_registers(copying, action="decrease")
        _copy(plan, hbm, smem, place_of_block(plan))


def _copy(plan: Plan, hbm: SimpleNamespace, smem: SimpleNamespace, place: Place) -> None:
    """Run the copying warpgroup: prefetch chunks into free slots by TMA."""

    @pl.loop(jnp.int32(0), place.end)
    def _(step):
        chunk, slot = plan.chunks - 1 - step, lax.rem(step, jnp.int32(plan.stages))
        tokens, full = pl.ds(chunk * CHUNK, CHUNK), smem.full.at[slot]
        copy = functools.partial(plgpu.copy_gmem_to_smem, barrier=full)
        pl.when(step >= plan.stages)(lambda: plgpu.barrier_wait(smem.empty.at[slot]))
        copy(hbm.C.at[place.batch, tokens, place.group], smem.C.at[slot])
        # Chunks after the block's piece do not need B; fetched all the same, to treat all chunks alike.
        copy(hbm.B.at[place.batch, tokens, place.group], smem.B.at[slot])
        for i in range(2):
            decays = hbm.decays.at[
                place.batch, lax.div(place.strip(i), jnp.int32(plan.strips_per_head)), chunk
            ]
            copy(hbm.dy.at[place.batch, tokens, place.strip(i)], smem.dy.at[slot, i])
            copy(decays, smem.row_decays.at[slot, i])
            copy(decays.at[0], smem.column_decays.at[slot, i])
        if hasattr(hbm, "documents"):
            copy(hbm.documents.at[place.batch, chunk], smem.documents.at[slot])

    @pl.loop(place.end - plan.stages, place.end)
    def _(step):
        plgpu.barrier_wait(smem.empty.at[lax.rem(step, jnp.int32(plan.stages))])


def _compute(
    plan: Plan, hbm: SimpleNamespace, smem: SimpleNamespace, place: Place, me: jax.Array, interpreted: bool
) -> None:
    """Run a computing warpgroup: walk one strip backward, to the start of the block's piece."""
    strip, stores = place.strip(me), place.owns(me)
    state_columns = [pl.ds(start, width) for start, width in plan.state_blocks]
    dtype, float32 = hbm.dy.dtype, jnp.float32
    apart = len(state_columns) > 1  # a wide state leaves too few registers to overlap
    in_flight = functools.partial(gpu.in_flight, apart=apart, interpreted=interpreted)
    weights, decayed = smem.weights.at[me], smem.decayed.at[me]
    D = gpu.load_from_hbm(hbm.D.at[strip], gpu.ONE_PER_COLUMN) if hasattr(hbm, "D") else None

    def decays(slot):
        """Return each token's decay from the chunk's start, dt times that to its end, and the chunk's."""
        log, dt = (gpu.load(smem.row_decays.at[slot, me, i], gpu.ONE_PER_ROW) for i in (0, 1))
        end = smem.row_decays[slot, me, 0, CHUNK - 1]
        from_start, to_end, kept = jnp.exp2(log), jnp.exp2(end - log) * dt, jnp.exp2(end)
        if hasattr(smem, "documents"):
            last, first_start = (
                gpu.load(smem.documents.at[slot, 0], gpu.ONE_PER_ROW),
                smem.documents[slot, 1, 0],
            )
            from_start = jnp.where(gpu.positions(CHUNK, gpu.ONE_PER_ROW) < first_start, from_start, 0.0)
            to_end = jnp.where(last >= CHUNK - 1, to_end, 0.0)
            kept = jnp.where(first_start >= CHUNK, kept, 0.0)
        return from_start, to_end, kept

    def scale(slot, from_start):
        """Store dy times the decay from the chunk's start in shared memory."""
        dy = gpu.load(smem.dy.at[slot, me]).astype(float32)
        decayed[...] = (dy * gpu.per_row(from_start, STRIP)).astype(dtype)

    def update(state, slot, kept):
        """Yield the sums that carry the state's gradient from the chunk's end to its start."""
        for part, columns in zip(state, state_columns, strict=True):
            yield [(transposed(decayed), smem.C.at[slot, :, columns])], part * kept

    def pass_by(step, state):
        """Process a chunk after the block's piece: update only the gradient of the state."""
        slot = lax.rem(step, jnp.int32(plan.stages))
        plgpu.barrier_wait(smem.full.at[slot])
        from_start, _, kept = decays(slot)
        scale(slot, from_start)
        plgpu.commit_smem()
        state = in_flight(update(state, slot, kept), gpu.all_of)
        plgpu.barrier_arrive(smem.empty.at[slot])
        return state

    def walk_step(step, state):
        """Process a chunk of the block's piece: write dx and the state's gradient, and update the latter."""
        chunk, slot = plan.chunks - 1 - step, lax.rem(step, jnp.int32(plan.stages))
        plgpu.barrier_wait(smem.full.at[slot])
        B, C, dy = smem.B.at[slot], smem.C.at[slot], smem.dy.at[slot, me]
        from_start, to_end, kept = decays(slot)
        scale(slot, from_start)

        def weigh(scores):
            """Compute the weights, overlapping the tensor cores' product of scores."""
            source = gpu.load(smem.row_decays.at[slot, me, 0], gpu.ONE_PER_ROW)
            target = gpu.load(smem.column_decays.at[slot, me], gpu.ONE_PER_COLUMN)
            log = gpu.per_column(target, CHUNK) - gpu.per_row(source, CHUNK)  # [source, target]
            documents = hasattr(smem, "documents")
            last = gpu.load(smem.documents.at[slot, 0], gpu.ONE_PER_ROW) if documents else None
            # Mask before exp2: below the diagonal the difference is positive and overflows.
            between = jnp.exp2(jnp.where(_sees(last), log, -jnp.inf))
            dt = gpu.load(smem.row_decays.at[slot, me, 1], gpu.ONE_PER_ROW)
            weights[...] = (scores() * between * gpu.per_row(dt, CHUNK)).astype(dtype)

        plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # the previous copies of dx and state are done
        in_flight([([(B, transposed(C))], None)], weigh)
        dx: Any = None
        for i, (part, columns) in enumerate(zip(state, state_columns, strict=True)):
            if i > 0:
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # the previous copy has read the stage
            smem.state.at[me][...] = part.astype(dtype)
            plgpu.commit_smem()

            @pl.when(stores)
            def _(columns=columns):
                target = hbm.saved.at[place.batch, chunk, strip, :, columns]
                plgpu.copy_smem_to_gmem(smem.state.at[me], target)

            reading = [(B.at[:, columns], transposed(smem.state.at[me]))]
            (dx,) = in_flight([(reading, dx)], gpu.all_of)
        dx = dx * gpu.per_row(to_end, STRIP)
        if D is not None:
            dx = dx + gpu.per_column(D, CHUNK) * gpu.load(dy).astype(float32)

        def send(dx, *state):
            """Send dx, overlapping the tensor cores' update of the state's gradient."""
            weights[...] = dx().astype(dtype)  # the weights' buffer is free for reuse
            plgpu.commit_smem()
            tokens = pl.ds(chunk * CHUNK, CHUNK)
            pl.when(stores)(lambda: plgpu.copy_smem_to_gmem(weights, hbm.dx.at[place.batch, tokens, strip]))
            return tuple(part() for part in state)

        dx = [(weights, dy)], dx
        state = in_flight(itertools.chain([dx], update(state, slot, kept)), send)
        plgpu.barrier_arrive(smem.empty.at[slot])
        return state

    final = hbm.final.at[place.batch, strip]
    state = tuple(gpu.load_from_hbm(final.at[:, columns]) for columns in state_columns)
    if len(plan.piece_ends) > 1:
        state = lax.fori_loop(jnp.int32(0), place.start, pass_by, state)
    state = lax.fori_loop(place.start, place.end, walk_step, state)
    plgpu.wait_smem_to_gmem(0)

    @pl.when(stores & (place.end == plan.chunks))
    def _():
        for part, columns in zip(state, state_columns, strict=True):
            gpu.store_to_hbm(hbm.initial.at[place.batch, strip, :, columns], part)


def _sees(last: jax.Array | None) -> jax.Array:
    """Return the causal mask `[source, target]`: a target sees itself and earlier tokens of its document."""
    source, target = gpu.row_and_column(CHUNK, CHUNK)
    sees = target >= source
    return sees if last is None else sees & (target <= gpu.per_row(last, CHUNK))
