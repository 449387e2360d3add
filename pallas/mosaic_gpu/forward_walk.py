"""Define the warpgroups of a forward block: one copies, two walk a strip each.

A walk over one strip computes, per chunk (names as in the code; `^T` is a view without a copy):

    weights = (B C^T) * exp2(log[target] - log[source]) * dt[source]    masked, through shared memory
    y       = (state C^T) * from_start + D x     [channel, token]
    y      += x weights
    state   = state * kept + (x * to_end) B      [channel, state_dim], in registers for the whole walk

Left operands come from registers, right ones from shared memory. Per token, `from_start` is the decay from
the chunk's start and `to_end` that to its end, times dt; `kept` is the state's decay over the whole chunk.
"""

import dataclasses
import functools
import itertools
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from mamba2_jax.pallas.mosaic_gpu import bridge as gpu
from mamba2_jax.pallas.mosaic_gpu.bridge import plgpu
from mamba2_jax.pallas.mosaic_gpu.plan import CHUNK, STRIP, STRIPS_PER_BLOCK, Plan

State = tuple[jax.Array, ...]
"""State of a strip in registers, one matrix per column block of `Plan.state_blocks`."""


@dataclasses.dataclass(frozen=True)
class Place:
    """Indices of a block's work: batch row, group, two strips, and the chunks `start` to `end` of its piece.

    The backward walk counts chunks from the row's end.
    """

    batch: jax.Array
    group: jax.Array
    first_strip: jax.Array
    last_strip: jax.Array
    start: jax.Array
    end: jax.Array

    def strip(self, i: jax.Array | int) -> jax.Array:
        """Return the strip of warpgroup `i`; the last strip of a group of odd size is walked twice."""
        return jnp.minimum(self.first_strip + i, self.last_strip)

    def first_head(self, plan: Plan) -> jax.Array:
        """Return the head of the first strip."""
        return lax.div(self.first_strip, jnp.int32(plan.strips_per_head))

    def owns(self, i: jax.Array) -> jax.Array:
        """Tell whether warpgroup `i` stores its results, False for a duplicated walk."""
        return self.first_strip + i <= self.last_strip


def place_of_block(plan: Plan) -> Place:
    """Compute the indices of the block's work from its grid indices."""
    block, piece = lax.axis_index("block"), lax.axis_index("piece")
    per_group = jnp.int32(plan.blocks_per_group)
    group = lax.div(block, per_group)
    first_of_group = group * plan.strips_per_group
    start, end = jnp.int32(0), jnp.int32(plan.piece_ends[0])
    for i, (left, right) in enumerate(itertools.pairwise(plan.piece_ends), 1):
        start = jnp.where(piece == i, jnp.int32(left), start)
        end = jnp.where(piece == i, jnp.int32(right), end)
    return Place(
        batch=lax.axis_index("batch"),
        group=group,
        first_strip=first_of_group + lax.rem(block, per_group) * STRIPS_PER_BLOCK,
        last_strip=first_of_group + (plan.strips_per_group - 1),
        start=start,
        end=end,
    )


def copy(plan: Plan, hbm: SimpleNamespace, smem: SimpleNamespace, place: Place) -> None:
    """Run the copying warpgroup: prefetch chunks into free slots by TMA."""
    heads = pl.ds(place.first_head(plan), plan.heads_per_block)

    def fetch(chunk, slot):
        tokens, full = pl.ds(chunk * CHUNK, CHUNK), smem.full.at[slot]
        fill = functools.partial(plgpu.copy_gmem_to_smem, barrier=full)
        fill(hbm.B.at[place.batch, tokens, place.group], smem.B.at[slot])
        for i in range(STRIPS_PER_BLOCK):
            fill(hbm.x.at[place.batch, tokens, place.strip(i)], smem.x.at[slot, i])
        fill(hbm.decays.at[place.batch, heads, chunk], smem.row_decays.at[slot])
        if hasattr(hbm, "documents"):
            fill(hbm.documents.at[place.batch, chunk], smem.documents.at[slot])

        @pl.when(chunk >= place.start)
        def _():
            fill(hbm.C.at[place.batch, tokens, place.group], smem.C.at[slot])
            fill(hbm.decays.at[place.batch, heads, chunk, 0], smem.column_decays.at[slot])

        @pl.when(chunk < place.start)  # before the piece: C is not needed, only arrive
        def _():
            plgpu.barrier_arrive(full)
            plgpu.barrier_arrive(full)

    for stage in range(plan.stages):
        fetch(jnp.int32(stage), jnp.int32(stage))

    @pl.loop(jnp.int32(0), place.end)
    def refill(chunk):
        slot = lax.rem(chunk, jnp.int32(plan.stages))
        plgpu.barrier_wait(smem.empty.at[slot])
        pl.when(chunk + plan.stages < place.end)(lambda: fetch(chunk + plan.stages, slot))


@dataclasses.dataclass(frozen=True)
class Walk:
    """Walk of a computing warpgroup over one strip. Matrices are [channel or source token, ...]."""

    plan: Plan
    hbm: SimpleNamespace
    smem: SimpleNamespace
    place: Place
    me: jax.Array  # 0 or 1
    interpreted: bool

    def run(self) -> None:
        """Walk the chunks up to the end of the block's piece, with the state in registers."""
        strip = self.place.strip(self.me)
        initial, final = (ref.at[self.place.batch, strip] for ref in (self.hbm.initial, self.hbm.final))
        state = tuple(gpu.load_from_hbm(initial.at[:, columns]) for columns in self.state_columns)
        D = gpu.load_from_hbm(self.hbm.D.at[strip], gpu.ONE_PER_ROW) if hasattr(self.hbm, "D") else None
        pl.when(self.place.start == 0)(lambda: self.save(self.place.start, state))
        if len(self.plan.piece_ends) > 1:
            state = lax.fori_loop(jnp.int32(0), self.place.start, self.pass_by, state)
        state = lax.fori_loop(self.place.start, self.place.end, functools.partial(self.step, D), state)
        plgpu.wait_smem_to_gmem(0)

        @pl.when(self.owns & (self.place.end == self.plan.chunks))
        def _():
            for part, columns in zip(state, self.state_columns, strict=True):
                gpu.store_to_hbm(final.at[:, columns], part)

    def step(self, D: jax.Array | None, chunk: jax.Array, state: State) -> State:
        """Process one chunk: write y, and return the state after the chunk."""
        slot = lax.rem(chunk, jnp.int32(self.plan.stages))
        plgpu.barrier_wait(self.smem.full.at[slot])
        B, C = self.smem.B.at[slot], gpu.transposed(self.smem.C.at[slot])
        source, dt, last, kept = self.decays(slot)
        target = gpu.load(self.smem.column_decays.at[slot, self.head], gpu.ONE_PER_COLUMN)
        log = gpu.per_column(target, CHUNK) - gpu.per_row(source, CHUNK)  # [source, target]

        def weigh(scores):
            """Compute the weights, overlapping the tensor cores' product of scores."""
            # Mask before exp2: below the diagonal the difference is positive and overflows.
            weights = jnp.exp2(jnp.where(seen(last), log, -jnp.inf)) * gpu.per_row(dt, CHUNK)
            self.smem.weights.at[self.me][...] = (scores() * weights).astype(self.dtype)
            plgpu.commit_smem()

        self.in_flight([([(B, C)], None)], weigh)
        read_out = [
            (part.astype(self.dtype), C.at[columns])
            for part, columns in zip(state, self.state_columns, strict=True)
        ]
        x = gpu.load(gpu.transposed(self.smem.x.at[slot, self.me]))  # [channel, token], and so is y
        (y,) = self.in_flight([(read_out, None)], gpu.all_of)
        y = y * self.turned(self.smem.from_start)
        if D is not None:
            y = y + gpu.per_row(D, CHUNK) * x.astype(jnp.float32)

        def send(y, *state):
            """Send y, overlapping the tensor cores' update of the state."""
            self.send(chunk, y())
            return tuple(part() for part in state)

        y = [(x, self.smem.weights.at[self.me])], y
        state = self.in_flight(itertools.chain([y], self.update(state, slot, kept, x)), send)
        plgpu.barrier_arrive(self.smem.empty.at[slot])
        self.save(chunk + 1, state)
        return state

    def pass_by(self, chunk: jax.Array, state: State) -> State:
        """Process a chunk before the block's piece: return the state after the chunk."""
        slot = lax.rem(chunk, jnp.int32(self.plan.stages))
        plgpu.barrier_wait(self.smem.full.at[slot])
        *_, kept = self.decays(slot)
        x = gpu.load(gpu.transposed(self.smem.x.at[slot, self.me]))
        state = self.in_flight(self.update(state, slot, kept, x), gpu.all_of)
        plgpu.barrier_arrive(self.smem.empty.at[slot])
        return state

    def decays(self, slot: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array | None, jax.Array]:
        """Store `from_start` and `to_end` of each token in shared memory, to be read back by `turned`.

        Returns:
            log_decay: one per token, as in `chunks`.
            dt: one per token.
            last: per token, the last token of its document in this chunk; None without documents.
            kept: decay of the state over the chunk, a scalar.
        """
        log_decay, dt = (
            gpu.load(self.smem.row_decays.at[slot, self.head, i], gpu.ONE_PER_ROW) for i in (0, 1)
        )
        end = self.smem.row_decays[slot, self.head, 0, CHUNK - 1]
        from_start, to_end = jnp.exp2(log_decay), jnp.exp2(end - log_decay) * dt
        kept, last = jnp.exp2(end), None
        if hasattr(self.smem, "documents"):
            last = gpu.load(self.smem.documents.at[slot, 0], gpu.ONE_PER_ROW)
            first_start = self.smem.documents[slot, 1, 0]
            token = gpu.positions(CHUNK, gpu.ONE_PER_ROW)
            from_start = jnp.where(token < first_start, from_start, 0.0)
            to_end = jnp.where(last == CHUNK - 1, to_end, 0.0)
            kept = jnp.where(first_start == CHUNK, kept, 0.0)
        self.smem.from_start.at[self.me][...] = from_start
        self.smem.to_end.at[self.me][...] = to_end
        return log_decay, dt, last, kept

    def turned(self, vector: Any) -> jax.Array:
        """Load a stored vector over tokens, broadcast over the columns of `[channel, token]`."""
        return gpu.per_column(gpu.load(vector.at[self.me], gpu.ONE_PER_COLUMN), STRIP)

    def update(self, state: State, slot: jax.Array, kept: jax.Array, x: jax.Array) -> Iterator[Any]:
        """Yield `state * kept + (x * to_end) B`, as sums for `in_flight`."""
        x_to_end = (x.astype(jnp.float32) * self.turned(self.smem.to_end)).astype(self.dtype)
        for part, columns in zip(state, self.state_columns, strict=True):
            yield [(x_to_end, self.smem.B.at[slot, :, columns])], part * kept

    def send(self, chunk: jax.Array, y: jax.Array) -> None:
        """Start copying y to HBM, after the previous copy has read its shared memory."""
        mine, tokens = self.smem.y.at[self.me], pl.ds(chunk * CHUNK, CHUNK)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        gpu.transposed(mine)[...] = y.astype(self.dtype)
        plgpu.commit_smem()
        target = self.hbm.y.at[self.place.batch, tokens, self.place.strip(self.me)]
        pl.when(self.owns)(lambda: plgpu.copy_smem_to_gmem(mine, target))

    def save(self, chunk: jax.Array, state: State) -> None:
        """Start copying the state that enters a chunk to HBM, if states are saved.

        Called after an iteration, not before the next: there the compiler would keep the 16-bit copy of the
        state, which that iteration uses later, in registers, and spill.
        """
        if not hasattr(self.hbm, "saved"):
            return
        mine = self.smem.saved.at[self.me]
        place = self.hbm.saved.at[self.place.batch, chunk, self.place.strip(self.me)]

        @pl.when(self.owns & (chunk < self.plan.chunks))
        def _():
            for part, columns in zip(state, self.state_columns, strict=True):
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # the previous copy has read `mine`
                mine[...] = part.astype(self.dtype)
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(mine, place.at[:, columns])

    def in_flight(self, sums: Any, use: Any) -> Any:
        """Issue sums of products by `bridge.in_flight`; one by one if the state is wide."""
        apart, spill = (
            len(self.state_columns) > 1,
            self.smem.operand.at[self.me] if self.interpreted else None,
        )
        return gpu.in_flight(sums, use, apart=apart, spill=spill, interpreted=self.interpreted)

    @property
    def dtype(self) -> jnp.dtype:
        """Compute dtype."""
        return self.hbm.x.dtype

    @property
    def head(self) -> jax.Array:
        """Index, among the block's heads, of the head of this warpgroup's strip."""
        strip = self.place.strip(self.me)
        return lax.div(strip, jnp.int32(self.plan.strips_per_head)) - self.place.first_head(self.plan)

    @property
    def owns(self) -> jax.Array:
        """Whether this warpgroup stores its results."""
        return self.place.owns(self.me)

    @property
    def state_columns(self) -> list[Any]:
        """Column slices in which the state is held and multiplied."""
        return [pl.ds(start, width) for start, width in self.plan.state_blocks]


def seen(last: jax.Array | None) -> jax.Array:
    """Return the causal mask `[source, target]`: a target sees itself and earlier tokens of its document."""
    source, target = gpu.row_and_column(CHUNK, CHUNK)
    sees = target >= source
    return sees if last is None else sees & (target <= gpu.per_row(last, CHUNK))
