r"""The second backward kernel: the gradients of B and C, and what those of dt, A and D are summed from.

A block owns one chunk of 64 tokens of a group and loops over the group's strips of 64 channels. Within a chunk,
with `a[i]` the decay from its start through token `i`, `w[j]` that from behind token `j` to its end, `H` the
state that enters it, `G` the gradient of the state that leaves it, and, for `j <= i` in one document,

    pairs[j, i] = (x[j] . dy[i]) a[i] / a[j]            scores[j, i] = B[j] . C[i]

the gradients are sums over the strips,

    dB[j] = sum  w[j] dt[j] G^T x[j]  +  sum_i dt[j] pairs[j, i] C[i]
    dC[i] = sum  a[i] H^T dy[i]       +  sum_j dt[j] pairs[j, i] B[j]

and each token and strip gives four numbers, of which XLA makes the gradients of dt and A:

    inside[j]  = sum_i pairs[j, i] scores[j, i]                       the pairs of this chunk, by their source
    across[k]  = sum over j < k <= i  dt[j] pairs[j, i] scores[j, i]  those which the decay of token k is part of
    read[i]    = a[i] C[i]^T H^T dy[i]                                the entering state and token i
    left[j]    = w[j] B[j]^T G^T x[j]                                 token j and the leaving state
    over       = a[end] <H, G>                                        the two states; 64 parts, to be summed

These are sums of what the decay of a token multiplies, never differences of larger ones: strong decay costs no
digits. A sixth row holds `sum_i x[i] dy[i]` for each channel, the gradient of D.

HBM holds `H` and `G` only at the ends of spans of four chunks. For each strip, a block first brings `H` up over
the chunks before its own, and `G` down over those behind: nothing else passes between chunks. A copying
warpgroup runs ahead with a ring of tiles; two computing ones take half of state_dim each, and half of the
targets `i` of the pairs:

    for each strip    H = H kept + (x w dt)^T B                 for each chunk of the span before this one
                      dC += a (dy H),  read
                      pairs, d_scores += dt pairs, inside, across
                      G = G kept + (dy a)^T C                   for each chunk of the span behind, backwards
                      over,  dB += w dt (x G),  left
    at the end        dB += d_scores C,  dC += d_scores^T B
"""

import functools
import types
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from mamba2_jax.pallas import bridge as gpu  # pyright: ignore[reportMissingImports]
from mamba2_jax.pallas.bridge import plgpu, product, transposed  # pyright: ignore[reportMissingImports]
from mamba2_jax.pallas.mosaic_plan import CHUNK, SAVE_EVERY, STRIP  # pyright: ignore[reportMissingImports]

SPAN = SAVE_EVERY // CHUNK  # chunks between two states in HBM
HALF = CHUNK // 2
COPY_REGISTERS, COMPUTE_REGISTERS = 24, 240
VECTORS = 6  # inside, across, read, left, over, and x * dy
RING = 13  # tiles of shared memory; a strip takes 5 to 9 of them


def gradients(x, dy, states, state_gradients, B, C, decays, documents, *, splits=1, interpret=None):
    """Return dB, dC and the vectors of the module's docstring.

    Args:
        x: `(b, l, strips, 64)`, compute dtype; `l` is a multiple of 8 and at least 64.
        dy: as x.
        states: `(b, spans, strips, 64, n)`, compute dtype: the state before each span.
        state_gradients: as states: the gradient of the state after each span.
        B: `(b, l, g, n)`, compute dtype.
        C: `(b, l, g, n)`.
        decays: `(b, h, SPAN * spans, 2, 64)` float32: log2 of the decay from the chunk's start, and dt.
        documents: `(b, SPAN * spans, 2, 64)` int32, as from `chunks.document_ends`, or None.
        splits: into how many parts to cut the strips of a group, for blocks enough to fill a GPU.
        interpret: None on a GPU, or what `bridge.interpreter` returned.

    Returns:
        dB: `(splits, b, chunks * 64, g, n)`, to be summed over the splits; float32 if there are several,
            otherwise compute dtype.
        dC: as dB.
        vectors: `(parts, b, strips, chunks, VECTORS, 64)` float32, to be summed over the parts.
    """
    batch, length, strips, _ = x.shape
    groups, state_dim = B.shape[2:]
    half = min(STRIP, state_dim // 2)
    plan = types.SimpleNamespace(
        chunks=-(-length // CHUNK),
        strips_per_group=strips // groups,
        strips_per_split=-(-strips // groups // splits),
        strips_per_head=strips // decays.shape[1],
        half=half,  # of state_dim, for each computing warpgroup
        parts=state_dim // (2 * half),  # blocks that share the columns of a wide state
        tiles=2 * half // STRIP,  # of a block's columns of the state
        others=(state_dim - 2 * half) // STRIP,  # tiles of the other blocks' columns
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
        hbm = types.SimpleNamespace(**dict(zip([*inputs, *outputs], refs, strict=True)))
        _block(plan, hbm, types.SimpleNamespace(**smem), interpret is not None)

    run = gpu.kernel(
        ssd_backward_chunks,
        outputs=tuple(outputs.values()),
        scratch=_scratch(plan, x.dtype, documents is not None),
        grid={"part": plan.parts * splits, "batch": batch, "group": groups, "chunk": plan.chunks},
        warpgroups=3,
        interpret=interpret,
    )
    return run(*inputs.values())


def _scratch(plan: Any, dtype: Any, documents: bool) -> dict[str, Any]:
    """Shared memory and barriers of a block. All tiles are 32 columns wide, to be cut in halves."""
    tiles = functools.partial(gpu.tiles, dtype=dtype, width=HALF)
    scratch = {
        "rows": tiles(2, (SPAN + 1) * CHUNK, plan.half),  # B up to the own chunk, C from it on
        "ring": tiles(RING, CHUNK, STRIP),
        "scores": tiles(2, CHUNK, HALF),
        "pairs": tiles(2, CHUNK, HALF),
        "before": tiles(CHUNK, CHUNK),
        # Twice, because a vector over rows and one over columns cannot be loaded from one place.
        "decays": plgpu.SMEM((2, SPAN, 2, CHUNK), jnp.float32),
        "column_decays": plgpu.SMEM((2, CHUNK), jnp.float32),
        "vectors": plgpu.SMEM((2, 2, VECTORS, CHUNK), jnp.float32),
        "summed": plgpu.SMEM((2, VECTORS // 2, CHUNK), jnp.float32),
        "resident": plgpu.Barrier(num_arrivals=2 * (SPAN + 1) + documents),
        "full": plgpu.Barrier(num_arrivals=1, num_barriers=RING),
        "empty": plgpu.Barrier(num_arrivals=2, num_barriers=RING),
        "decays_full": plgpu.Barrier(num_arrivals=2, num_barriers=2),
        "decays_empty": plgpu.Barrier(num_arrivals=2, num_barriers=2),
        "both": plgpu.Barrier(num_arrivals=2),
    }
    if documents:
        scratch["documents"] = plgpu.SMEM((SPAN, 2, CHUNK), jnp.int32)
    return scratch


def _block(plan: Any, hbm: Any, smem: Any, interpreted: bool) -> None:
    """What every warpgroup of a block runs: copy or compute."""
    warpgroup = lax.axis_index("warpgroup")

    @pl.when(warpgroup < 2)
    def _():
        plgpu.set_max_registers(COMPUTE_REGISTERS, action="increase")
        _compute(plan, hbm, smem, _place(plan), warpgroup, interpreted)

    @pl.when(warpgroup == 2)
    def _():
        plgpu.set_max_registers(COPY_REGISTERS, action="decrease")
        _copy(plan, hbm, smem, _place(plan))


def _place(plan: Any) -> Any:
    """Find the block's chunk in its span, its strips, and the order of the tiles in its ring."""
    chunk, group, part = lax.axis_index("chunk"), lax.axis_index("group"), lax.axis_index("part")
    split = lax.div(part, jnp.int32(plan.parts))
    span, own = lax.div(chunk, jnp.int32(SPAN)), lax.rem(chunk, jnp.int32(SPAN))
    past = split * plan.strips_per_split
    place = types.SimpleNamespace(
        batch=lax.axis_index("batch"),
        group=group,
        chunk=chunk,
        span=span,
        own=own,  # chunks of the span before this one
        behind=jnp.minimum(SPAN, plan.chunks - span * SPAN) - 1 - own,
        part=lax.rem(part, jnp.int32(plan.parts)),
        split=split,
        strip=group * plan.strips_per_group + past,
        strips=jnp.minimum(plan.strips_per_split, plan.strips_per_group - past),
    )
    # For each strip: the state, x of the chunks before, the state's gradient, dy of the chunks behind from the
    # last one down, and the own dy and x. The tiles of other blocks' columns of B and C precede them.
    place.gradient_tile = plan.tiles + own
    place.own_tile = place.gradient_tile + plan.tiles + place.behind
    place.tiles_per_strip = place.own_tile + 2
    place.first_tile = lambda strip: 2 * plan.others + strip * place.tiles_per_strip
    return place


def _copy(plan: Any, hbm: Any, smem: Any, place: Any) -> None:
    """The copying warpgroup: B and C once, then the ring, as fast as it empties."""

    def tokens(chunk):
        return pl.ds((place.span * SPAN + chunk) * CHUNK, CHUNK)

    def columns(tile):
        return pl.ds(tile * STRIP, STRIP)

    def put(number, source):
        slot = lax.rem(number, jnp.int32(RING))
        pl.when(number >= RING)(lambda: plgpu.barrier_wait(smem.empty.at[slot]))
        plgpu.copy_gmem_to_smem(source, smem.ring.at[slot], smem.full.at[slot])

    @pl.loop(jnp.int32(0), jnp.int32(SPAN + 1))
    def _(index):
        target = pl.ds(pl.multiple_of(index * CHUNK, CHUNK), CHUNK)
        last = place.own + place.behind  # behind a row's last chunk there is none: it is copied again
        for array, chunk, wanted in (
            (hbm.B, index, index <= place.own),
            (hbm.C, jnp.minimum(index - 1, last), index > place.own),
        ):
            for half in range(2):
                wide = pl.ds((place.part * 2 + half) * plan.half, plan.half)

                @pl.when(wanted)
                def _(array=array, chunk=chunk, half=half, wide=wide):
                    source = array.at[place.batch, tokens(chunk), place.group, wide]
                    plgpu.copy_gmem_to_smem(source, smem.rows.at[half, target], smem.resident)

    if hasattr(hbm, "documents"):
        source = hbm.documents.at[place.batch, pl.ds(place.span * SPAN, SPAN)]
        plgpu.copy_gmem_to_smem(source, smem.documents, smem.resident)
    for i in range(plan.others):
        other = lax.rem((place.part + 1) * plan.tiles + i, jnp.int32(plan.tiles + plan.others))
        for k, array in enumerate((hbm.B, hbm.C)):
            source = array.at[place.batch, tokens(place.own), place.group, columns(other)]
            put(jnp.int32(2 * i + k), source)

    @pl.loop(jnp.int32(0), place.strips)
    def _(index):
        strip, buffer, first = place.strip + index, lax.rem(index, jnp.int32(2)), place.first_tile(index)
        full = smem.decays_full.at[buffer]
        pl.when(index >= 2)(lambda: plgpu.barrier_wait(smem.decays_empty.at[buffer]))
        head = hbm.decays.at[place.batch, lax.div(strip, jnp.int32(plan.strips_per_head))]
        plgpu.copy_gmem_to_smem(head.at[pl.ds(place.span * SPAN, SPAN)], smem.decays.at[buffer], full)
        plgpu.copy_gmem_to_smem(head.at[place.chunk, 0], smem.column_decays.at[buffer], full)

        wide = [columns(place.part * plan.tiles + i) for i in range(plan.tiles)]
        for i in range(plan.tiles):
            put(first + i, hbm.states.at[place.batch, place.span, strip, :, wide[i]])

        @pl.loop(jnp.int32(0), place.own)
        def _(chunk):
            put(first + plan.tiles + chunk, hbm.x.at[place.batch, tokens(chunk), strip])

        for i in range(plan.tiles):
            source = hbm.state_gradients.at[place.batch, place.span, strip, :, wide[i]]
            put(first + place.gradient_tile + i, source)

        @pl.loop(jnp.int32(0), place.behind)
        def _(i):
            source = hbm.dy.at[place.batch, tokens(place.own + place.behind - i), strip]
            put(first + place.gradient_tile + plan.tiles + i, source)

        put(first + place.own_tile, hbm.dy.at[place.batch, tokens(place.own), strip])
        put(first + place.own_tile + 1, hbm.x.at[place.batch, tokens(place.own), strip])

    end = place.first_tile(place.strips)

    @pl.loop(jnp.maximum(end - RING, 0), end)
    def _(number):
        plgpu.barrier_wait(smem.empty.at[lax.rem(number, jnp.int32(RING))])

    @pl.loop(jnp.maximum(place.strips - 2, 0), place.strips)
    def _(index):
        plgpu.barrier_wait(smem.decays_empty.at[lax.rem(index, jnp.int32(2))])


def _compute(plan: Any, hbm: Any, smem: Any, place: Any, me: Any, interpreted: bool) -> None:
    """A computing warpgroup: its half of the state's columns, and of the targets of the pairs."""
    ring = _Ring(plan, smem, me, jnp.int32(0))
    mine = pl.ds(pl.multiple_of(me * HALF, HALF), HALF)

    def B(chunk, half=me):
        return smem.rows.at[half, pl.ds(pl.multiple_of(chunk * CHUNK, CHUNK), CHUNK)]

    def C(chunk, half=me):
        return B(chunk + 1, half)

    plgpu.barrier_wait(smem.resident)
    scores = gpu.zeros(CHUNK, HALF)
    for half in range(2):
        scores = scores + product(B(place.own, half), transposed(C(place.own, half).at[mine]))
    for i in range(plan.others):
        scores = scores + product(ring.tile(2 * i), transposed(ring.tile(2 * i + 1).at[mine]))
        ring.release(2 * i, 2 * i + 1)
    smem.scores.at[me][...] = scores.astype(hbm.x.dtype)

    @pl.when(me == 0)
    def _():
        row, column = gpu.row_and_column(CHUNK, CHUNK)
        smem.before[...] = jnp.where(column < row, 1.0, 0.0).astype(hbm.x.dtype)

    plgpu.commit_smem()
    _meet(smem)

    def strip(index, carried):
        first, sums = carried
        ring = _Ring(plan, smem, me, first)
        sums = _strip(plan, hbm, smem, place, me, ring, B, C, interpreted, index, sums)
        return ring.slot(place.tiles_per_strip), sums

    sums = gpu.zeros(CHUNK, plan.half), gpu.zeros(CHUNK, plan.half), gpu.zeros(CHUNK, HALF)
    first = jnp.int32(2 * plan.others)
    _, (dB, dC, d_scores) = lax.fori_loop(jnp.int32(0), place.strips, strip, (first, sums))
    plgpu.wait_smem_to_gmem(0)

    _meet(smem)  # the ring is empty
    whole = smem.ring.at[0]
    whole.at[:, mine][...] = d_scores.astype(hbm.x.dtype)
    plgpu.commit_smem()
    _meet(smem)
    dB = dB + product(whole, C(place.own))
    dC = dC + product(transposed(whole), B(place.own))
    columns = pl.ds((place.part * 2 + me) * plan.half, plan.half)
    for total, array in ((dB, hbm.dB), (dC, hbm.dC)):
        target = array.at[place.split, place.batch, pl.ds(place.chunk * CHUNK, CHUNK), place.group, columns]
        target[...] = total.astype(array.dtype)


def _strip(plan, hbm, smem, place, me, ring, B, C, interpreted, index, sums):
    """One strip: add to dB, dC and d_scores, and write the strip's vectors."""
    dB, dC, d_scores = sums
    dtype, float32 = hbm.x.dtype, jnp.float32
    accumulate = functools.partial(product, interpreted=interpreted)
    documents = hasattr(smem, "documents")
    mine = pl.ds(pl.multiple_of(me * HALF, HALF), HALF)
    buffer = lax.rem(index, jnp.int32(2))
    vectors = smem.vectors.at[buffer, me]
    def log_decay(chunk):
        return gpu.load(smem.decays.at[buffer, chunk, 0], gpu.ONE_PER_ROW)

    def dt(chunk):
        return gpu.load(smem.decays.at[buffer, chunk, 1], gpu.ONE_PER_ROW)

    def from_start(chunk):
        decay = jnp.exp2(log_decay(chunk))
        if not documents:
            return decay
        entered = gpu.positions(CHUNK, gpu.ONE_PER_ROW) < smem.documents[chunk, 1, 0]
        return jnp.where(entered, decay, 0.0)

    def to_end(chunk):
        decay = jnp.exp2(smem.decays[buffer, chunk, 0, CHUNK - 1] - log_decay(chunk))
        return jnp.where(last(chunk) >= CHUNK - 1, decay, 0.0) if documents else decay

    def kept(chunk):
        decay = jnp.exp2(smem.decays[buffer, chunk, 0, CHUNK - 1])
        return jnp.where(smem.documents[chunk, 1, 0] >= CHUNK, decay, 0.0) if documents else decay

    def last(chunk):
        return gpu.load(smem.documents.at[chunk, 0], gpu.ONE_PER_ROW)

    def scaled(number, weights):
        """Scale the rows of a tile where it is, one half of its columns by each warpgroup."""
        tile = ring.tile(number)
        tile.at[:, mine][...] = (gpu.load(tile.at[:, mine]).astype(float32) * gpu.per_row(weights, HALF)).astype(dtype)
        plgpu.commit_smem()
        _meet(smem)
        return transposed(tile)

    plgpu.barrier_wait(smem.decays_full.at[buffer])

    # 1. The state that enters the chunk, and the gradient of the state that leaves it.
    def forward(chunk, state):
        number = plan.tiles + chunk
        tile = scaled(number, to_end(chunk) * dt(chunk))
        state = accumulate(tile, B(chunk), kept(chunk) * state)
        ring.release(number)
        return state

    def backward(i, gradient):
        chunk, number = place.own + place.behind - i, place.gradient_tile + plan.tiles + i
        tile = scaled(number, from_start(chunk))
        gradient = accumulate(tile, C(chunk), kept(chunk) * gradient)
        ring.release(number)
        return gradient

    ring.wait(0, plan.tiles)
    entering = ring.state(0)
    state = lax.fori_loop(jnp.int32(0), place.own, forward, gpu.load(entering).astype(float32))
    entering[...] = state.astype(dtype)
    plgpu.commit_smem()
    ring.wait(place.gradient_tile, plan.tiles)
    leaving = ring.state(place.gradient_tile)
    gradient = lax.fori_loop(jnp.int32(0), place.behind, backward, gpu.load(leaving).astype(float32))
    vectors.at[4][...] = (gpu.load(entering).astype(float32) * gradient).sum(1) * kept(place.own)
    leaving[...] = gradient.astype(dtype)
    plgpu.commit_smem()

    # 2. The pairs inside the chunk: sources in rows, targets in columns.
    dy, x = ring.tile(place.own_tile), ring.tile(place.own_tile + 1)
    source, target = gpu.row_and_column(CHUNK, HALF)
    target = target + me * HALF
    seen = target >= source
    if documents:
        seen = seen & (target <= gpu.per_row(last(place.own), HALF))
    log = gpu.per_column(gpu.load(smem.column_decays.at[buffer, mine], gpu.ONE_PER_COLUMN), CHUNK)
    log = log - gpu.per_row(log_decay(place.own), HALF)
    # Mask before exp2: below the diagonal the difference is positive and overflows.
    pairs = product(x, transposed(dy.at[mine])) * jnp.exp2(jnp.where(seen, log, -jnp.inf))
    scores = gpu.load(smem.scores.at[me]).astype(float32)
    vectors.at[0][...] = (pairs * scores).sum(1)
    pairs = pairs * gpu.per_row(dt(place.own), HALF)
    d_scores = d_scores + pairs
    smem.pairs.at[me][...] = (pairs * scores).astype(dtype)
    plgpu.commit_smem()
    across = product(smem.before, smem.pairs.at[me])
    vectors.at[1][...] = jnp.where(seen, across, 0.0).sum(1)
    x_t, dy_t = (gpu.load(transposed(tile.at[mine])).astype(float32) for tile in (x, dy))
    vectors.at[5][...] = (x_t * dy_t).sum(1)

    # 3. What the chunk reads of the one, and leaves in the other. At the end, because the compiler moves
    # additions down as far as it can, and products wait in registers for them.
    a, w = from_start(place.own), to_end(place.own)
    read = product(dy, entering)
    vectors.at[2][...] = (gpu.load(C(place.own)).astype(float32) * read).sum(1) * a
    dC = dC + gpu.per_row(a, plan.half) * read
    left = product(x, leaving)
    vectors.at[3][...] = (gpu.load(B(place.own)).astype(float32) * left).sum(1) * w
    dB = dB + gpu.per_row(w * dt(place.own), plan.half) * left
    ring.release(*(start + i for start in (0, place.gradient_tile) for i in range(plan.tiles)))
    ring.release(place.own_tile, place.own_tile + 1)
    plgpu.barrier_arrive(smem.decays_empty.at[buffer])

    # 4. The vectors, of both warpgroups together: each sums half of them, and writes them out.
    _meet(smem)
    summed, some = smem.summed.at[me], pl.ds(me * (VECTORS // 2), VECTORS // 2)
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # those of the strip before have left
    for i in range(VECTORS // 2):
        halves = (smem.vectors.at[buffer, half, me * (VECTORS // 2) + i] for half in range(2))
        first, second = (gpu.load(half, gpu.ONE_PER_ROW) for half in halves)
        summed.at[i][...] = first + second
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(summed, hbm.vectors.at[place.part, place.batch, place.strip + index, place.chunk, some])
    return dB, dC, d_scores


class _Ring:
    """The ring of tiles as a computing warpgroup sees it: tiles are counted from slot `first`."""

    def __init__(self, plan: Any, smem: Any, me: Any, first: Any):
        self.plan, self.smem, self.me, self.first = plan, smem, me, first

    def slot(self, tile):
        slot = self.first + tile  # less than twice around
        return jnp.where(slot >= RING, slot - RING, slot)

    def wait(self, tile, count=1):
        for i in range(count):
            plgpu.barrier_wait(self.smem.full.at[self.slot(tile + i)])

    def tile(self, tile):
        self.wait(tile)
        return self.smem.ring.at[self.slot(tile)]

    def state(self, tile):
        """Return this warpgroup's half of a state: a tile of its own, or half the columns of one."""
        if self.plan.tiles == 2:
            return self.smem.ring.at[self.slot(tile + self.me)]
        return self.smem.ring.at[self.slot(tile), :, pl.ds(pl.multiple_of(self.me * HALF, HALF), HALF)]

    def release(self, *tiles):
        plgpu.commit_smem()  # plain loads and stores end before TMA fills the slots again
        for tile in tiles:
            plgpu.barrier_arrive(self.smem.empty.at[self.slot(tile)])


def _meet(smem: Any) -> None:
    """Wait until the other computing warpgroup is here too."""
    plgpu.barrier_arrive(smem.both)
    plgpu.barrier_wait(smem.both)
