r"""The scan's forward pass on Hopper: one kernel that walks the sequence with the state in registers.

Three warpgroups make a block. One only copies; two compute, each on a strip of 64 channels of a head, and share
B and C in shared memory (`mosaic_plan` cuts the work):

    HBM        x, B, C, log weights                                              y, states
                |                                                                    ^
    warpgroup 2 | TMA: chunk c + stages -> slot           "full" -->  <-- "empty"    | TMA
                v                                                                    |
    SMEM       [ x  B  C  logs ][ x  B  C  logs ][ x  B  C  logs ]   weights  y  ----'
                |
    warpgroups  for each chunk of 64 tokens, all of it transposed (channels or sources in rows):
    0 and 1       weights = (B C^T) * exp2(target - source)   source in rows, target in columns, masked
                  y       = (state C^T) * from_start + D x^T   the state as left operand, from registers
                  y      += x^T weights                        x^T too
                  state   = state * kept + (x^T * to_end) B    accumulated in place

Transposed, because then every left operand comes from registers, and shared memory is read the least. In a
chunk at head_dim 64 and state_dim 128 the tensor cores work 896 clocks, shared memory about 1150, and HBM
about 1400 at 3.0 TB/s for the bytes of one strip: HBM should be the bound. These are counts, not
measurements; the kernel has not run on a GPU yet.

A head of 128 channels is two strips. Few heads and a long sequence: the sequence is cut into pieces, and a
block first walks the chunks before its piece, updating the state only.

Precision: products take 16-bit operands and accumulate in float32; decays and the carried state are float32.
"""

import dataclasses
import functools
import itertools
import types
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from mamba2_jax.pallas import bridge as gpu  # pyright: ignore[reportMissingImports]
from mamba2_jax.pallas.bridge import plgpu  # pyright: ignore[reportMissingImports]
from mamba2_jax.pallas.chunks import document_ends, log_weights  # pyright: ignore[reportMissingImports]
from mamba2_jax.pallas.mosaic_plan import (  # pyright: ignore[reportMissingImports]
    CHUNK,
    SAVE_EVERY,
    STRIP,
    STRIPS_PER_BLOCK,
    Plan,
    make_plan,
)

COPY_REGISTERS, COMPUTE_REGISTERS = 24, 240  # per thread: 128 * (40 + 2 * 232) of the SM's 65536


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
    """Run the scan. Shapes and meaning as in `ops.ssd`.

    Args:
        x: `(b, l, h, p)`, bfloat16 or float16, p 64 or 128 (float32 too in the interpreter).
        dt: `(b, l, h)` float32, 0 at padding.
        A: `(h,)`.
        B: `(b, l, g, n)`, n 64, 128 or 256.
        C: `(b, l, g, n)`.
        D: `(h,)`, `(h, p)` or None.
        initial_state: `(b, h, p, n)` float32.
        segment_ids: `(b, l)` int32 or None.
        save_states: whether to return the states that a backward pass starts from.
        pieces: how often to cut the sequence; None for the rule of `mosaic_plan.choose_pieces`.
        interpret: None on a GPU, or what `bridge.interpreter` returned.

    Returns:
        y: `(b, l, h, p)` in the dtype of x.
        final_state: `(b, h, p, n)` float32.
        saved_states: `(b, ceil(l / 256), h, p, n)` in the dtype of x: the state before tokens 0, 256, 512, ...,
            before a document that starts there resets it. None if not asked for.
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
        pieces=pieces,
    )
    inputs = {
        "x": _whole_tiles(x).reshape(batch, -1, plan.strips, STRIP),
        "B": _whole_tiles(B),
        "C": _whole_tiles(C),
        "logs": log_weights(dt, A, CHUNK),
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
        saves = -(-length // SAVE_EVERY)
        shape = (batch, saves, plan.strips, STRIP, state_dim)
        outputs["saved"] = jax.ShapeDtypeStruct(shape, x.dtype)

    def ssd_forward(*refs, **smem):
        hbm = types.SimpleNamespace(**dict(zip([*inputs, *outputs], refs, strict=True)))
        smem, place, warpgroup = types.SimpleNamespace(**smem), _place(plan), lax.axis_index("warpgroup")

        @pl.when(warpgroup < STRIPS_PER_BLOCK)
        def _():
            plgpu.set_max_registers(COMPUTE_REGISTERS, action="increase")
            _Walk(plan, hbm, smem, place, warpgroup, interpret is not None).run()

        @pl.when(warpgroup == STRIPS_PER_BLOCK)
        def _():
            plgpu.set_max_registers(COPY_REGISTERS, action="decrease")
            _copy(plan, hbm, smem, place)

    run = gpu.kernel(
        ssd_forward,
        outputs=tuple(outputs.values()),
        scratch=_scratch(plan, x.dtype, "documents" in inputs, interpret is not None),
        grid={"piece": len(plan.piece_ends), "batch": batch, "block": groups * plan.blocks_per_group},
        warpgroups=STRIPS_PER_BLOCK + 1,
        interpret=interpret,
    )
    y, final, *saved = run(*inputs.values())
    y = y.reshape(batch, -1, heads, head_dim)[:, :length]
    saved_states = saved[0].reshape(batch, -1, heads, head_dim, state_dim) if saved else None
    return y, final.reshape(initial_state.shape), saved_states


def _whole_tiles(array: jax.Array) -> jax.Array:
    """Pad `(b, l, ...)` to whole rows of tiles: TMA clips what lies past the end, but only in steps of 8 tokens.

    Below one chunk, to a chunk, so that no copy is larger than the array.
    """
    length = array.shape[1]
    missing = max(-(-length // 8) * 8, CHUNK) - length
    return jnp.pad(array, ((0, 0), (0, missing), (0, 0), (0, 0))) if missing else array


def _scratch(plan: Plan, dtype: Any, documents: bool, interpreted: bool) -> dict[str, Any]:
    """Shared memory and barriers of a block; `mosaic_plan.smem_bytes` counts them."""
    stages, pair = plan.stages, STRIPS_PER_BLOCK
    scratch = {
        # One slot for each stage of the pipeline, filled by TMA.
        "x": gpu.tiles(stages, pair, CHUNK, STRIP, dtype=dtype),
        "B": gpu.tiles(stages, CHUNK, plan.state_dim, dtype=dtype),
        "C": gpu.tiles(stages, CHUNK, plan.state_dim, dtype=dtype),
        # Twice, because a vector over rows and one over columns cannot be loaded from one place.
        "row_logs": plgpu.SMEM((stages, pair, 2, CHUNK), jnp.float32),
        "column_logs": plgpu.SMEM((stages, pair, CHUNK), jnp.float32),
        # One for each compute warpgroup.
        "from_start": plgpu.SMEM((pair, CHUNK), jnp.float32),
        "to_end": plgpu.SMEM((pair, CHUNK), jnp.float32),
        "weights": gpu.tiles(pair, CHUNK, CHUNK, dtype=dtype),
        "y": gpu.tiles(pair, CHUNK, STRIP, dtype=dtype),
        "full": plgpu.Barrier(num_arrivals=2 + 3 * pair + documents, num_barriers=stages),
        "empty": plgpu.Barrier(num_arrivals=pair, num_barriers=stages),
    }
    if documents:
        scratch["documents"] = plgpu.SMEM((stages, 2, CHUNK), jnp.int32)
    if interpreted:  # for left operands that are in registers on a GPU
        scratch["operand"] = gpu.tiles(pair, STRIP, max(CHUNK, plan.state_blocks[0][1]), dtype=dtype)
    return scratch


@dataclasses.dataclass(frozen=True)
class _Place:
    """Where a block stands: its row, its group, its two strips, and the chunks it writes y for."""

    batch: Any
    group: Any
    first_strip: Any
    last_strip: Any
    start: Any
    end: Any

    def strip(self, i: Any) -> Any:
        """The strip of warpgroup `i`; a group with an odd number of strips has its last one walked twice."""
        return jnp.minimum(self.first_strip + i, self.last_strip)

    def owns(self, i: Any) -> Any:
        """Whether warpgroup `i` is the one that stores what it computes."""
        return self.first_strip + i <= self.last_strip


def _place(plan: Plan) -> _Place:
    block, piece = lax.axis_index("block"), lax.axis_index("piece")
    per_group = jnp.int32(plan.blocks_per_group)
    group = lax.div(block, per_group)
    first_of_group = group * plan.strips_per_group
    start, end = jnp.int32(0), jnp.int32(plan.piece_ends[0])
    for i, (left, right) in enumerate(itertools.pairwise(plan.piece_ends), 1):
        start = jnp.where(piece == i, jnp.int32(left), start)
        end = jnp.where(piece == i, jnp.int32(right), end)
    return _Place(
        batch=lax.axis_index("batch"),
        group=group,
        first_strip=first_of_group + lax.rem(block, per_group) * STRIPS_PER_BLOCK,
        last_strip=first_of_group + (plan.strips_per_group - 1),
        start=start,
        end=end,
    )


def _copy(plan: Plan, hbm: Any, smem: Any, place: _Place) -> None:
    """The copying warpgroup: keep every slot full."""

    def fetch(chunk, slot):
        tokens, full = pl.ds(chunk * CHUNK, CHUNK), smem.full.at[slot]
        own = chunk >= place.start  # else a chunk before the block's piece, which asks for no output
        copy = functools.partial(plgpu.copy_gmem_to_smem, barrier=full)
        copy(hbm.B.at[place.batch, tokens, place.group], smem.B.at[slot])
        for i in range(STRIPS_PER_BLOCK):
            head = lax.div(place.strip(i), jnp.int32(plan.strips_per_head))
            copy(hbm.x.at[place.batch, tokens, place.strip(i)], smem.x.at[slot, i])
            copy(hbm.logs.at[place.batch, head, chunk], smem.row_logs.at[slot, i])
        if hasattr(hbm, "documents"):
            copy(hbm.documents.at[place.batch, chunk], smem.documents.at[slot])

        @pl.when(own)
        def _():
            copy(hbm.C.at[place.batch, tokens, place.group], smem.C.at[slot])
            for i in range(STRIPS_PER_BLOCK):
                head = lax.div(place.strip(i), jnp.int32(plan.strips_per_head))
                copy(hbm.logs.at[place.batch, head, chunk, 0], smem.column_logs.at[slot, i])

        @pl.when(jnp.logical_not(own))
        def _():
            for _ in range(1 + STRIPS_PER_BLOCK):
                plgpu.barrier_arrive(full)

    for stage in range(plan.stages):
        fetch(jnp.int32(stage), jnp.int32(stage))

    @pl.loop(jnp.int32(0), place.end)
    def _(chunk):
        slot = lax.rem(chunk, jnp.int32(plan.stages))
        plgpu.barrier_wait(smem.empty.at[slot])
        pl.when(chunk + plan.stages < place.end)(lambda: fetch(chunk + plan.stages, slot))


@dataclasses.dataclass(frozen=True)
class _Walk:
    """A computing warpgroup on its walk over one strip. Matrices are [channel or source token, ...]."""

    plan: Plan
    hbm: Any
    smem: Any
    place: _Place
    me: Any  # 0 or 1
    interpreted: bool

    def run(self) -> None:
        """Walk the chunks up to the end of the block's piece, the state in registers."""
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
                final.at[:, columns][...] = part

    def step(self, D: Any, chunk: Any, state: Any) -> Any:
        """One chunk: y, and the state after it."""
        slot = lax.rem(chunk, jnp.int32(self.plan.stages))
        plgpu.barrier_wait(self.smem.full.at[slot])
        B, C = self.smem.B.at[slot], gpu.transposed(self.smem.C.at[slot])
        source, last, kept = self.decays(slot)
        target = gpu.load(self.smem.column_logs.at[slot, self.me], gpu.ONE_PER_COLUMN)
        log_weights = gpu.per_column(target, CHUNK) - gpu.per_row(source, CHUNK)  # [source, target]
        # Mask before exp2: below the diagonal the difference is positive and overflows.
        weights = jnp.exp2(jnp.where(seen(last), log_weights, -jnp.inf))
        self.smem.weights.at[self.me][...] = (self.product(B, C) * weights).astype(self.dtype)
        plgpu.commit_smem()

        x = gpu.load(gpu.transposed(self.smem.x.at[slot, self.me]))  # [channel, token], and so is y
        y = None
        for part, columns in zip(state, self.state_columns, strict=True):
            y = self.product(part.astype(self.dtype), C.at[columns], y)
        y = y * self.turned(self.smem.from_start)
        if D is not None:
            y = y + gpu.per_row(D, CHUNK) * x.astype(jnp.float32)
        y = self.product(x, self.smem.weights.at[self.me], y)
        state = self.updated(state, slot, kept, x)
        plgpu.barrier_arrive(self.smem.empty.at[slot])
        self.send(chunk, y)
        self.save(chunk + 1, state)
        return state

    def pass_by(self, chunk: Any, state: Any) -> Any:
        """A chunk before the block's piece: the state after it."""
        slot = lax.rem(chunk, jnp.int32(self.plan.stages))
        plgpu.barrier_wait(self.smem.full.at[slot])
        _, _, kept = self.decays(slot)
        state = self.updated(state, slot, kept, gpu.load(gpu.transposed(self.smem.x.at[slot, self.me])))
        plgpu.barrier_arrive(self.smem.empty.at[slot])
        return state

    def decays(self, slot: Any) -> tuple[Any, Any, Any]:
        """Put each token's decay from the chunk's start, and to its end, into shared memory to be `turned`.

        Returns:
            source: one per token, as in `chunks`.
            last: the last token of its document in this chunk, or None without documents.
            kept: what stays of the state over the chunk, a number.
        """
        target, source = (gpu.load(self.smem.row_logs.at[slot, self.me, i], gpu.ONE_PER_ROW) for i in (0, 1))
        end = self.smem.row_logs[slot, self.me, 0, CHUNK - 1]
        from_start, to_end, kept, last = jnp.exp2(target), jnp.exp2(end - source), jnp.exp2(end), None
        if hasattr(self.smem, "documents"):
            last = gpu.load(self.smem.documents.at[slot, 0], gpu.ONE_PER_ROW)
            first_start = self.smem.documents[slot, 1, 0]
            token = gpu.positions(CHUNK, gpu.ONE_PER_ROW)
            from_start = jnp.where(token < first_start, from_start, 0.0)
            to_end = jnp.where(last == CHUNK - 1, to_end, 0.0)
            kept = jnp.where(first_start == CHUNK, kept, 0.0)
        self.smem.from_start.at[self.me][...] = from_start
        self.smem.to_end.at[self.me][...] = to_end
        return source, last, kept

    def turned(self, vector: Any) -> jax.Array:
        """A vector over the rows, stored before, as one over the columns of `[channel, token]`."""
        return gpu.per_column(gpu.load(vector.at[self.me], gpu.ONE_PER_COLUMN), STRIP)

    def updated(self, state: Any, slot: Any, kept: Any, x: jax.Array) -> Any:
        """`state * kept + (x * to_end) B`."""
        x_to_end = (x.astype(jnp.float32) * self.turned(self.smem.to_end)).astype(self.dtype)
        return tuple(
            self.product(x_to_end, self.smem.B.at[slot, :, columns], part * kept)
            for part, columns in zip(state, self.state_columns, strict=True)
        )

    def send(self, chunk: Any, y: jax.Array) -> None:
        """Send y off to HBM; the y before it must have left shared memory."""
        mine, tokens = self.smem.y.at[self.me], pl.ds(chunk * CHUNK, CHUNK)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        gpu.transposed(mine)[...] = y.astype(self.dtype)
        plgpu.commit_smem()
        target = self.hbm.y.at[self.place.batch, tokens, self.place.strip(self.me)]
        pl.when(self.owns)(lambda: plgpu.copy_smem_to_gmem(mine, target))

    def save(self, chunk: Any, state: Any) -> None:
        """Write the state before every 256th token straight to HBM, if asked to.

        Called after a step, not before the next: there the compiler would keep the state in 16 bits, which the
        step needs later, in registers from here on, and spill.
        """
        if not hasattr(self.hbm, "saved"):
            return
        every = jnp.int32(SAVE_EVERY // CHUNK)
        place = self.hbm.saved.at[self.place.batch, lax.div(chunk, every), self.place.strip(self.me)]

        @pl.when(self.owns & (lax.rem(chunk, every) == 0) & (chunk < self.plan.chunks))
        def _():
            for part, columns in zip(state, self.state_columns, strict=True):
                place.at[:, columns][...] = part.astype(self.dtype)

    def product(self, a: Any, b: Any, start: jax.Array | None = None) -> jax.Array:
        """`start + a @ b`, whichever way this kernel runs."""
        spill = self.smem.operand.at[self.me] if self.interpreted else None
        return gpu.product(a, b, start, spill=spill, interpreted=self.interpreted)

    @property
    def dtype(self) -> Any:
        return self.hbm.x.dtype

    @property
    def owns(self) -> Any:
        return self.place.owns(self.me)

    @property
    def state_columns(self) -> list[Any]:
        return [pl.ds(start, width) for start, width in self.plan.state_blocks]


def seen(last: jax.Array | None) -> jax.Array:
    """Which token, in columns, sees which, in rows: itself and what came before in the same document."""
    source, target = gpu.row_and_column(CHUNK, CHUNK)
    sees = target >= source
    return sees if last is None else sees & (target <= gpu.per_row(last, CHUNK))
