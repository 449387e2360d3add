"""The first backward kernel: from the row's end to its start, carrying the gradient of the state.

It is the forward walk with time reversed. With `a_i` the decay from the block's start through token `i`, `w_j`
that from behind token `j` to the block's end, and `G` the gradient of the state behind the block:

    dx_j = dt_j (w_j G B_j + sum_{i >= j} dy_i (C_i . B_j) a_i / a_j) + D dy_j        G <- a_end G + dy^T a C

A thread block walks two heads of one group, a warpgroup each, which share the B and C that a third warpgroup
fetches. Everything is transposed, as in the forward: `G` is `(head_dim, state_dim)`.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from mamba2_jax.pallas import bridge
from mamba2_jax.pallas.bridge import ONE_PER_COLUMN, ONE_PER_ROW, load, per_column, per_row, pl, plgpu, product

BLOCK = 64  # tokens
WIDTH = 64  # channels of a head; wider heads are folded into several
EVERY = 4  # blocks between two saved states
PIECE = 64  # of state_dim


def walk(dy, B, C, steps, boundaries, D, final, *, interpret=None):
    """Return dx, the gradients of the state behind every `EVERY` blocks, and that of the initial state.

    Args:
        dy: `(b, l, h, 64)`, compute dtype; `l` is a multiple of 8.
        B: `(b, l, g, n)`, compute dtype.
        C: `(b, l, g, n)`, compute dtype.
        steps: `(b, h, blocks, 2, 64)` float32: log2 of the decay from the block's start, and dt.
        boundaries: None, or `(b, blocks, 128)` int32: where each token's document ends in its block, and
            where the first document of the block starts.
        D: `(h, 64)` float32.
        final: `(b, h, 64, n)` float32, the gradient of the final state.
        interpret: None, or `bridge.interpreter()`.

    Returns:
        dx: as `dy`.
        saved: `(b, h, ceil(blocks / EVERY), 64, n)`, compute dtype.
        initial: `(b, h, 64, n)` float32.
    """
    batch, length, num_heads, _ = dy.shape
    num_groups, state_dim = B.shape[2:]
    heads = num_heads // num_groups
    num_blocks = -(-length // BLOCK)
    dtype = dy.dtype
    pieces = [pl.ds(start, min(PIECE, state_dim)) for start in range(0, state_dim, PIECE)]
    stages = min(3 if state_dim <= 128 else 2, num_blocks)
    pairs = -(-heads // 2)
    accumulate = functools.partial(product, interpreted=interpret is not None)

    def body(*refs, dy_s, b_s, c_s, rows_s, columns_s, ends_s, weights_s, state_s, out_s, full, empty):
        dy_g, B_g, C_g, steps_g, *ends_g, D_g, final_g, dx_g, saved_g, initial_g = refs
        row, warpgroup = lax.axis_index("row"), lax.axis_index("warpgroup")
        group, pair = lax.div(lax.axis_index("pair"), pairs), lax.rem(lax.axis_index("pair"), pairs)

        def head_of(warpgroup):  # with an odd number of heads, the last pair walks the last head twice
            return group * heads + jnp.minimum(2 * pair + warpgroup, heads - 1)

        @pl.when(warpgroup < 2)
        def _compute():
            plgpu.set_max_registers(232, action="increase")
            head = head_of(warpgroup)
            mine = 2 * pair + warpgroup < heads
            skip = bridge.load_from_hbm(D_g.at[head], ONE_PER_ROW)
            state_w, weights_w, out_w = state_s.at[warpgroup], weights_s.at[warpgroup], out_s.at[warpgroup]
            i, j = bridge.row_and_column(BLOCK, BLOCK)

            def step(number, state):
                block, slot = num_blocks - 1 - number, lax.rem(number, stages)
                plgpu.barrier_wait(full.at[slot])
                dy_w, B_w, C_w = dy_s.at[slot, warpgroup], b_s.at[slot], c_s.at[slot]
                total = rows_s[slot, warpgroup, 0, BLOCK - 1]

                # Vectors over columns take 16 registers each: loaded anew at each use, not kept.
                def column(k):
                    return load(columns_s.at[slot, warpgroup, k], ONE_PER_COLUMN)

                def end():
                    return load(ends_s.at[slot, pl.ds(0, BLOCK)], ONE_PER_COLUMN)

                # Mask before exp: above the diagonal the difference is positive and overflows.
                seen = i >= j
                if ends_g:
                    seen = seen & (i <= per_column(end(), BLOCK))
                between = per_row(load(rows_s.at[slot, warpgroup, 0], ONE_PER_ROW), BLOCK)
                between = jnp.where(seen, between - per_column(column(0), BLOCK), -jnp.inf)
                scores = product(C_w, bridge.transposed(B_w))  # [i, j]
                weights = scores * jnp.exp2(between) * per_column(column(1), BLOCK)
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # what left from out_s and state_s is read
                weights_w[...] = weights.astype(dtype)

                from_start = jnp.exp2(column(0))
                if ends_g:
                    first = ends_s[slot, BLOCK]
                    from_start = jnp.where(bridge.positions(BLOCK, ONE_PER_COLUMN) < first, from_start, 0.0)
                dy_t = load(bridge.transposed(dy_w)).astype(jnp.float32)  # [p, i]
                out_w[...] = (dy_t * per_column(from_start, WIDTH)).astype(dtype)

                entering = None
                for part, piece in zip(state, pieces, strict=True):
                    if entering is not None:
                        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                    state_w[...] = part.astype(dtype)
                    plgpu.commit_smem()

                    @pl.when(mine & ((lax.rem(block, EVERY) == EVERY - 1) | (number == 0)))
                    def _save(piece=piece):
                        place = saved_g.at[row, head, lax.div(block, EVERY), :, piece]
                        plgpu.copy_smem_to_gmem(state_w, place)

                    read = product(state_w, bridge.transposed(B_w.at[:, piece]))  # [p, j]
                    entering = read if entering is None else entering + read
                to_end = jnp.exp2(total - column(0)) * column(1)
                if ends_g:
                    to_end = jnp.where(end() >= BLOCK - 1, to_end, 0.0)
                dx = entering * per_column(to_end, WIDTH)
                dx = dx + per_row(skip, BLOCK) * load(bridge.transposed(dy_w)).astype(jnp.float32)
                dx = accumulate(bridge.transposed(dy_w), weights_w, dx)
                kept = jnp.exp2(total)
                if ends_g:
                    kept = jnp.where(first >= BLOCK, kept, 0.0)
                state = tuple(
                    accumulate(out_w, C_w.at[:, piece], kept * part)
                    for part, piece in zip(state, pieces, strict=True)
                )
                plgpu.commit_smem()  # plain loads of this slot end before TMA fills it again
                plgpu.barrier_arrive(empty.at[slot])
                bridge.transposed(out_w)[...] = dx.astype(dtype)
                plgpu.commit_smem()

                @pl.when(mine)
                def _store():
                    plgpu.copy_smem_to_gmem(out_w, dx_g.at[row, pl.ds(block * BLOCK, BLOCK), head])

                return state

            start = tuple(bridge.load_from_hbm(final_g.at[row, head, :, piece]) for piece in pieces)
            state = lax.fori_loop(0, num_blocks, step, start)
            plgpu.wait_smem_to_gmem(0)

            @pl.when(mine)
            def _initial():
                for part, piece in zip(state, pieces, strict=True):
                    initial_g.at[row, head, :, piece][...] = part

        @pl.when(warpgroup == 2)
        def _fetch():
            plgpu.set_max_registers(40, action="decrease")

            @pl.loop(0, num_blocks)
            def _(number):
                block, slot = num_blocks - 1 - number, lax.rem(number, stages)
                tokens, arrives = pl.ds(block * BLOCK, BLOCK), full.at[slot]

                @pl.when(number >= stages)
                def _():
                    plgpu.barrier_wait(empty.at[slot])

                plgpu.copy_gmem_to_smem(B_g.at[row, tokens, group], b_s.at[slot], arrives)
                plgpu.copy_gmem_to_smem(C_g.at[row, tokens, group], c_s.at[slot], arrives)
                for k in range(2):
                    plgpu.copy_gmem_to_smem(dy_g.at[row, tokens, head_of(k)], dy_s.at[slot, k], arrives)
                    for vectors_s in (rows_s, columns_s):  # the same bytes, loaded in two layouts
                        plgpu.copy_gmem_to_smem(
                            steps_g.at[row, head_of(k), block], vectors_s.at[slot, k], arrives
                        )
                if ends_g:
                    plgpu.copy_gmem_to_smem(ends_g[0].at[row, block], ends_s.at[slot], arrives)

            @pl.loop(0, stages)
            def _(number):
                plgpu.barrier_wait(empty.at[lax.rem(num_blocks - stages + number, stages)])

    vectors = plgpu.SMEM((stages, 2, 2, BLOCK), jnp.float32)
    scratch = {
        "dy_s": bridge.tiles(stages, 2, BLOCK, WIDTH, dtype=dtype),
        "b_s": bridge.tiles(stages, BLOCK, state_dim, dtype=dtype),
        "c_s": bridge.tiles(stages, BLOCK, state_dim, dtype=dtype),
        "rows_s": vectors,
        "columns_s": vectors,
        "ends_s": None if boundaries is None else plgpu.SMEM((stages, 128), jnp.int32),
        "weights_s": bridge.tiles(2, BLOCK, BLOCK, dtype=dtype),
        "state_s": bridge.tiles(2, WIDTH, min(PIECE, state_dim), dtype=dtype),
        "out_s": bridge.tiles(2, BLOCK, WIDTH, dtype=dtype),
        "full": plgpu.Barrier(num_arrivals=8 + (boundaries is not None), num_barriers=stages),
        "empty": plgpu.Barrier(num_arrivals=2, num_barriers=stages),
    }
    shape = (batch, num_heads, WIDTH, state_dim)
    run = bridge.kernel(
        body,
        outputs=(
            jax.ShapeDtypeStruct(dy.shape, dtype),
            jax.ShapeDtypeStruct((*shape[:2], -(-num_blocks // EVERY), *shape[2:]), dtype),
            jax.ShapeDtypeStruct(shape, jnp.float32),
        ),
        scratch=scratch,
        grid={"row": batch, "pair": num_groups * pairs},
        warpgroups=3,
        interpret=interpret,
    )
    return run(dy, B, C, steps, *(() if boundaries is None else (boundaries,)), D, final)
