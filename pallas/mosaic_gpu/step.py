r"""Advance Mamba-2 mixers by one token on Hopper: one kernel between the input and the output projection.

A block owns `rows` channels of one head of one batch row, and with them a slice `(rows, n)` of the state:

    B, C = silu(conv(B, C)),  x = silu(conv(x)),  dt = softplus(dt + bias)
    state = exp(dt A) state + dt x B^T                 (rows, n) float32, read once and written in place
    gated = (state C + D x) silu(z)                    (rows,)
    sums = sum(gated ** 2)                             for the group's norm

At batch 1 the state of a layer, 2 to 4 MB, must be spread over as many multiprocessors as possible. So no
block sees a whole group of channels, and the kernel leaves the norm's last factor to its consumer: `gated` is
already multiplied by the norm's weight, and the mean square of a group is a sum of `sums`.

The window of x, the last inputs of its convolution, is shifted in place by the block of the channels. The
window of B and C is read by all blocks of the group: here it stays as it is, and the consumer shifts it.

Loads and stores go directly between HBM and registers: a block makes all its loads before it needs one, and
several blocks share a multiprocessor, so that enough bytes are in flight without shared memory.
"""

import dataclasses
import functools
import operator
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from mamba2_jax.pallas.mosaic_gpu import bridge as gpu
from mamba2_jax.pallas.mosaic_gpu.plan import MULTIPROCESSORS
from mamba2_jax.pallas.mosaic_gpu.products import ROWS

MOST_ELEMENTS = 64 * 128  # of the state per block: 64 registers of each of its 128 threads
LEAST_ROWS = 8  # of a matrix in `bridge.ROWS`


@dataclasses.dataclass(frozen=True)
class StepPlan:
    """One launch of the step."""

    batch: int
    heads: int
    head_dim: int
    groups: int
    state_dim: int
    taps: int
    rows: int  # channels per block

    @property
    def heads_per_group(self) -> int:
        """Heads that share B and C."""
        return self.heads // self.groups

    @property
    def parts(self) -> int:
        """Blocks per head."""
        return self.head_dim // self.rows


def make_plan(batch: int, heads: int, head_dim: int, groups: int, state_dim: int, taps: int) -> StepPlan:
    """Plan a launch: the largest slices that fit into registers, or smaller ones while SMs are idle."""
    fitting = [
        rows
        for rows in range(LEAST_ROWS, head_dim + 1, LEAST_ROWS)
        if head_dim % rows == 0 and rows * state_dim <= MOST_ELEMENTS
    ]
    filling = [rows for rows in fitting if batch * heads * (head_dim // rows) >= MULTIPROCESSORS]
    return StepPlan(batch, heads, head_dim, groups, state_dim, taps, max(filling or fitting[:1]))


def step(
    zx: jax.Array,
    BC: jax.Array,
    dt: jax.Array,
    window_x: jax.Array,
    window_BC: jax.Array,
    state: jax.Array,
    weights: Any,
    alive: jax.Array | None,
    *,
    dt_limits: tuple[float, float],
    interpret: Any = None,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Run the kernel.

    Args:
        zx: gate and input `(b, 2, e)`.
        BC: `(b, 2, g * n)`, before the convolution.
        dt: `(b, h)` float32, before softplus.
        window_x: `(b, k - 1, e)`, updated in place.
        window_BC: `(b, k - 1, 2, g * n)`, only read.
        state: `(b, h, p, n)` float32, updated in place.
        weights: parameters of the mixer, as `mamba2_jax.ops.MixerWeights`.
        alive: `(b,)`; where false, window and state keep their values, and `gated` is 0. None: all rows.
        dt_limits: bounds of dt after softplus.
        interpret: None on a GPU, or what `bridge.interpreter` returned.

    Returns:
        gated: `(b, e)` in the dtype of zx, times the norm's weight.
        sums: `(64 or b, g, s)` float32: sums of squares of `gated` before that weight, s per group of
            channels; rows from b on are not written.
        window_x: the new one.
        state: the new one.
    """
    batch, heads, head_dim, state_dim = state.shape
    groups = BC.shape[2] // state_dim
    plan = make_plan(batch, heads, head_dim, groups, state_dim, weights.taps_x.shape[0])
    full = jnp.float32
    inputs = {
        "zx": zx,
        "BC": BC,
        "dt": dt,
        "window_BC": window_BC,
        "taps_x": weights.taps_x,
        "taps_BC": weights.taps_BC,
        "dt_bias": weights.dt_bias,
        "A_log": weights.A_log,
        "D": weights.D,
    }
    optional = {"bias_x": weights.bias_x, "bias_BC": weights.bias_BC, "norm": weights.norm}
    optional["alive"] = None if alive is None else alive.astype(jnp.int32)
    inputs |= {name: array for name, array in optional.items() if array is not None}
    in_place = {"window_x": window_x, "state": state}
    outputs = {
        "gated": jax.ShapeDtypeStruct((batch, heads * head_dim), zx.dtype),
        "sums": jax.ShapeDtypeStruct((max(batch, ROWS), groups, heads // groups * plan.parts), full),
    }

    def mixer_step(*refs):
        hbm = SimpleNamespace(**dict(zip([*inputs, *in_place, *outputs], refs, strict=True)))
        Step(plan, hbm, dt_limits).run()

    run = gpu.kernel(
        mixer_step,
        outputs=tuple(outputs.values()),
        scratch={},
        grid={"batch": batch, "head": heads, "part": plan.parts},
        interpret=interpret,
    )
    gated, sums, window_x, state = gpu.call_in_place(
        run, inputs.values(), in_place.values(), outputs.values()
    )
    return gated, sums, window_x, state


@dataclasses.dataclass(frozen=True)
class Step:
    """The work of a block."""

    plan: StepPlan
    hbm: SimpleNamespace
    dt_limits: tuple[float, float]

    def run(self) -> None:
        """Advance the block's channels, unless the batch row has ended."""
        if not hasattr(self.hbm, "alive"):
            self.advance()
            return
        alive = self.hbm.alive[self.row] != 0
        pl.when(alive)(self.advance)

        @pl.when(jnp.logical_not(alive))
        def _():
            nothing = gpu.full_vector(0.0, self.plan.rows)
            self.store(self.hbm.gated.at[self.row, self.channels], nothing)
            self.store_sum(jnp.float32(0))

    def advance(self) -> None:
        """Advance the block's channels by one token."""
        hbm, rows, columns = self.hbm, self.plan.rows, self.plan.state_dim
        mine = hbm.state.at[self.row, self.head, pl.ds(self.part * rows, rows)]
        state = gpu.load_from_hbm(mine, gpu.ROWS)
        x, window = self.convolve_x()
        B, C = self.convolve_BC(0), self.convolve_BC(1)
        z = gpu.load_from_hbm(hbm.zx.at[self.row, 0, self.channels], gpu.ONE_OF_ROWS).astype(jnp.float32)
        dt, decay = self.step_size()

        state = state * decay + gpu.over_columns(x * dt, columns) * gpu.over_rows(B, rows)
        y = jnp.sum(state * gpu.over_rows(C, rows), axis=1) + self.skip() * x
        gated = y * silu(z)
        gpu.store_to_hbm(mine, state)
        self.store_sum(jnp.sum(gated * gated))
        if hasattr(hbm, "norm"):
            weight = gpu.load_from_hbm(hbm.norm.at[self.channels], gpu.ONE_OF_ROWS)
            gated = gated * weight.astype(jnp.float32)
        self.store(hbm.gated.at[self.row, self.channels], gated)
        for tap, values in enumerate(window):
            self.store(hbm.window_x.at[self.row, tap, self.channels], values)

    def convolve_x(self) -> tuple[jax.Array, list[jax.Array]]:
        """Convolve the block's channels; return them and their new window."""

        def load(ref):
            return gpu.load_from_hbm(ref, gpu.ONE_OF_ROWS)

        window = [load(self.hbm.window_x.at[self.row, i, self.channels]) for i in range(self.plan.taps - 1)]
        window.append(load(self.hbm.zx.at[self.row, 1, self.channels]).astype(window[0].dtype))
        taps = [load(self.hbm.taps_x.at[i, self.channels]) for i in range(self.plan.taps)]
        bias = load(self.hbm.bias_x.at[self.channels]) if hasattr(self.hbm, "bias_x") else None
        return convolve(window, taps, bias), window[1:]

    def convolve_BC(self, which: int) -> jax.Array:
        """Convolve B (0) or C (1) of the block's group."""
        hbm, size = self.hbm, self.plan.state_dim
        columns = pl.ds(self.group * size, size)

        def load(ref):
            return gpu.load_from_hbm(ref, gpu.ONE_OF_COLUMNS)

        window = [load(hbm.window_BC.at[self.row, i, which, columns]) for i in range(self.plan.taps - 1)]
        window.append(load(hbm.BC.at[self.row, which, columns]).astype(window[0].dtype))
        taps = [load(hbm.taps_BC.at[i, which, columns]) for i in range(self.plan.taps)]
        bias = load(hbm.bias_BC.at[which, columns]) if hasattr(hbm, "bias_BC") else None
        return convolve(window, taps, bias)

    def step_size(self) -> tuple[jax.Array, jax.Array]:
        """Return dt and the state's decay, scalars of the head."""
        low, high = self.dt_limits
        bias, A_log = (ref[self.head].astype(jnp.float32) for ref in (self.hbm.dt_bias, self.hbm.A_log))
        dt = softplus(self.hbm.dt[self.row, self.head].astype(jnp.float32) + bias)
        dt = jnp.minimum(jnp.maximum(dt, jnp.float32(low)), jnp.float32(high))
        # Bounds as of `ops`: A is finite, and exp(-128) is 0 in float32.
        A = -jnp.exp(jnp.minimum(A_log, jnp.float32(88.0)))
        A = jnp.maximum(A, jnp.float32(-1e30))
        return dt, jnp.exp(jnp.maximum(dt * A, jnp.float32(-128.0)))

    def skip(self) -> jax.Array:
        """Return D: a scalar of the head, or a vector over the block's channels."""
        D = self.hbm.D
        if len(D.shape) == 1:
            return D[self.head].astype(jnp.float32)
        start = self.part * self.plan.rows
        values = gpu.load_from_hbm(D.at[self.head, pl.ds(start, self.plan.rows)], gpu.ONE_OF_ROWS)
        return values.astype(jnp.float32)

    def store(self, ref: Any, values: jax.Array) -> None:
        """Store a vector in the dtype of its array."""
        gpu.store_to_hbm(ref, values.astype(ref.dtype))

    def store_sum(self, value: jax.Array) -> None:
        """Store the block's sum of squares."""
        in_group = lax.rem(self.head, jnp.int32(self.plan.heads_per_group))
        self.hbm.sums[self.row, self.group, in_group * self.plan.parts + self.part] = value

    @property
    def row(self) -> jax.Array:
        """Batch row of the block."""
        return lax.axis_index("batch")

    @property
    def head(self) -> jax.Array:
        """Head of the block."""
        return lax.axis_index("head")

    @property
    def group(self) -> jax.Array:
        """Group of the head."""
        return lax.div(self.head, jnp.int32(self.plan.heads_per_group))

    @property
    def part(self) -> jax.Array:
        """Index of the block's slice of the head."""
        return lax.axis_index("part")

    @property
    def channels(self) -> Any:
        """Channels of the block, of all e."""
        start = self.head * self.plan.head_dim + self.part * self.plan.rows
        return pl.ds(start, self.plan.rows)


def convolve(window: list[jax.Array], taps: list[jax.Array], bias: jax.Array | None) -> jax.Array:
    """Convolve one token in float32, then silu; round as the layers do, to the window's dtype."""
    terms = [a.astype(jnp.float32) * b.astype(jnp.float32) for a, b in zip(window, taps, strict=True)]
    if bias is not None:
        terms.insert(0, bias.astype(jnp.float32))
    return silu(functools.reduce(operator.add, terms)).astype(window[0].dtype).astype(jnp.float32)


def silu(x: jax.Array) -> jax.Array:
    """Compute `x * sigmoid(x)`; for x below -88 the exp is inf, and the result 0."""
    return x / (1.0 + jnp.exp(-x))


def softplus(x: jax.Array) -> jax.Array:
    """Compute `log(1 + exp(x))` of a scalar, accurate for small results too.

    The hardware's logarithm is not accurate near 1: for `log(1 + t)`, t in 0..1, this sums the series of
    `2 atanh(t / (2 + t))`, whose first term left out is below 1e-8 of the result.
    """
    t = jnp.exp(-jnp.abs(x))
    ratio = t / (2.0 + t)  # at most 1/3
    square, series = ratio * ratio, jnp.float32(0)
    for odd in range(15, 0, -2):
        series = series * square + jnp.float32(1 / odd)
    return jnp.maximum(x, 0.0) + 2.0 * ratio * series
