r"""The second backward kernel: the gradients of B and C, and what those of dt, A and D are summed from.

A block owns one chunk of 64 tokens of a group and loops over the group's strips of 64 channels. Within a
chunk, with `a[i]` the decay from its start through token `i`, `w[j]` that from behind token `j` to its end,
`H` the state that enters it, `G` the gradient of the state that leaves it, and, for `j <= i` in one document,

    pairs[j, i] = (x[j] . dy[i]) a[i] / a[j]            scores[j, i] = B[j] . C[i]

the gradients are sums over the strips,

    dB[j] = sum  w[j] dt[j] G^T x[j]  +  sum_i dt[j] pairs[j, i] C[i]
    dC[i] = sum  a[i] H^T dy[i]       +  sum_j dt[j] pairs[j, i] B[j]

and each token and strip gives four numbers, of which XLA makes the gradients of dt and A:

    inside[j]  = sum_i pairs[j, i] scores[j, i]                       the pairs of this chunk, by their source
    across[k]  = sum over j < k <= i  dt[j] pairs[j, i] scores[j, i]  those whom the decay of token k parts
    read[i]    = a[i] C[i]^T H^T dy[i]                                the entering state and token i
    left[j]    = w[j] B[j]^T G^T x[j]                                 token j and the leaving state
    over       = a[end] <H, G>                                        the two states; 64 parts, to be summed

These are sums of what the decay of a token multiplies, never differences of larger ones: strong decay costs
no digits. A sixth row holds `sum_i x[i] dy[i]` for each channel, the gradient of D.

HBM holds `H` and `G` only at the ends of spans of four chunks. For each strip, a block first brings `H` up
over the chunks before its own, and `G` down over those behind: nothing else passes between chunks. A copying
warpgroup runs ahead with a ring of tiles; two computing ones take half of state_dim each, and half of the
targets `i` of the pairs:

    for each strip    H = H kept + (x w dt)^T B                  for each chunk of the span before this one
                      G = G kept + (dy a)^T C                    for each chunk of the span behind, backwards
                      over
                      pairs,  d_scores += dt pairs,  inside,  across
                      dC += a (dy H),  read
                      dB += w dt (x G),  left
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
from mamba2_jax.pallas.bridge import plgpu  # pyright: ignore[reportMissingImports]
from mamba2_jax.pallas.mosaic_backward_sums import (  # pyright: ignore[reportMissingImports]
    HALF,
    SPAN,
    VECTORS,
    Sums,
)
from mamba2_jax.pallas.mosaic_plan import CHUNK, STRIP  # pyright: ignore[reportMissingImports]

COPY_REGISTERS, COMPUTE_REGISTERS = 24, 240  # of a thread; together 3 * 168, what a block starts with


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
        ring=_ring(batch),
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


def _ring(batch: int) -> int:
    """Return how many tiles the ring has; a strip takes at most 2 * 2 + 3 + 2 = 9 of them.

    Both numbers are enough. Which one leaves the compiler (ptxas 13) a register for every number that all
    strips share depends on the grid, and was found by compiling: with the other, 10 to 14 of them spill.
    """
    return 13 if batch == 1 else 12


def _scratch(plan: Any, dtype: Any, documents: bool) -> dict[str, Any]:
    """Shared memory and barriers of a block. All tiles are 32 columns wide, to be cut in halves."""
    tiles = functools.partial(gpu.tiles, dtype=dtype, width=HALF)
    scratch = {
        "rows": tiles(2, (SPAN + 1) * CHUNK, plan.half),  # B up to the own chunk, C from it on
        "ring": tiles(plan.ring, CHUNK, STRIP),
        "scores": tiles(2, CHUNK, HALF),
        "pairs": tiles(2, CHUNK, HALF),
        "before": tiles(CHUNK, CHUNK),
        # Twice, because a vector over rows and one over columns cannot be loaded from one place.
        "decays": plgpu.SMEM((2, SPAN, 2, CHUNK), jnp.float32),
        "column_decays": plgpu.SMEM((2, CHUNK), jnp.float32),
        "vectors": plgpu.SMEM((2, 2, VECTORS, CHUNK), jnp.float32),
        "summed": plgpu.SMEM((2, VECTORS // 2, CHUNK), jnp.float32),
        "resident": plgpu.Barrier(num_arrivals=2 * (SPAN + 1) + documents),
        "full": plgpu.Barrier(num_arrivals=1, num_barriers=plan.ring),
        "empty": plgpu.Barrier(num_arrivals=2, num_barriers=plan.ring),
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
        Sums(plan, hbm, smem, _place(plan), warpgroup, interpreted).run()

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
    # For each strip: the state, x of the chunks before, the state's gradient, dy of the chunks behind from
    # the last one down, and the own dy and x. The tiles of other blocks' columns of B and C precede them.
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
        slot = lax.rem(number, jnp.int32(plan.ring))
        pl.when(number >= plan.ring)(lambda: plgpu.barrier_wait(smem.empty.at[slot]))
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

    @pl.loop(jnp.maximum(end - plan.ring, 0), end)
    def _(number):
        plgpu.barrier_wait(smem.empty.at[lax.rem(number, jnp.int32(plan.ring))])

    @pl.loop(jnp.maximum(place.strips - 2, 0), place.strips)
    def _(index):
        plgpu.barrier_wait(smem.decays_empty.at[lax.rem(index, jnp.int32(2))])
