r"""Run the first backward kernel: walk a row from end to start, the state's gradient in registers.

This is the forward walk reversed in time. In a chunk, with `a[i]` the decay from its start through token `i`,
`w[j]` the decay after token `j` to its end, and `G` the gradient of the state that leaves it,

    dx[j] = dt[j] (w[j] G B[j] + sum over i >= j  dy[i] (C[i] . B[j]) a[i] / a[j]) + D dy[j]
    G     = G a[end] + sum_i  a[i] dy[i] C[i]^T

The kernel reads neither x nor the saved states. As in `forward`, a block has one copying warpgroup and two
computing ones, with a strip of 64 channels each and shared B and C; and a long row of few strips is cut into
pieces: a block first walks the chunks after its piece, updating only `G`.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.typing import DTypeLike
from mamba2_jax.pallas.mosaic_gpu import bridge as gpu
from mamba2_jax.pallas.mosaic_gpu.bridge import plgpu, transposed
from mamba2_jax.pallas.mosaic_gpu.forward_walk import Place, State, place_of_block, seen
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
        place = place_of_block(plan)
        mine = place.strip(warpgroup), place.owns(warpgroup)
        Walk(plan, hbm, smem, place, warpgroup, *mine, interpreted).run()

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


@dataclasses.dataclass(frozen=True)
class Walk:
    """Backward walk of a computing warpgroup over one strip, to the start of the block's piece."""

    plan: Plan
    hbm: SimpleNamespace
    smem: SimpleNamespace
    place: Place
    me: jax.Array  # 0 or 1
    strip: jax.Array
    owns: jax.Array  # whether this warpgroup stores its results
    interpreted: bool

    def run(self) -> None:
        """Walk the chunks from the row's end, with the state's gradient in registers."""
        place, hbm = self.place, self.hbm
        D = gpu.load_from_hbm(hbm.D.at[self.strip], gpu.ONE_PER_COLUMN) if hasattr(hbm, "D") else None
        final, initial = (ref.at[place.batch, self.strip] for ref in (hbm.final, hbm.initial))
        state = tuple(gpu.load_from_hbm(final.at[:, columns]) for columns in self.state_columns)
        if len(self.plan.piece_ends) > 1:
            state = lax.fori_loop(jnp.int32(0), place.start, self.pass_by, state)
        state = lax.fori_loop(place.start, place.end, functools.partial(self.step, D), state)
        plgpu.wait_smem_to_gmem(0)

        @pl.when(self.owns & (place.end == self.plan.chunks))
        def _():
            for part, columns in zip(state, self.state_columns, strict=True):
                gpu.store_to_hbm(initial.at[:, columns], part)

    def step(self, D: jax.Array | None, step: jax.Array, state: State) -> State:
        """Process a chunk of the block's piece: write dx and the state's gradient, and update the latter."""
        chunk, slot = self.plan.chunks - 1 - step, lax.rem(step, jnp.int32(self.plan.stages))
        plgpu.barrier_wait(self.smem.full.at[slot])
        B, C, dy = self.smem.B.at[slot], self.smem.C.at[slot], self.smem.dy.at[slot, self.me]
        weights = self.smem.weights.at[self.me]
        from_start, to_end, kept = self.decays(slot)
        self.scale(slot, from_start)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # the previous copies of dx and state are done
        self.in_flight([([(B, transposed(C))], None)], functools.partial(self.weigh, slot))
        dx = self.read_out(chunk, B, state) * gpu.per_row(to_end, STRIP)
        if D is not None:
            dx = dx + gpu.per_column(D, CHUNK) * gpu.load(dy).astype(jnp.float32)

        def send(dx, *state):
            """Send dx, overlapping the tensor cores' update of the state's gradient."""
            weights[...] = dx().astype(self.dtype)  # the weights' buffer is free for reuse
            plgpu.commit_smem()
            target = self.hbm.dx.at[self.place.batch, pl.ds(chunk * CHUNK, CHUNK), self.strip]
            pl.when(self.owns)(lambda: plgpu.copy_smem_to_gmem(weights, target))
            return tuple(part() for part in state)

        dx = [(weights, dy)], dx
        state = self.in_flight(itertools.chain([dx], self.update(state, slot, kept)), send)
        plgpu.barrier_arrive(self.smem.empty.at[slot])
        return state

    def pass_by(self, step: jax.Array, state: State) -> State:
        """Process a chunk after the block's piece: update only the gradient of the state."""
        slot = lax.rem(step, jnp.int32(self.plan.stages))
        plgpu.barrier_wait(self.smem.full.at[slot])
        from_start, _, kept = self.decays(slot)
        self.scale(slot, from_start)
        plgpu.commit_smem()
        state = self.in_flight(self.update(state, slot, kept), gpu.all_of)
        plgpu.barrier_arrive(self.smem.empty.at[slot])
        return state

    def decays(self, slot: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Return each token's decay from the chunk's start, dt times that to its end, and the chunk's."""
        log, dt = (gpu.load(self.smem.row_decays.at[slot, self.me, i], gpu.ONE_PER_ROW) for i in (0, 1))
        end = self.smem.row_decays[slot, self.me, 0, CHUNK - 1]
        from_start, to_end, kept = jnp.exp2(log), jnp.exp2(end - log) * dt, jnp.exp2(end)
        if hasattr(self.smem, "documents"):
            last = gpu.load(self.smem.documents.at[slot, 0], gpu.ONE_PER_ROW)
            first_start = self.smem.documents[slot, 1, 0]
            from_start = jnp.where(gpu.positions(CHUNK, gpu.ONE_PER_ROW) < first_start, from_start, 0.0)
            to_end = jnp.where(last >= CHUNK - 1, to_end, 0.0)
            kept = jnp.where(first_start >= CHUNK, kept, 0.0)
        return from_start, to_end, kept

    def scale(self, slot: jax.Array, from_start: jax.Array) -> None:
        """Store dy times the decay from the chunk's start in shared memory."""
        dy = gpu.load(self.smem.dy.at[slot, self.me]).astype(jnp.float32)
        self.smem.decayed.at[self.me][...] = (dy * gpu.per_row(from_start, STRIP)).astype(self.dtype)

    def weigh(self, slot: jax.Array, scores: Callable[[], jax.Array]) -> None:
        """Store the weights in shared memory, overlapping the tensor cores' product of scores."""
        source = gpu.load(self.smem.row_decays.at[slot, self.me, 0], gpu.ONE_PER_ROW)
        target = gpu.load(self.smem.column_decays.at[slot, self.me], gpu.ONE_PER_COLUMN)
        log = gpu.per_column(target, CHUNK) - gpu.per_row(source, CHUNK)  # [source, target]
        documents = hasattr(self.smem, "documents")
        last = gpu.load(self.smem.documents.at[slot, 0], gpu.ONE_PER_ROW) if documents else None
        # Mask before exp2: below the diagonal the difference is positive and overflows.
        between = jnp.exp2(jnp.where(seen(last), log, -jnp.inf))
        dt = gpu.load(self.smem.row_decays.at[slot, self.me, 1], gpu.ONE_PER_ROW)
        weights = scores() * between * gpu.per_row(dt, CHUNK)
        self.smem.weights.at[self.me][...] = weights.astype(self.dtype)

    def read_out(self, chunk: jax.Array, B: Any, state: State) -> jax.Array:
        """Compute `state B` per token, and start copying the state's gradient to HBM from the same buffer."""
        buffer, saved = self.smem.state.at[self.me], self.hbm.saved.at[self.place.batch, chunk, self.strip]
        y: Any = None
        for i, (part, columns) in enumerate(zip(state, self.state_columns, strict=True)):
            if i > 0:
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # the previous copy has read the buffer
            buffer[...] = part.astype(self.dtype)
            plgpu.commit_smem()

            @pl.when(self.owns)
            def _(columns=columns):
                plgpu.copy_smem_to_gmem(buffer, saved.at[:, columns])

            (y,) = self.in_flight([([(B.at[:, columns], transposed(buffer))], y)], gpu.all_of)
        return y

    def update(self, state: State, slot: jax.Array, kept: jax.Array) -> Iterator[Any]:
        """Yield the sums that carry the state's gradient from the chunk's end to its start."""
        decayed = transposed(self.smem.decayed.at[self.me])
        for part, columns in zip(state, self.state_columns, strict=True):
            yield [(decayed, self.smem.C.at[slot, :, columns])], part * kept

    def in_flight(self, sums: Any, use: Any) -> Any:
        """Issue sums of products by `bridge.in_flight`; one by one if the state is wide."""
        apart = len(self.state_columns) > 1  # a wide state leaves too few registers to overlap
        return gpu.in_flight(sums, use, apart=apart, interpreted=self.interpreted)

    @property
    def dtype(self) -> jnp.dtype:
        """Compute dtype."""
        return self.hbm.dy.dtype

    @property
    def state_columns(self) -> list[Any]:
        """Column slices in which the state's gradient is held and multiplied."""
        return [pl.ds(start, width) for start, width in self.plan.state_blocks]
