"""The second backward kernel: the gradients of B and C, and what those of dt, A and D are summed from.

A thread block owns `BLOCK` tokens of a group, and loops over the group's heads. It knows the state at the start
of its span of `EVERY` blocks and the gradient of the state at the span's end; each head first brings the state
up to its own tokens, over the blocks before, and the gradient down to them, over the blocks behind. Nothing
else passes between tokens of different blocks. Then, with `H` the state entering the block, `G` the gradient
of the state leaving it, `a_i` the decay from the block's start through token `i`, `w_j` that from behind token
`j` to the block's end, and `K_ji = x_j . dy_i a_i / a_j` for `j <= i`:

    dB_j = sum over heads  w_j dt_j G^T x_j + sum_i dt_j K_ji C_i
    dC_i = sum over heads  a_i H^T dy_i     + sum_j dt_j K_ji B_j

and four numbers for every token and head, from which XLA sums the gradients of dt and A:

    direct_j = sum_i K_ji (B_j . C_i)                the pairs inside the block, as they depend on dt_j
    across_k = sum_{j < k <= i} dt_j K_ji (B_j . C_i)    those which the decay of token k lies between
    into_i   = a_i C_i^T H^T dy_i                    the pair (state entering, token i)
    out_j    = w_j B_j^T G^T x_j                     the pair (token j, state leaving)

and, for every block and head, `over = a_end <H, G>`, the pair of the two states. Every sum is of one sign of
dependence: nothing is subtracted, so strong decay costs no digits. The two compute warpgroups each take half of
`state_dim`, and half of the `i` of the pairs; a third fetches tiles into a ring, ahead of them.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from mamba2_jax.pallas import bridge
from mamba2_jax.pallas.bridge import ONE_PER_COLUMN, ONE_PER_ROW, load, per_column, per_row, pl, plgpu, product
from mamba2_jax.pallas.mosaic_backward_walk import BLOCK, EVERY, WIDTH

HALF = BLOCK // 2
VECTORS = 5  # direct, across, into, out, over
RING = 10  # tiles in shared memory, fetched ahead; a head takes at most 9


def gradients(x, dy, states, gradients, B, C, steps, boundaries, *, splits=1, interpret=None):
    """Return dB, dC, the vectors of every token and head, and the sums of `x * dy` over each block.

    Args:
        x: `(b, l, h, 64)`, compute dtype; `l` is a multiple of 8.
        dy: as `x`.
        states: `(b, h, spans, 64, n)`, compute dtype: the state that enters each `EVERY` blocks.
        gradients: as `states`: the gradient of the state that leaves each `EVERY` blocks.
        B: `(b, l, g, n)`, compute dtype.
        C: `(b, l, g, n)`, compute dtype.
        steps: `(b, h, EVERY * spans, 2, 64)` float32: log2 of the decay from the block's start, and dt.
        boundaries: None, or `(b, EVERY * spans, 128)` int32, as in `mosaic_backward_walk.walk`.
        splits: into how many parts the heads of a group are cut, where there are too few blocks otherwise.
        interpret: None, or `bridge.interpreter()`.

    Returns:
        dB: `(splits, b, blocks * 64, g, n)`; to be summed over splits; float32 if there are several, else
            compute dtype.
        dC: as dB.
        vectors: `(parts, b, h, blocks, 5, 64)` float32, to be summed over the parts; `over` over its 64 too.
        x_dy: `(b, h, blocks, 64)` float32, one per channel.
    """
    batch, length, num_heads, _ = x.shape
    num_groups, state_dim = B.shape[2:]
    heads = num_heads // num_groups
    heads_per_split = -(-heads // splits)
    num_blocks = -(-length // BLOCK)
    dtype = x.dtype
    half = min(WIDTH, state_dim // 2)  # of state_dim, for each compute warpgroup
    parts = state_dim // (2 * half)  # thread blocks over state_dim
    tiles_of_state = 2 * half // WIDTH
    tiles_elsewhere = state_dim // WIDTH - tiles_of_state
    accumulate = functools.partial(product, interpreted=interpret is not None)

    def body(*refs, bc_s, ring_s, rows_s, columns_s, ends_s, moved_s, state_s, pairs_s, scores_s, before_s, **barriers):
        x_g, dy_g, states_g, gradients_g, B_g, C_g, steps_g, *ends_g, dB_g, dC_g, vectors_g, x_dy_g = refs
        resident, full, empty = barriers["resident"], barriers["full"], barriers["empty"]
        steps_full, steps_empty, meet = barriers["steps_full"], barriers["steps_empty"], barriers["meet"]
        part, split = lax.rem(lax.axis_index("part"), parts), lax.div(lax.axis_index("part"), parts)
        row, group, block = (lax.axis_index(name) for name in ("row", "group", "block"))
        warpgroup = lax.axis_index("warpgroup")
        span, own = lax.div(block, EVERY), lax.rem(block, EVERY)
        behind = jnp.minimum(EVERY, num_blocks - span * EVERY) - 1 - own  # blocks of the span after this one
        first_head = group * heads + split * heads_per_split
        num_heads_here = jnp.minimum(heads_per_split, heads - split * heads_per_split)
        tiles_per_head = 2 * tiles_of_state + own + 2 + behind
        first_tile = 2 * tiles_elsewhere

        @pl.when(warpgroup < 2)
        def _compute():
            plgpu.set_max_registers(232, action="increase")
            mine = pl.ds(pl.multiple_of(warpgroup * HALF, HALF), HALF)  # of the i of the pairs
            state_w, moved_w, pairs_w = state_s.at[warpgroup], moved_s.at[warpgroup], pairs_s.at[warpgroup]
            j, i = bridge.row_and_column(BLOCK, HALF)
            i = i + warpgroup * HALF

            def B_of(block, half=warpgroup):
                return bc_s.at[half, pl.ds(pl.multiple_of(block * BLOCK, BLOCK), BLOCK)]

            def C_of(block, half=warpgroup):
                return B_of(block + 1, half)

            def tile(number):
                slot = lax.rem(number, RING)
                plgpu.barrier_wait(full.at[slot])
                return ring_s.at[slot]

            def release(number):
                plgpu.commit_smem()  # plain loads end before TMA fills the slot again
                plgpu.barrier_arrive(empty.at[lax.rem(number, RING)])

            def half_state(number):
                tiles = [tile(number + k) for k in range(tiles_of_state)]
                if tiles_of_state == 1:
                    state = load(tiles[0].at[:, pl.ds(pl.multiple_of(warpgroup * half, half), half)])
                else:
                    state = load(ring_s.at[lax.rem(number + warpgroup, RING)])
                state = state.astype(jnp.float32)
                for k in range(tiles_of_state):
                    release(number + k)
                return state

            plgpu.barrier_wait(resident)
            scores = bridge.zeros(BLOCK, HALF)  # [j, i], once for all heads
            for k in range(2):
                scores = scores + product(B_of(own, k), bridge.transposed(C_of(own, k).at[mine]))
            for k in range(tiles_elsewhere):
                B_tile, C_tile = tile(2 * k), tile(2 * k + 1)
                scores = scores + product(B_tile, bridge.transposed(C_tile.at[mine]))
                release(2 * k)
                release(2 * k + 1)
            scores_w = scores_s.at[warpgroup]
            scores_w[...] = scores.astype(dtype)

            @pl.when(warpgroup == 0)
            def _():
                token, other = bridge.row_and_column(BLOCK, BLOCK)
                before_s[...] = jnp.where(other < token, 1.0, 0.0).astype(dtype)
                plgpu.commit_smem()

            meeting = functools.partial(_meet, meet)
            meeting()

            def head_step(number, carry):
                dB, dC, d_scores = carry
                head, buffer = first_head + number, lax.rem(number, 2)
                first = first_tile + number * tiles_per_head
                plgpu.barrier_wait(steps_full.at[buffer])
                total_of = lambda block: rows_s[buffer, block, 0, BLOCK - 1]
                row_of = lambda k, block=own: load(rows_s.at[buffer, block, k], ONE_PER_ROW)

                def write(k, vector):
                    vectors_g.at[part * 2 + warpgroup, row, head, block, k][...] = vector

                kept = lambda block: jnp.exp2(total_of(block))

                # 1. The state that enters the block.
                def forward(before, state):
                    x_tile = tile(first + tiles_of_state + before)
                    to_end = jnp.exp2(total_of(before) - row_of(0, before)) * row_of(1, before)
                    moved = load(x_tile).astype(jnp.float32) * per_row(to_end, WIDTH)
                    moved_w[...] = moved.astype(dtype)
                    release(first + tiles_of_state + before)
                    return accumulate(bridge.transposed(moved_w), B_of(before), kept(before) * state)

                state = lax.fori_loop(0, own, forward, half_state(first))
                state_w[...] = state.astype(dtype)
                plgpu.commit_smem()

                # 2. What the block reads of it.
                at = first + tiles_of_state + own
                dy_tile, x_tile = tile(at), tile(at + 1)
                from_start = jnp.exp2(row_of(0))
                read = product(dy_tile, state_w)
                write(2, (load(C_of(own)).astype(jnp.float32) * read).sum(1) * from_start)
                dC = dC + per_row(from_start, half) * read

                # 3. The pairs inside the block.
                between = per_column(load(columns_s.at[buffer, mine], ONE_PER_COLUMN), BLOCK)
                between = jnp.where(i >= j, between - per_row(row_of(0), HALF), -jnp.inf)
                pairs = product(x_tile, bridge.transposed(dy_tile.at[mine])) * jnp.exp2(between)
                scores = load(scores_w).astype(jnp.float32)
                write(0, (pairs * scores).sum(1))
                pairs = pairs * per_row(row_of(1), HALF)
                d_scores = d_scores + pairs
                pairs_w[...] = (pairs * scores).astype(dtype)
                plgpu.commit_smem()
                across = product(before_s, pairs_w)
                write(1, jnp.where(i >= j, across, 0.0).sum(1))

                @pl.when(lax.rem(number, 2) == warpgroup)
                def _skip():
                    dy_t = load(bridge.transposed(dy_tile)).astype(jnp.float32)
                    x_t = load(bridge.transposed(x_tile)).astype(jnp.float32)
                    x_dy_g.at[row, head, block][...] = (x_t * dy_t).sum(1)

                release(at)

                # 4. The gradient of the state that leaves it.
                def backward(step, gradient):
                    after = own + behind - step
                    number = at + 2 + tiles_of_state + step
                    moved = load(tile(number)).astype(jnp.float32)
                    moved = moved * per_row(jnp.exp2(row_of(0, after)), WIDTH)
                    moved_w[...] = moved.astype(dtype)
                    release(number)
                    return accumulate(bridge.transposed(moved_w), C_of(after), kept(after) * gradient)

                gradient = lax.fori_loop(0, behind, backward, half_state(at + 2))
                write(4, (load(state_w).astype(jnp.float32) * gradient).sum(1) * kept(own))
                state_w[...] = gradient.astype(dtype)
                plgpu.commit_smem()

                # 5. What the block adds to it.
                to_end = jnp.exp2(total_of(own) - row_of(0))
                added = product(x_tile, state_w)
                out = (load(B_of(own)).astype(jnp.float32) * added).sum(1) * to_end
                write(3, out)
                dB = dB + per_row(to_end * row_of(1), half) * added
                release(at + 1)
                plgpu.barrier_arrive(steps_empty.at[buffer])
                return dB, dC, d_scores

            start = bridge.zeros(BLOCK, half), bridge.zeros(BLOCK, half), bridge.zeros(BLOCK, HALF)
            dB, dC, d_scores = lax.fori_loop(0, num_heads_here, head_step, start)

            meeting()  # moved_s[0] is the first warpgroup's until here
            bridge.transposed(moved_s.at[0, mine])[...] = d_scores.astype(dtype)
            plgpu.commit_smem()
            meeting()
            dB = dB + product(bridge.transposed(moved_s.at[0]), C_of(own))
            dC = dC + product(moved_s.at[0], B_of(own))
            columns = pl.ds(part * 2 * half + warpgroup * half, half)
            for total, out_g in ((dB, dB_g), (dC, dC_g)):
                out = out_g.at[split, row, pl.ds(block * BLOCK, BLOCK), group, columns]
                out[...] = total.astype(out_g.dtype)

        @pl.when(warpgroup == 2)
        def _fetch():
            plgpu.set_max_registers(40, action="decrease")

            def tokens(block):
                return pl.ds((span * EVERY + block) * BLOCK, BLOCK)

            def put(number, source):
                slot = lax.rem(number, RING)

                @pl.when(number >= RING)
                def _():
                    plgpu.barrier_wait(empty.at[slot])

                plgpu.copy_gmem_to_smem(source, ring_s.at[slot], full.at[slot])

            @pl.loop(0, EVERY + 1)
            def _(place):  # B up to the own block, then C from it on
                target = pl.ds(pl.multiple_of(place * BLOCK, BLOCK), BLOCK)
                for k in range(2):
                    columns = pl.ds(part * 2 * half + k * half, half)

                    @pl.when(place <= own)
                    def _():
                        source = B_g.at[row, tokens(place), group, columns]
                        plgpu.copy_gmem_to_smem(source, bc_s.at[k, target], resident)

                    @pl.when(place > own)
                    def _():
                        source = C_g.at[row, tokens(jnp.minimum(place - 1, own + behind)), group, columns]
                        plgpu.copy_gmem_to_smem(source, bc_s.at[k, target], resident)

            for k in range(tiles_elsewhere):
                elsewhere = lax.rem(part * tiles_of_state + tiles_of_state + k, state_dim // WIDTH)
                columns = pl.ds(elsewhere * WIDTH, WIDTH)
                put(2 * k, B_g.at[row, tokens(own), group, columns])
                put(2 * k + 1, C_g.at[row, tokens(own), group, columns])

            @pl.loop(0, num_heads_here)
            def _(number):
                head, buffer = first_head + number, lax.rem(number, 2)
                first = first_tile + number * tiles_per_head

                @pl.when(number >= 2)
                def _():
                    plgpu.barrier_wait(steps_empty.at[buffer])

                source = steps_g.at[row, head, pl.ds(span * EVERY, EVERY)]
                plgpu.copy_gmem_to_smem(source, rows_s.at[buffer], steps_full.at[buffer])
                plgpu.copy_gmem_to_smem(steps_g.at[row, head, block, 0], columns_s.at[buffer], steps_full.at[buffer])
                at = first + tiles_of_state + own
                for k in range(tiles_of_state):
                    columns = pl.ds((part * tiles_of_state + k) * WIDTH, WIDTH)
                    put(first + k, states_g.at[row, head, span, :, columns])

                @pl.loop(0, own)
                def _(before):
                    put(first + tiles_of_state + before, x_g.at[row, tokens(before), head])

                put(at, dy_g.at[row, tokens(own), head])
                put(at + 1, x_g.at[row, tokens(own), head])
                for k in range(tiles_of_state):
                    columns = pl.ds((part * tiles_of_state + k) * WIDTH, WIDTH)
                    put(at + 2 + k, gradients_g.at[row, head, span, :, columns])

                @pl.loop(0, behind)
                def _(step):
                    put(at + 2 + tiles_of_state + step, dy_g.at[row, tokens(own + behind - step), head])

            end = first_tile + num_heads_here * tiles_per_head

            @pl.loop(jnp.maximum(end - RING, 0), end)
            def _(number):
                plgpu.barrier_wait(empty.at[lax.rem(number, RING)])

            @pl.loop(jnp.maximum(num_heads_here - 2, 0), num_heads_here)
            def _(number):
                plgpu.barrier_wait(steps_empty.at[lax.rem(number, 2)])

    tiles = functools.partial(bridge.tiles, dtype=dtype)
    run = bridge.kernel(
        body,
        outputs=(
            jax.ShapeDtypeStruct((splits, batch, num_blocks * BLOCK, num_groups, state_dim), jnp.float32),
            jax.ShapeDtypeStruct((splits, batch, num_blocks * BLOCK, num_groups, state_dim), jnp.float32),
            jax.ShapeDtypeStruct((2 * parts, batch, num_heads, num_blocks, VECTORS, BLOCK), jnp.float32),
            jax.ShapeDtypeStruct((batch, num_heads, num_blocks, WIDTH), jnp.float32),
        ),
        scratch={
            "bc_s": tiles(2, (EVERY + 1) * BLOCK, half),
            "ring_s": tiles(RING, BLOCK, WIDTH),
            "rows_s": plgpu.SMEM((2, EVERY, 2, BLOCK), jnp.float32),
            "columns_s": plgpu.SMEM((2, BLOCK), jnp.float32),
            "ends_s": None if boundaries is None else plgpu.SMEM((EVERY, 128), jnp.int32),
            "moved_s": tiles(2, WIDTH, BLOCK),
            "state_s": tiles(2, WIDTH, half),
            "pairs_s": tiles(2, BLOCK, HALF),
            "scores_s": tiles(2, BLOCK, HALF),
            "before_s": bridge.tiles(BLOCK, BLOCK, dtype=dtype, width=HALF),
            "resident": plgpu.Barrier(num_arrivals=2 * (EVERY + 1)),
            "full": plgpu.Barrier(num_arrivals=1, num_barriers=RING),
            "empty": plgpu.Barrier(num_arrivals=2, num_barriers=RING),
            "steps_full": plgpu.Barrier(num_arrivals=2, num_barriers=2),
            "steps_empty": plgpu.Barrier(num_arrivals=2, num_barriers=2),
            "meet": plgpu.Barrier(num_arrivals=2),
        },
        grid={"part": parts * splits, "row": batch, "group": num_groups, "block": num_blocks},
        warpgroups=3,
        interpret=interpret,
    )
    inputs = (x, dy, states, gradients, B, C, steps, *(() if boundaries is None else (boundaries,)))
    return run(*inputs)


def _meet(barrier):
    """Wait until the other compute warpgroup is here too."""
    plgpu.barrier_arrive(barrier)
    plgpu.barrier_wait(barrier)
