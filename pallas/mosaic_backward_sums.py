"""What a computing warpgroup of the second backward kernel does: `mosaic_backward_chunks` has the maths."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from mamba2_jax.pallas import bridge as gpu  # pyright: ignore[reportMissingImports]
from mamba2_jax.pallas.bridge import plgpu, product, transposed  # pyright: ignore[reportMissingImports]
from mamba2_jax.pallas.mosaic_plan import CHUNK, SAVE_EVERY  # pyright: ignore[reportMissingImports]

SPAN = SAVE_EVERY // CHUNK  # chunks between two states in HBM
HALF = CHUNK // 2  # of the targets of the pairs, and of a tile's columns: one for each computing warpgroup
VECTORS = 6
INSIDE, ACROSS, READ, LEFT, OVER, X_DY = range(VECTORS)


class Sums:
    """One of the two computing warpgroups, with its half of the state's columns and of the pairs' targets.

    Args:
        plan: how the problem is cut, of `mosaic_backward_chunks`.
        hbm: the arrays, by name.
        smem: shared memory and barriers, by name.
        place: the block's chunk and strips.
        me: 0 or 1.
        interpreted: whether the interpreter runs this.
    """

    def __init__(self, plan: Any, hbm: Any, smem: Any, place: Any, me: Any, interpreted: bool):
        self.plan, self.hbm, self.smem, self.place, self.me = plan, hbm, smem, place, me
        self.accumulate = functools.partial(product, interpreted=interpreted)
        self.documents, self.dtype = hasattr(smem, "documents"), hbm.x.dtype
        self.mine = pl.ds(pl.multiple_of(me * HALF, HALF), HALF)
        self.first = jnp.int32(0)  # the slot from which tiles are counted
        self.buffer: Any = None  # of the strip's decays and vectors

    def run(self) -> None:
        """Sum over the block's strips, and write dB and dC of the chunk."""
        plan, smem, place, me = self.plan, self.smem, self.place, self.me
        self.prepare()

        def strip(index, carried):
            self.first, sums = carried
            self.buffer = lax.rem(index, jnp.int32(2))
            sums = self.strip(index, *sums)
            return self.slot(place.tiles_per_strip), sums

        sums = gpu.zeros(CHUNK, plan.half), gpu.zeros(CHUNK, plan.half), gpu.zeros(CHUNK, HALF)
        start = jnp.int32(2 * plan.others), sums
        _, (dB, dC, d_scores) = lax.fori_loop(jnp.int32(0), place.strips, strip, start)
        plgpu.wait_smem_to_gmem(0)

        meet(smem)  # the ring is empty
        whole = smem.ring.at[0]
        whole.at[:, self.mine][...] = d_scores.astype(self.dtype)
        plgpu.commit_smem()
        meet(smem)
        dB = dB + product(whole, self.C(place.own))
        dC = dC + product(transposed(whole), self.B(place.own))
        tokens = pl.ds(place.chunk * CHUNK, CHUNK)
        columns = pl.ds((place.part * 2 + me) * plan.half, plan.half)
        for total, array in ((dB, self.hbm.dB), (dC, self.hbm.dC)):
            target = array.at[place.split, place.batch, tokens, place.group, columns]
            gpu.store_to_hbm(target, total.astype(array.dtype))

    def prepare(self) -> None:
        """Compute what all strips use: the scores of the pairs, and which token is before which."""
        plan, smem, own = self.plan, self.smem, self.place.own
        plgpu.barrier_wait(smem.resident)
        scores = gpu.zeros(CHUNK, HALF)
        for half in range(2):
            scores = scores + product(self.B(own, half), transposed(self.C(own, half).at[self.mine]))
        for i in range(plan.others):
            scores = scores + product(self.tile(2 * i), transposed(self.tile(2 * i + 1).at[self.mine]))
            self.release(2 * i, 2 * i + 1)
        smem.scores.at[self.me][...] = scores.astype(self.dtype)

        @pl.when(self.me == 0)
        def _():
            row, column = gpu.row_and_column(CHUNK, CHUNK)
            smem.before[...] = jnp.where(column < row, 1.0, 0.0).astype(self.dtype)

        plgpu.commit_smem()
        meet(smem)

    def strip(self, index: Any, dB: Any, dC: Any, d_scores: Any) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Add a strip to the sums, and write its vectors."""
        plan, smem, place = self.plan, self.smem, self.place
        plgpu.barrier_wait(smem.decays_full.at[self.buffer])
        entering, leaving = self.states()
        dy, x = self.tile(place.own_tile), self.tile(place.own_tile + 1)
        d_scores = d_scores + self.pairs(dy, x)

        # What the chunk reads of the one state, and leaves in the other. At the end, because the compiler
        # moves additions down as far as it can, and products wait in registers for them.
        a, w = self.from_start(place.own), self.to_end(place.own)
        read = product(dy, entering)
        self.write(READ, (gpu.load(self.C(place.own)).astype(jnp.float32) * read).sum(1) * a)
        dC = dC + gpu.per_row(a, plan.half) * read
        left = product(x, leaving)
        self.write(LEFT, (gpu.load(self.B(place.own)).astype(jnp.float32) * left).sum(1) * w)
        dB = dB + gpu.per_row(w * self.dt(place.own), plan.half) * left
        ends = ((0, plan.tiles), (place.gradient_tile, plan.tiles), (place.own_tile, 2))
        self.release(*(start + i for start, count in ends for i in range(count)))
        plgpu.barrier_arrive(smem.decays_empty.at[self.buffer])
        self.send(place.strip + index)
        return dB, dC, d_scores

    def states(self) -> tuple[Any, Any]:
        """Return the state that enters the chunk and the gradient of the one that leaves it, in the ring."""
        plan, place = self.plan, self.place

        def forward(chunk, state):
            tile = self.scaled(plan.tiles + chunk, self.to_end(chunk) * self.dt(chunk))
            state = self.accumulate(tile, self.B(chunk), self.kept(chunk) * state)
            self.release(plan.tiles + chunk)
            return state

        def backward(i, gradient):
            chunk, number = place.own + place.behind - i, place.gradient_tile + plan.tiles + i
            tile = self.scaled(number, self.from_start(chunk))
            gradient = self.accumulate(tile, self.C(chunk), self.kept(chunk) * gradient)
            self.release(number)
            return gradient

        entering = self.half_of_state(0)
        state = gpu.load(entering).astype(jnp.float32)
        state = lax.fori_loop(jnp.int32(0), place.own, forward, state)
        entering[...] = state.astype(self.dtype)
        plgpu.commit_smem()
        leaving = self.half_of_state(place.gradient_tile)
        gradient = gpu.load(leaving).astype(jnp.float32)
        gradient = lax.fori_loop(jnp.int32(0), place.behind, backward, gradient)
        self.write(OVER, (gpu.load(entering).astype(jnp.float32) * gradient).sum(1) * self.kept(place.own))
        leaving[...] = gradient.astype(self.dtype)
        plgpu.commit_smem()
        return entering, leaving

    def pairs(self, dy: Any, x: Any) -> jax.Array:
        """Return the gradient of the scores of the chunk's pairs: sources in rows, targets in columns."""
        smem, own = self.smem, self.place.own
        source, target = gpu.row_and_column(CHUNK, HALF)
        target = target + self.me * HALF
        seen = target >= source
        if self.documents:
            seen = seen & (target <= gpu.per_row(self.last(own), HALF))
        log = gpu.load(smem.column_decays.at[self.buffer, self.mine], gpu.ONE_PER_COLUMN)
        log = gpu.per_column(log, CHUNK) - gpu.per_row(self.log_decay(own), HALF)
        # Mask before exp2: below the diagonal the difference is positive and overflows.
        pairs = product(x, transposed(dy.at[self.mine])) * jnp.exp2(jnp.where(seen, log, -jnp.inf))
        scores = gpu.load(smem.scores.at[self.me]).astype(jnp.float32)
        self.write(INSIDE, (pairs * scores).sum(1))
        pairs = pairs * gpu.per_row(self.dt(own), HALF)
        smem.pairs.at[self.me][...] = (pairs * scores).astype(self.dtype)
        plgpu.commit_smem()
        across = product(smem.before, smem.pairs.at[self.me])
        self.write(ACROSS, jnp.where(seen, across, 0.0).sum(1))
        x_t, dy_t = (gpu.load(transposed(tile.at[self.mine])).astype(jnp.float32) for tile in (x, dy))
        self.write(X_DY, (x_t * dy_t).sum(1))
        return pairs

    def write(self, vector: int, values: jax.Array) -> None:
        """Keep this warpgroup's part of one of the strip's vectors."""
        self.smem.vectors.at[self.buffer, self.me, vector][...] = values

    def send(self, strip: Any) -> None:
        """Sum half of the vectors over both warpgroups, and write them to HBM."""
        smem, place, count = self.smem, self.place, VECTORS // 2
        meet(smem)
        summed = smem.summed.at[self.me]
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # those of the strip before have left
        for i in range(count):
            parts = (smem.vectors.at[self.buffer, part, self.me * count + i] for part in range(2))
            first, second = (gpu.load(part, gpu.ONE_PER_ROW) for part in parts)
            summed.at[i][...] = first + second
        plgpu.commit_smem()
        vectors = self.hbm.vectors.at[place.part, place.batch, strip, place.chunk]
        plgpu.copy_smem_to_gmem(summed, vectors.at[pl.ds(self.me * count, count)])

    def B(self, chunk: Any, half: Any = None) -> Any:
        """Return B of a chunk of the span, up to the block's own: a warpgroup's half of the columns."""
        rows = pl.ds(pl.multiple_of(chunk * CHUNK, CHUNK), CHUNK)
        return self.smem.rows.at[self.me if half is None else half, rows]

    def C(self, chunk: Any, half: Any = None) -> Any:
        """Return C of a chunk of the span, from the block's own on: a warpgroup's half of the columns."""
        return self.B(chunk + 1, half)

    def log_decay(self, chunk: Any) -> jax.Array:
        """Return log2 of the decay from the chunk's start, per token, for the strip's head."""
        return gpu.load(self.smem.decays.at[self.buffer, chunk, 0], gpu.ONE_PER_ROW)

    def dt(self, chunk: Any) -> jax.Array:
        """Return dt per token."""
        return gpu.load(self.smem.decays.at[self.buffer, chunk, 1], gpu.ONE_PER_ROW)

    def last(self, chunk: Any) -> jax.Array:
        """Return the last token of each token's document, within the chunk."""
        return gpu.load(self.smem.documents.at[chunk, 0], gpu.ONE_PER_ROW)

    def from_start(self, chunk: Any) -> jax.Array:
        """Return the decay from the chunk's start: 0 where the entering state is another document's."""
        decay = jnp.exp2(self.log_decay(chunk))
        if not self.documents:
            return decay
        entered = gpu.positions(CHUNK, gpu.ONE_PER_ROW) < self.smem.documents[chunk, 1, 0]
        return jnp.where(entered, decay, 0.0)

    def to_end(self, chunk: Any) -> jax.Array:
        """Return the decay to the chunk's end: 0 where the leaving state is another document's."""
        decay = jnp.exp2(self.smem.decays[self.buffer, chunk, 0, CHUNK - 1] - self.log_decay(chunk))
        return jnp.where(self.last(chunk) >= CHUNK - 1, decay, 0.0) if self.documents else decay

    def kept(self, chunk: Any) -> jax.Array:
        """Return the decay of the state over the chunk: 0 if a document starts in it."""
        decay = jnp.exp2(self.smem.decays[self.buffer, chunk, 0, CHUNK - 1])
        return jnp.where(self.smem.documents[chunk, 1, 0] >= CHUNK, decay, 0.0) if self.documents else decay

    def slot(self, number: Any) -> Any:
        """Return where in the ring the strip's tile is."""
        slot = self.first + number  # less than twice around
        return jnp.where(slot >= self.plan.ring, slot - self.plan.ring, slot)

    def tile(self, number: Any) -> Any:
        """Wait for the strip's tile, which happens once to each, and return it."""
        slot = self.slot(number)
        plgpu.barrier_wait(self.smem.full.at[slot])
        return self.smem.ring.at[slot]

    def half_of_state(self, number: Any) -> Any:
        """Return this warpgroup's half of a state: a tile of its own, or half the columns of one."""
        if self.plan.tiles == 1:
            return self.tile(number).at[:, self.mine]
        for i in range(2):
            self.tile(number + i)
        return self.smem.ring.at[self.slot(number + self.me)]

    def scaled(self, number: Any, weights: jax.Array) -> Any:
        """Scale the rows of a tile where it is, half of it by each warpgroup; return it transposed."""
        half = self.tile(number).at[:, self.mine]
        half[...] = (gpu.load(half).astype(jnp.float32) * gpu.per_row(weights, HALF)).astype(self.dtype)
        plgpu.commit_smem()
        meet(self.smem)
        return transposed(self.smem.ring.at[self.slot(number)])

    def release(self, *numbers: Any) -> None:
        """Let the copying warpgroup fill the slots of these tiles again."""
        plgpu.commit_smem()  # plain loads and stores end before TMA fills the slots again
        for number in numbers:
            plgpu.barrier_arrive(self.smem.empty.at[self.slot(number)])


def meet(smem: Any) -> None:
    """Wait until the other computing warpgroup is here too."""
    plgpu.barrier_arrive(smem.both)
    plgpu.barrier_wait(smem.both)
