r"""Multiply a few rows by wide matrices on Hopper: the projections of one decoded token per batch row.

Each weight is read once, in the layout it is stored in, and each result written once:

    input:  hidden (b, d)   ->  zx (b, 2 e),  BC (b, 2 g n),  dt (b, h)           one kernel, three matrices
    output: gated (b, e)    ->  sum over groups of  scale (b, group) * gated W    and the window of B and C

The bound is HBM, far from the tensor cores' rate, so the rows are padded to the 64 of a WGMMA: TMA fills rows
from b on with zeros, and does not store them. A block owns `width` columns of one matrix, and walks along its
rows, a tile per stage of a ring in shared memory, which one warpgroup fills and multiplies.

The norm before the output projection is a factor per row and group of channels, applied to the group's sum of
products; its mean square arrives as partial sums from `step`. Blocks beyond the output's tiles shift the
windows of B and C, which `step` may only read.
"""

import dataclasses
import itertools
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.typing import DTypeLike
from mamba2_jax.pallas.mosaic_gpu import bridge as gpu
from mamba2_jax.pallas.mosaic_gpu.bridge import plgpu
from mamba2_jax.pallas.mosaic_gpu.plan import MULTIPROCESSORS, SMEM_LIMIT

ROWS = 64  # of a WGMMA; more batch rows are left to XLA
DEPTHS = (128, 64)  # rows of a weight per stage
WIDTHS = (64, 32)  # columns per block
NARROW = 16  # columns per block of a matrix that the others' tiles do not divide, such as that of 80 heads
MOST_BLOCKS = 3  # per multiprocessor, for which shared memory is planned
MOST_STAGES = 8


@dataclasses.dataclass(frozen=True)
class ProductPlan:
    """One launch: columns of every matrix are cut into tiles, one block each."""

    columns: tuple[int, ...]  # of each matrix
    depth: int  # rows of the matrices
    scales: int  # per batch row: groups of rows of the matrices; 0: none
    width: int  # columns per block, where they divide those of the matrix

    @property
    def widths(self) -> list[int]:
        """Columns per block of each matrix: TMA takes whole tiles, or one that is larger than the matrix."""
        return [self.width if c % self.width == 0 or c < self.width else NARROW for c in self.columns]

    @property
    def ends(self) -> list[int]:
        """Number of tiles up to the end of each matrix."""
        tiles = [-(-c // width) for c, width in zip(self.columns, self.widths, strict=True)]
        return list(itertools.accumulate(tiles))

    @property
    def step(self) -> int:
        """Rows of a matrix per stage; they divide those of a scale."""
        each = self.depth // max(1, self.scales)
        return next((step for step in DEPTHS if each % step == 0 and self._fitting(step) >= 3), DEPTHS[-1])

    @property
    def stages(self) -> int:
        """Stages of a block's ring, so that all blocks of a multiprocessor are resident at once, if few."""
        return max(2, min(MOST_STAGES, self._fitting(self.step)))

    def _fitting(self, step: int) -> int:
        blocks = min(-(-self.ends[-1] // MULTIPROCESSORS), MOST_BLOCKS)
        results = ROWS * self.width * (4 + 2)  # in float32 and in 16 bits
        return (SMEM_LIMIT // blocks - 2048 - results) // (2 * step * (ROWS + self.width))

    @property
    def steps(self) -> int:
        """Stages per scale."""
        return -(-self.depth // (max(1, self.scales) * self.step))


def make_plan(columns: Sequence[int], depth: int, scales: int = 0) -> ProductPlan:
    """Plan a launch: wide tiles, or narrow ones while they leave multiprocessors idle."""
    plans = [ProductPlan(tuple(columns), depth, scales, width) for width in WIDTHS]
    return next((plan for plan in plans if plan.ends[-1] >= MULTIPROCESSORS), plans[-1])


def project(
    x: jax.Array, weights: Sequence[jax.Array], dtypes: Sequence[DTypeLike], *, interpret: Any = None
) -> tuple[jax.Array, ...]:
    """Compute `x @ weight` for each of a few weights.

    Args:
        x: `(b, d)` bfloat16 or float16, b up to 64.
        weights: `(d, columns)` in the dtype of x; columns are a multiple of 8.
        dtypes: of the results: that of x, or float32.
        interpret: None on a GPU, or what `bridge.interpreter` returned.

    Returns:
        One `(b, columns)` per weight, accumulated in float32.
    """
    plan = make_plan([weight.shape[1] for weight in weights], x.shape[1])
    outputs = [
        jax.ShapeDtypeStruct((x.shape[0], weight.shape[1]), dtype)
        for weight, dtype in zip(weights, dtypes, strict=True)
    ]

    def projections(*refs, **smem):
        tile, start = lax.axis_index("tile"), 0
        for i, (width, end) in enumerate(zip(plan.widths, plan.ends, strict=True)):
            hbm = SimpleNamespace(x=refs[0], weight=refs[1 + i], output=refs[1 + len(weights) + i])
            block = Block(plan, hbm, SimpleNamespace(**smem), tile - start, width)
            pl.when((tile >= start) & (tile < end))(block.run)
            start = end

    run = gpu.kernel(
        projections,
        outputs=tuple(outputs),
        scratch=_scratch(plan, x.dtype, outputs),
        grid={"tile": plan.ends[-1]},
        interpret=interpret,
    )
    return run(x, *weights)


def output(
    gated: jax.Array,
    weight: jax.Array,
    sums: jax.Array | None,
    BC: jax.Array,
    window: jax.Array,
    alive: jax.Array | None,
    *,
    eps: float,
    interpret: Any = None,
) -> tuple[jax.Array, jax.Array]:
    """Finish the norm of `step`, project, and shift the window of B and C.

    Args:
        gated: `(b, e)` from `step`, b up to 64.
        weight: `(e, d)` in the dtype of gated.
        sums: `(64, g, s)` float32 from `step`; None without a norm.
        BC: `(b, 2, g * n)`, the newest entry of the window.
        window: `(b, k - 1, 2, g * n)`, updated in place.
        alive: `(b,)`: where false, the window keeps its values. None: all rows.
        eps: added to the mean squares.
        interpret: None on a GPU, or what `bridge.interpreter` returned.

    Returns:
        update: `(b, d)` float32.
        window: the new one.
    """
    batch, depth = gated.shape
    plan = make_plan([weight.shape[1]], depth, 0 if sums is None else sums.shape[1])
    outputs = [jax.ShapeDtypeStruct((batch, weight.shape[1]), jnp.float32)]
    inputs = {"x": gated, "weight": weight, "BC": BC}
    optional = {"sums": sums, "alive": None if alive is None else alive.astype(jnp.int32)}
    inputs |= {name: array for name, array in optional.items() if array is not None}

    def output_projection(*refs, **smem):
        hbm = SimpleNamespace(**dict(zip([*inputs, "window", "output"], refs, strict=True)))
        tile, tiles = lax.axis_index("tile"), plan.ends[-1]
        pl.when(tile < tiles)(Block(plan, hbm, SimpleNamespace(**smem), tile, plan.width, eps).run)
        pl.when(tile >= tiles)(lambda: _shift(hbm, tile - tiles))

    run = gpu.kernel(
        output_projection,
        outputs=tuple(outputs),
        scratch=_scratch(plan, gated.dtype, outputs),
        grid={"tile": plan.ends[-1] + batch},
        interpret=interpret,
    )
    update, window = gpu.call_in_place(run, inputs.values(), [window], outputs)
    return update, window


def _scratch(plan: ProductPlan, dtype: DTypeLike, outputs: Sequence[jax.ShapeDtypeStruct]) -> dict[str, Any]:
    """Declare the rings, which share memory, their barriers, and a buffer per width and dtype of a result."""
    rings = [
        (
            gpu.tiles(plan.stages, ROWS, plan.step, dtype=dtype, width=width),
            gpu.tiles(plan.stages, plan.step, width, dtype=dtype),
        )
        for width in _distinct(plan.widths)
    ]
    results = {
        _result(width, output.dtype): gpu.tiles(ROWS, width, dtype=output.dtype)
        for width, output in zip(plan.widths, outputs, strict=True)
    }
    return results | {
        "rings": plgpu.RefUnion(*rings),
        "full": plgpu.Barrier(num_arrivals=2, num_barriers=plan.stages),
        "read": plgpu.Barrier(num_arrivals=1),
    }


def _distinct(widths: Sequence[int]) -> list[int]:
    return list(dict.fromkeys(widths))


def _result(width: int, dtype: DTypeLike) -> str:
    return f"result_{width}_{jnp.dtype(dtype).name}"


@dataclasses.dataclass(frozen=True)
class Block:
    """The work of a block: the columns of one tile."""

    plan: ProductPlan
    hbm: SimpleNamespace
    smem: SimpleNamespace
    tile: jax.Array
    width: int
    eps: float = 0.0

    def run(self) -> None:
        """Multiply, and store the tile's columns."""
        for stage in range(min(self.plan.stages, self.plan.steps * max(1, self.plan.scales))):
            self.fetch(jnp.int32(stage))
        if self.plan.scales:
            total = gpu.zeros(ROWS, self.width)
            total = lax.fori_loop(jnp.int32(0), jnp.int32(self.plan.scales), self.add_group, total)
        else:
            total = self.sum_of_steps(jnp.int32(0))
        result = getattr(self.smem, _result(self.width, self.hbm.output.dtype))
        result[...] = total.astype(result.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(result, self.hbm.output.at[self.rows, self.columns])
        plgpu.wait_smem_to_gmem(0)

    def add_group(self, group: jax.Array, total: jax.Array) -> jax.Array:
        """Add the scaled products of a group of channels."""
        products = self.sum_of_steps(group * self.plan.steps)
        squares = jnp.sum(gpu.load_from_hbm(self.hbm.sums.at[:, group]), axis=1)
        mean = squares * jnp.float32(self.plan.scales / self.plan.depth)
        return total + products * gpu.per_row(lax.rsqrt(mean + jnp.float32(self.eps)), self.width)

    def sum_of_steps(self, first: jax.Array) -> jax.Array:
        """Sum the products of the group whose stages begin at `first`, refilling the ring behind them."""
        x, weight = self.ring

        def walk(accumulator):
            @pl.loop(first, first + self.plan.steps)
            def _(step):
                slot = lax.rem(step, jnp.int32(self.plan.stages))
                plgpu.barrier_wait(self.smem.full.at[slot])
                plgpu.wgmma(accumulator, x.at[slot], weight.at[slot])
                plgpu.wgmma_wait(1)  # the previous step has been read,
                plgpu.barrier_arrive(self.smem.read)  # by all warps
                plgpu.barrier_wait(self.smem.read)
                behind = step - 1 + self.plan.stages
                last = self.plan.steps * max(1, self.plan.scales)
                pl.when((step > first) & (behind < last))(lambda: self.fetch(behind))

            return accumulator[...]

        total = pl.run_scoped(walk, plgpu.ACC((ROWS, self.width), jnp.float32))
        behind = first + self.plan.steps - 1 + self.plan.stages  # the last step has now been read too
        pl.when(behind < self.plan.steps * self.plan.scales)(lambda: self.fetch(behind))
        return total

    def fetch(self, step: jax.Array) -> None:
        """Start copying the operands of a step into its slot."""
        slot = lax.rem(step, jnp.int32(self.plan.stages))
        depth = pl.ds(step * self.plan.step, self.plan.step)
        full, (x, weight) = self.smem.full.at[slot], self.ring
        plgpu.copy_gmem_to_smem(self.hbm.x.at[self.rows, depth], x.at[slot], full)
        plgpu.copy_gmem_to_smem(self.hbm.weight.at[depth, self.columns], weight.at[slot], full)

    @property
    def ring(self) -> tuple[Any, Any]:
        """The ring of this width: x, and the matrix."""
        return self.smem.rings[_distinct(self.plan.widths).index(self.width)]

    @property
    def rows(self) -> Any:
        """All rows of a WGMMA, most of which may lie beyond the batch; a traced start is not checked."""
        return pl.ds(self.tile - self.tile, ROWS)

    @property
    def columns(self) -> Any:
        """Columns of the tile."""
        return pl.ds(self.tile * self.width, self.width)


def _shift(hbm: SimpleNamespace, row: jax.Array) -> None:
    """Shift the window of B and C of one batch row, unless the row has ended."""

    def shift():
        reach = hbm.window.shape[1]
        for which in range(2):
            ahead = [gpu.load_line(hbm.window.at[row, tap, which]) for tap in range(1, reach)]
            newest = gpu.load_line(hbm.BC.at[row, which]).astype(hbm.window.dtype)
            for tap, values in enumerate([*ahead, newest]):
                gpu.store_to_hbm(hbm.window.at[row, tap, which], values)

    if hasattr(hbm, "alive"):
        pl.when(hbm.alive[row] != 0)(shift)
    else:
        shift()
