r"""SSD over a mesh of devices: batch rows, tokens and heads are sharded.

Rows and heads are independent. Along the tokens, the algorithm is that of `ops.scan.chunked` one level up,
with one piece per device in the role of a chunk. A piece maps the state that enters it to
`kept * state + left`, with

$$kept = e^{\sum_t dt_t A}, \qquad left = \sum_t e^{\sum_{s>t} dt_s A}\, dt_t\, x_t B_t^\top$$

1. each device computes `kept` and `left` of its piece: one matrix product;
2. each device combines the maps of all pieces to its left, which gives the state that enters its piece;
3. each device scans its piece from that state, with the implementation chosen for the device.

The scan runs once, from the true state. A scan from zero with `C h` of the entering state added afterwards
costs as many products, but reads and writes `y` once more, and rounds a half-precision `y` twice.

Communication over a `sequence` axis of `s` devices, in messages of one float32 state `(b, h, p, n)` of a
device's own rows and heads: `ceil(log2 s)` forward and as many backward; and one all-reduce each for the
final state, for its gradient and for the gradient of `initial_state`, where these are used. `segment_ids`
adds two integers per row. No message grows with the length of the row.

Source: Dao & Gu 2024, arXiv:2405.21060, sections 6 and 8.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from mamba2_jax.mesh import BATCH, SEQUENCE, TENSOR, axis_size, check_divides, check_mesh
from mamba2_jax.ops.pieces import from_piece, look_left, own_group, pad_tokens, where_rows
from mamba2_jax.ops.scan import decay
from mamba2_jax.ops.scan.api import check_arguments, ssd
from mamba2_jax.ops.segments import document_index
from mamba2_jax.typing import Array, Float, Int

Map = tuple[Array, Array]
"""The map `state -> kept * state + left`, as `kept (b, h)` and `left (b, h, p, n)`."""


def ssd_sharded(
    x: Float[Array, "b l h p"],
    dt: Float[Array, "b l h"],
    A: Float[Array, " h"],
    B: Float[Array, "b l g n"],
    C: Float[Array, "b l g n"],
    *,
    D: Float[Array, "h *p"] | None = None,
    initial_state: Float[Array, "b h p n"] | None = None,
    segment_ids: Int[Array, "b l"] | None = None,
    chunk_size: int | None = None,
    implementation: str | None = None,
    mesh: Mesh,
) -> tuple[Float[Array, "b l h p"], Float[Array, "b h p n"]]:
    """Run `ops.ssd` on arrays sharded over a mesh: same numbers, differentiable; call inside `jit`.

    Each device runs `ops.ssd` on its own rows, tokens and heads, so that kernels, which XLA cannot
    partition, run on any mesh, also where only rows or heads are sharded.

    Args:
        x: `(b, l, h, p)`; rows over the mesh axes `data` and `fsdp`, tokens over `sequence`, heads over
            `tensor`. All other arguments are sharded like `x` along shared axes.
        dt: `(b, l, h)`.
        A: `(h,)`.
        B: `(b, l, g, n)`; groups over `tensor` when its size divides `g`. When `g` divides its size instead,
            B and C are replicated over `tensor`, and each device uses the group of its heads.
        C: `(b, l, g, n)`.
        D: `(h,)` or `(h, p)`.
        initial_state: `(b, h, p, n)`; replicated over `sequence`.
        segment_ids: `(b, l)`; a document may span several devices.
        chunk_size: as in `ops.ssd`.
        implementation: as in `ops.ssd`; None chooses by the sizes on one device.
        mesh: with the axes `data`, `fsdp`, `sequence` and `tensor`, of any sizes, all `AxisType.Auto`.

    Returns:
        y: `(b, l, h, p)`, sharded like `x`.
        final_state: `(b, h, p, n)` after the whole row, replicated over `sequence`.

    Raises:
        ValueError: as `ops.ssd`; also rows, heads or groups that their mesh axis does not divide. Any length
            is accepted: rows are padded at their end with dt = 0, which changes no number, but arrays of
            such a length cannot be passed in sharded and are moved between devices.
        NotImplementedError: as `ops.ssd`.

    Source: Dao & Gu 2024, arXiv:2405.21060, section 8.

    >>> import jax, jax.numpy as jnp
    >>> from jax.sharding import AxisType
    >>> mesh = jax.make_mesh((1, 1, 1, 1), ("data", "fsdp", "sequence", "tensor"), (AxisType.Auto,) * 4)
    >>> x = jax.random.normal(jax.random.key(0), (1, 100, 4, 8))
    >>> B = C = jax.random.normal(jax.random.key(1), (1, 100, 2, 16))
    >>> y, state = jax.jit(ssd_sharded, static_argnames="mesh")(
    ...     x, jnp.full((1, 100, 4), 0.1), -jnp.ones(4), B, C, mesh=mesh
    ... )
    >>> y.shape, state.shape
    ((1, 100, 4, 8), (1, 4, 8, 16))
    """
    op = "ssd_sharded"
    check_arguments(op, x, dt, A, B, C, D, initial_state, segment_ids, chunk_size, implementation)
    batch, length, num_heads, _ = x.shape
    check_mesh(op, mesh)
    check_divides(op, mesh, "batch", batch, *BATCH)
    check_divides(op, mesh, "num_heads", num_heads, TENSOR)
    per_group = devices_per_group(op, B.shape[2], axis_size(mesh, TENSOR))

    num_pieces = axis_size(mesh, SEQUENCE)
    padding = -length % num_pieces
    x, dt, B, C = (pad_tokens(array, padding) for array in (x, dt, B, C))
    if segment_ids is not None:
        segment_ids = pad_tokens(segment_ids.astype(jnp.int32), padding)

    by_head = P(BATCH, SEQUENCE, TENSOR)
    by_group = by_head if per_group == 1 else P(BATCH, SEQUENCE)
    state_spec = P(BATCH, TENSOR)
    run = jax.shard_map(
        partial(
            ssd_of_a_piece,
            num_pieces=num_pieces,
            devices_per_group=per_group,
            chunk_size=chunk_size,
            implementation=implementation,
        ),
        mesh=mesh,
        in_specs=(by_head, by_head, P(TENSOR), by_group, by_group, P(TENSOR), state_spec, P(BATCH, SEQUENCE)),
        out_specs=(by_head, state_spec),
        # Kernels and their custom gradients do not declare over which mesh axes their results vary.
        check_vma=False,
    )
    y, state = run(x, dt, A, B, C, D, initial_state, segment_ids)
    return y[:, :length], state


def ssd_of_a_piece(
    x, dt, A, B, C, D, initial_state, segment_ids, *, num_pieces, devices_per_group=1, **options
):
    """Scan one device's rows, piece of the tokens, and heads, inside a `shard_map`.

    Arguments: one device's shards of those of `ssd_sharded`; the tokens have `num_pieces` pieces. Where
    `devices_per_group` > 1 neighbouring devices of `tensor` share a group, B and C hold all groups.
    """
    if devices_per_group > 1:
        B, C = (own_group(array, devices_per_group, axis=2) for array in (B, C))
    scan = partial(ssd, D=D, segment_ids=segment_ids, **options)
    if num_pieces == 1:
        return scan(x, dt, A, B, C, initial_state=initial_state)

    kept, left = _map_of_a_piece(x, dt, A, B, segment_ids)  # 1.
    continues = None
    if segment_ids is not None:
        continues = look_left(segment_ids).continues
        kept = where_rows(continues, kept)
    kept, left = _map_before(kept, left, num_pieces)  # 2.
    entering = left if initial_state is None else kept[..., None, None] * initial_state + left
    if continues is not None:
        # `ops.ssd` applies the initial state to the first document of the piece, continued or not.
        entering = where_rows(continues, entering)
    y, state = scan(x, dt, A, B, C, initial_state=entering)  # 3.
    return y, from_piece(num_pieces - 1, state)


@jax.checkpoint  # Saves only the arguments for the backward pass.
def _map_of_a_piece(
    x: Float[Array, "b l h p"],
    dt: Float[Array, "b l h"],
    A: Float[Array, " h"],
    B: Float[Array, "b l g n"],
    segment_ids: Int[Array, "b l"] | None,
) -> Map:
    """Reduce a piece to its map of the state: step 2 of `ops.scan.chunked`, with the piece as one chunk."""
    batch, length, num_heads, head_dim = x.shape
    num_groups, state_dim = B.shape[2:]
    full = jnp.promote_types(x.dtype, jnp.float32)
    dt = dt.astype(full)
    if segment_ids is not None:
        dt = jnp.where(segment_ids[..., None] != 0, dt, 0.0)
    log_decay = decay.log_decay(dt, A.astype(full))  # (b, l, h), natural log per token, <= 0
    # Log decay over all tokens after each one, summed from the end: a difference of sums from the start
    # would have its largest rounding errors at the last tokens, which weigh most.
    after = jnp.pad(log_decay[:, 1:], ((0, 0), (0, 1), (0, 0)))
    after = jax.lax.cumsum(after, axis=1, reverse=True)
    kept = jnp.exp(after[:, 0] + log_decay[:, 0])  # (b, h)
    to_end = jnp.exp(after) * dt
    if segment_ids is not None:
        documents = document_index(segment_ids)
        kept = where_rows(documents[:, -1] == 1, kept)
        to_end = jnp.where((documents == documents[:, -1:])[..., None], to_end, 0.0)

    x_to_end = (x * to_end[..., None]).astype(x.dtype).reshape(batch, length, num_groups, -1, head_dim)
    B = B.astype(x.dtype)
    left = jnp.einsum("blghp,blgn->bghpn", x_to_end, B, preferred_element_type=full)
    return kept, left.reshape(batch, num_heads, head_dim, state_dim)


def _map_before(kept: Float[Array, "b h"], left: Float[Array, "b h p n"], num_pieces: int) -> Map:
    """Combine the maps of all pieces to the left of this device's piece.

    Neighbouring blocks of 1, 2, 4, ... pieces exchange their maps, so that each device receives the maps of
    blocks that together cover all pieces to its left. Where `num_pieces` is no power of two, some devices
    have no partner and an incomplete map of their block, but no piece to their right needs that map.
    """
    here = jax.lax.axis_index(SEQUENCE)
    block = kept, left
    before = jnp.ones_like(kept), jnp.zeros_like(left)
    distance = 1
    while distance < num_pieces:
        pairs = [(i, i ^ distance) for i in range(num_pieces) if i ^ distance < num_pieces]
        other = _swap(block, pairs)
        from_left = (here & distance) != 0
        before = _select(from_left, _one_then_the_other(other, before), before)
        block = _select(from_left, _one_then_the_other(other, block), _one_then_the_other(block, other))
        distance *= 2
    return before


def _swap(block: Map, pairs: list[tuple[int, int]]) -> Map:
    """Exchange maps between the `(source, target)` pairs of devices, in one message each."""
    kept, left = block
    message = jnp.concatenate([kept[..., None], left.reshape(*kept.shape, -1)], axis=-1)  # (b, h, 1+p*n)
    message = jax.lax.ppermute(message, SEQUENCE, pairs)
    return message[..., 0], message[..., 1:].reshape(left.shape)


def _one_then_the_other(first: Map, second: Map) -> Map:
    """Compose two maps of the state, `first` applied before `second`."""
    return first[0] * second[0], second[0][..., None, None] * first[1] + second[1]


def _select(condition: Array, one: Map, other: Map) -> Map:
    return jnp.where(condition, one[0], other[0]), jnp.where(condition, one[1], other[1])


def devices_per_group(op: str, num_groups: int, devices: int) -> int:
    """Count the neighbouring devices of `tensor` that share a group; 1 also when each has several groups."""
    if num_groups % devices and devices % num_groups:
        raise ValueError(
            f"{op}: num_groups={num_groups} and the mesh's {TENSOR} = {devices} do not divide one another; "
            f"make that axis a divisor or a multiple of num_groups"
        )
    return max(1, devices // num_groups)
