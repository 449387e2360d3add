"""The short convolution over a mesh of devices: batch rows, tokens and channels are sharded."""

from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from mamba2_jax.mesh import BATCH, SEQUENCE, TENSOR, axis_size, check_divides, check_mesh
from mamba2_jax.ops.conv.causal_conv1d import causal_conv1d, check_arguments
from mamba2_jax.ops.pieces import from_piece, look_left, pad_tokens, where_rows
from mamba2_jax.typing import Array, Float, Int


def causal_conv1d_sharded(
    x: Float[Array, "b l *c"],
    weight: Float[Array, "k *c"],
    bias: Float[Array, "*c"] | None = None,
    *,
    initial_state: Float[Array, "b k-1 *c"] | None = None,
    segment_ids: Int[Array, "b l"] | None = None,
    activation: str | None = "silu",
    mesh: Mesh,
    channel_axis: int | None = -1,
) -> tuple[Float[Array, "b l *c"], Float[Array, "b k-1 *c"]]:
    """Run `ops.causal_conv1d` on arrays sharded over a mesh: same numbers and gradients; call inside `jit`.

    Each device receives the last `k - 1` inputs of its left neighbour and convolves its own tokens; the
    backward pass sends as many back: `b (k - 1) c` numbers of a device's own rows and channels, whatever the
    length. The final state, its gradient and the gradient of `initial_state`, where used, take one all-reduce
    of that size each; `segment_ids` adds two integers per row.

    Args:
        x: `(b, l, *channels)`; rows over the mesh axes `data` and `fsdp`, tokens over `sequence`, one axis of
            channels over `tensor`. All other arguments are sharded like `x` along shared axes.
        weight: `(k, *channels)`.
        bias: `(*channels)`.
        initial_state: `(b, k - 1, *channels)`; replicated over `sequence`.
        segment_ids: `(b, l)`; a document may span several devices.
        activation: `"silu"` or None.
        mesh: with the axes `data`, `fsdp`, `sequence` and `tensor`, of any sizes, all `AxisType.Auto`.
        channel_axis: which axis of `channels` is sharded over `tensor`; None: none, and each device of
            `tensor` takes and computes all channels (B and C with fewer groups than devices).

    Returns:
        y: `(b, l, *channels)`, sharded like `x`.
        final_state: `(b, k - 1, *channels)` after the whole row, replicated over `sequence`.

    Raises:
        ValueError: as `ops.causal_conv1d`; also rows or channels that their mesh axis does not divide, and
            fewer than `k - 1` tokens per device. Other lengths are padded, as in `ops.ssd_sharded`.

    >>> import jax, jax.numpy as jnp
    >>> from jax.sharding import AxisType
    >>> mesh = jax.make_mesh((1, 1, 1, 1), ("data", "fsdp", "sequence", "tensor"), (AxisType.Auto,) * 4)
    >>> x = jax.random.normal(jax.random.key(0), (1, 100, 2, 16))
    >>> y, state = causal_conv1d_sharded(x, jnp.ones((4, 2, 16)), mesh=mesh)
    >>> y.shape, state.shape
    ((1, 100, 2, 16), (1, 3, 2, 16))
    """
    op = "causal_conv1d_sharded"
    batch, length, num_taps = check_arguments(op, x, weight, bias, initial_state, segment_ids, activation)
    check_mesh(op, mesh)
    check_divides(op, mesh, "batch", batch, *BATCH)
    channels = _channel_spec(op, mesh, x.shape[2:], channel_axis)

    num_pieces = axis_size(mesh, SEQUENCE)
    padding = -length % num_pieces
    tokens = (length + padding) // num_pieces
    if num_pieces > 1 and tokens < num_taps - 1:
        raise ValueError(
            f"{op}: length={length} over the mesh's {SEQUENCE} = {num_pieces} leaves {tokens} tokens a "
            f"device, and {num_taps} taps reach {num_taps - 1} back; make that axis smaller"
        )
    if padding and segment_ids is None:
        segment_ids = jnp.ones((batch, length), jnp.int32)  # the added tokens get id 0: padding
    if segment_ids is not None:
        segment_ids = pad_tokens(segment_ids.astype(jnp.int32), padding)

    x_spec, state_spec = P(BATCH, SEQUENCE, *channels), P(BATCH, None, *channels)
    run = jax.shard_map(
        partial(convolve_a_piece, num_pieces=num_pieces, activation=activation),
        mesh=mesh,
        in_specs=(x_spec, P(None, *channels), P(*channels), state_spec, P(BATCH, SEQUENCE)),
        out_specs=(x_spec, state_spec),
        check_vma=False,
    )
    y, state = run(pad_tokens(x, padding), weight, bias, initial_state, segment_ids)
    return y[:, :length], state


def convolve_a_piece(x, weight, bias, initial_state, segment_ids, *, num_pieces, activation):
    """Convolve one device's rows, piece of the tokens, and channels, inside a `shard_map`.

    Arguments: one device's shards of those of `causal_conv1d_sharded`; the tokens have `num_pieces` pieces.
    """
    convolve = partial(causal_conv1d, weight=weight, bias=bias, activation=activation)
    if num_pieces == 1:
        return convolve(x, initial_state=initial_state, segment_ids=segment_ids)
    reach = weight.shape[0] - 1
    if initial_state is None:
        initial_state = jnp.zeros((x.shape[0], reach, *x.shape[2:]), x.dtype)
    initial_state = initial_state.astype(x.dtype)
    to_the_right = [(i, i + 1) for i in range(num_pieces - 1)]

    if segment_ids is None:
        tail = jax.lax.ppermute(x[:, -reach:], SEQUENCE, to_the_right)
        first = jax.lax.axis_index(SEQUENCE) == 0
        y, state = convolve(x, initial_state=jnp.where(first, initial_state, tail))
        return y, from_piece(num_pieces - 1, state)

    segment_ids = segment_ids.astype(jnp.int32)
    border = look_left(segment_ids)
    # The last inputs of the document at the piece's end are the next piece's initial state. A document that
    # began before the last `reach` tokens fills all of them, so the last `reach` tokens decide the state.
    untouched = border.untouched & ~jnp.any(segment_ids[:, :-reach] != 0, axis=1)
    _, tail = convolve(
        x[:, -reach:],
        initial_state=where_rows(untouched, initial_state),
        segment_ids=segment_ids[:, -reach:],
    )
    tail = jax.lax.ppermute(tail, SEQUENCE, to_the_right)
    entering = where_rows(border.continues, where_rows(border.untouched, initial_state, tail))
    y, state = convolve(x, initial_state=entering, segment_ids=segment_ids)
    return y, from_piece(border.last_piece, state)


def _channel_spec(op: str, mesh: Mesh, channels: tuple[int, ...], axis: int | None) -> list[str | None]:
    """Name the mesh axis that shards each axis of channels; None for an axis that is whole."""
    spec: list[str | None] = [None] * len(channels)
    if axis is None:
        return spec
    if isinstance(axis, bool) or not -len(channels) <= axis < len(channels):
        raise ValueError(
            f"{op}: channel_axis={axis!r} is neither None nor among the {len(channels)} axes of channels, "
            f"{channels}"
        )
    check_divides(op, mesh, f"channels[{axis}]", channels[axis], TENSOR)
    spec[axis] = TENSOR
    return spec
