r"""Define a computing warpgroup of the second backward kernel; `backward_chunks` has the maths."""

import dataclasses
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from mamba2_jax.pallas.mosaic_gpu import bridge as gpu
from mamba2_jax.pallas.mosaic_gpu.bridge import plgpu, product, transposed
from mamba2_jax.pallas.mosaic_gpu.plan import CHUNK, ChunkPlan

HALF = CHUNK // 2  # pair targets, and columns of a tile, per computing warpgroup
VECTORS = 6
INSIDE, ACROSS, READ, LEFT, OVER, X_DY = range(VECTORS)


@dataclasses.dataclass(frozen=True)
class ChunkPlace:
    """Indices of a block's work: batch row, group, chunk, strips, and columns of the state."""

    batch: jax.Array
    group: jax.Array
    chunk: jax.Array
    part: jax.Array  # index among the blocks that share a wide state's columns
    split: jax.Array
    strip: jax.Array  # first strip
    strips: jax.Array  # number of strips


class Sums:
    """Computing warpgroup, one of two, with half of the state's columns and half of the pairs' targets.

    Args:
        plan: the launch, as in `backward_chunks`.
        hbm: arrays in HBM, by name.
        smem: shared memory and barriers, by name.
        place: indices of the block's work.
        me: index of the warpgroup, 0 or 1.
        interpreted: whether the interpreter runs the kernel.
    """

    def __init__(
        self,
        plan: ChunkPlan,
        hbm: SimpleNamespace,
        smem: SimpleNamespace,
        place: ChunkPlace,
        me: jax.Array,
        interpreted: bool,
    ):
        self.plan, self.hbm, self.smem, self.place, self.me = plan, hbm, smem, place, me
        self.interpreted = interpreted
        self.documents, self.dtype = hasattr(smem, "documents"), hbm.x.dtype
        self.mine = pl.ds(pl.multiple_of(me * HALF, HALF), HALF)
        self.half = place.part * 2 + me  # index of the block of state columns
        self.slot: Any = None  # pipeline slot of the current strip's tiles
        self.buffer: Any = None  # buffer of the current strip's vectors

    def run(self) -> None:
        """Sum over the block's strips, and write the chunk's dB and dC."""
        plan, smem, place = self.plan, self.smem, self.place
        self.prepare()

        def strip(index, sums):
            self.slot, self.buffer = lax.rem(index, jnp.int32(plan.stages)), lax.rem(index, jnp.int32(2))
            return self.strip(place.strip + index, *sums)

        sums = gpu.zeros(CHUNK, plan.half), gpu.zeros(CHUNK, plan.half), gpu.zeros(CHUNK, HALF)
        dB, dC, d_scores = lax.fori_loop(jnp.int32(0), place.strips, strip, sums)
        plgpu.wait_smem_to_gmem(0)

        meet(smem)  # `before` is free for reuse
        whole = smem.before
        whole.at[:, self.mine][...] = d_scores.astype(self.dtype)
        plgpu.commit_smem()
        meet(smem)
        dB = dB + product(whole, smem.C.at[self.half])
        dC = dC + product(transposed(whole), smem.B.at[self.half])
        tokens, columns = pl.ds(place.chunk * CHUNK, CHUNK), pl.ds(self.half * plan.half, plan.half)
        for total, array in ((dB, self.hbm.dB), (dC, self.hbm.dC)):
            target = array.at[place.split, place.batch, tokens, place.group, columns]
            gpu.store_to_hbm(target, total.astype(array.dtype))

    def prepare(self) -> None:
        """Compute what all strips share: the scores of the pairs, and the mask `before` of earlier tokens."""
        smem = self.smem
        plgpu.barrier_wait(smem.resident)
        scores = gpu.zeros(CHUNK, HALF)
        for half in range(self.plan.halves):
            scores = scores + product(smem.B.at[half], transposed(smem.C.at[half, self.mine]))
        smem.scores.at[self.me][...] = scores.astype(self.dtype)

        @pl.when(self.me == 0)
        def _():
            row, column = gpu.row_and_column(CHUNK, CHUNK)
            smem.before[...] = jnp.where(column < row, 1.0, 0.0).astype(self.dtype)

        plgpu.commit_smem()
        meet(smem)

    def strip(
        self, strip: jax.Array, dB: jax.Array, dC: jax.Array, d_scores: jax.Array
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Add one strip to the sums dB, dC and d_scores, and write its vectors."""
        smem, half = self.smem, self.plan.half
        plgpu.barrier_wait(smem.full.at[self.slot])
        x, dy = smem.x.at[self.slot], smem.dy.at[self.slot]
        entering, leaving = smem.entering.at[self.slot, self.me], smem.leaving.at[self.slot, self.me]
        log_decay = gpu.load(smem.decays.at[self.slot, 0], gpu.ONE_PER_ROW)
        dt = gpu.load(smem.decays.at[self.slot, 1], gpu.ONE_PER_ROW)
        from_start, to_end, kept = self.decays(log_decay)

        def use(pairs, read, left):
            """Process `pairs` while the tensor cores compute `read` and `left`."""
            pairs = self.pairs(pairs(), log_decay, dt)
            read = read()
            self.write(READ, (gpu.load(smem.C.at[self.half]).astype(jnp.float32) * read).sum(1) * from_start)
            left = left()
            self.write(LEFT, (gpu.load(smem.B.at[self.half]).astype(jnp.float32) * left).sum(1) * to_end)
            return pairs, read, left

        sums = [[(x, transposed(dy.at[self.mine]))], [(dy, entering)], [(x, leaving)]]
        pairs, read, left = gpu.in_flight(
            [(operands, None) for operands in sums], use, interpreted=self.interpreted
        )
        across = product(smem.before, smem.pairs.at[self.me])
        self.write(ACROSS, jnp.where(self.seen(), across, 0.0).sum(1))
        x_t, dy_t = (gpu.load(transposed(tile.at[self.mine])).astype(jnp.float32) for tile in (x, dy))
        self.write(X_DY, (x_t * dy_t).sum(1))
        d_scores = d_scores + pairs
        dC = dC + gpu.per_row(from_start, half) * read
        dB = dB + gpu.per_row(to_end * dt, half) * left
        both = gpu.load(entering).astype(jnp.float32) * gpu.load(leaving).astype(jnp.float32)
        self.write(OVER, both.sum(1) * kept)
        self.release()
        self.send(strip)
        return dB, dC, d_scores

    def decays(self, log_decay: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Return each token's decay from the chunk's start, that to its end, and the decay over the chunk.

        0 where the entering or leaving state belongs to another document.
        """
        end = self.smem.decays[self.slot, 0, CHUNK - 1]
        from_start, to_end, kept = jnp.exp2(log_decay), jnp.exp2(end - log_decay), jnp.exp2(end)
        if self.documents:
            first_start = self.smem.documents[1, 0]
            from_start = jnp.where(gpu.positions(CHUNK, gpu.ONE_PER_ROW) < first_start, from_start, 0.0)
            to_end = jnp.where(self.last() >= CHUNK - 1, to_end, 0.0)
            kept = jnp.where(first_start >= CHUNK, kept, 0.0)
        return from_start, to_end, kept

    def seen(self) -> jax.Array:
        """Return the causal mask `[source, target]`, within documents, for this warpgroup's targets."""
        source, target = gpu.row_and_column(CHUNK, HALF)
        target = target + self.me * HALF
        seen = target >= source
        return seen & (target <= gpu.per_row(self.last(), HALF)) if self.documents else seen

    def pairs(self, products: jax.Array, log_decay: jax.Array, dt: jax.Array) -> jax.Array:
        """Return the gradient `[source, target]` of the scores of the chunk's pairs."""
        smem = self.smem
        log = gpu.load(smem.column_decays.at[self.slot, self.mine], gpu.ONE_PER_COLUMN)
        log = gpu.per_column(log, CHUNK) - gpu.per_row(log_decay, HALF)
        # Mask before exp2: below the diagonal the difference is positive and overflows.
        pairs = products * jnp.exp2(jnp.where(self.seen(), log, -jnp.inf))
        scores = gpu.load(smem.scores.at[self.me]).astype(jnp.float32)
        self.write(INSIDE, (pairs * scores).sum(1))
        pairs = pairs * gpu.per_row(dt, HALF)
        smem.pairs.at[self.me][...] = (pairs * scores).astype(self.dtype)
        plgpu.commit_smem()
        return pairs

    def last(self) -> jax.Array:
        """Return, per token, the last token of its document in the chunk."""
        return gpu.load(self.smem.documents.at[0], gpu.ONE_PER_ROW)

    def write(self, vector: int, values: jax.Array) -> None:
        """Store this warpgroup's partial sum of a vector of the strip in shared memory."""
        self.smem.vectors.at[self.buffer, self.me, vector][...] = values

    def release(self) -> None:
        """Let the copying warpgroup refill the strip's slot."""
        plgpu.commit_smem()  # plain loads end before TMA writes
        plgpu.barrier_arrive(self.smem.empty.at[self.slot])

    def send(self, strip: jax.Array) -> None:
        """Sum half of the vectors over both warpgroups, and start copying them to HBM."""
        smem, place, count = self.smem, self.place, VECTORS // 2
        meet(smem)
        summed = smem.summed.at[self.me]
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # the previous copy has read `summed`
        for i in range(count):
            parts = (smem.vectors.at[self.buffer, part, self.me * count + i] for part in range(2))
            first, second = (gpu.load(part, gpu.ONE_PER_ROW) for part in parts)
            summed.at[i][...] = first + second
        plgpu.commit_smem()
        vectors = self.hbm.vectors.at[place.part, place.batch, strip, place.chunk]
        plgpu.copy_smem_to_gmem(summed, vectors.at[pl.ds(self.me * count, count)])


def meet(smem: SimpleNamespace) -> None:
    """Synchronize the two computing warpgroups."""
    plgpu.barrier_arrive(smem.both)
    plgpu.barrier_wait(smem.both)
