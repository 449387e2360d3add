"""Collectives for rows split into pieces over the `sequence` mesh axis, and groups over the `tensor` axis.

| mesh axis | shards |
|---|---|
| `data`, `fsdp` | rows of the batch |
| `sequence` | tokens of a row, in order: the device of index 0 holds the first piece |
| `tensor` | heads, groups, channels |
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from mamba2_jax.mesh import SEQUENCE, TENSOR
from mamba2_jax.typing import Array, Bool, Int


class Border(NamedTuple):
    """Relation of a device's piece of each row to the pieces on its left."""

    untouched: Bool[Array, " b"]  # the pieces on the left hold only padding
    continues: Bool[Array, " b"]  # the piece's first document begins further left, or is the row's first
    last_piece: Int[Array, " b"]  # index of the piece that holds the row's last valid token


def look_left(segment_ids: Int[Array, "b l"]) -> Border:
    """Compare a piece with those on its left, inside `shard_map`; gathers two integers per row and piece."""
    valid = segment_ids != 0
    marks = jnp.stack([segment_ids[:, -1], valid.any(axis=1).astype(segment_ids.dtype)])  # (2, b)
    last_id, holds_tokens = jnp.moveaxis(jax.lax.all_gather(marks, SEQUENCE), 1, 0)  # (pieces, b) each
    here = jax.lax.axis_index(SEQUENCE)
    piece = jnp.arange(len(last_id))[:, None]
    untouched = ~jnp.any((holds_tokens != 0) & (piece < here), axis=0)
    same_id = valid[:, 0] & (segment_ids[:, 0] == last_id[here - 1])
    return Border(
        untouched=untouched,
        # A piece of padding passes the state on unchanged. At piece 0 `same_id` wraps around to the row's
        # end, but there `untouched` is true.
        continues=untouched | same_id | ~valid.any(axis=1),
        last_piece=jnp.max(jnp.where(holds_tokens != 0, piece, 0), axis=0),
    )


def from_piece(piece: int | Int[Array, " b"], x: Array) -> Array:
    """Broadcast `x (b, ...)` of the device that holds `piece` (one index, or one per row) over `sequence`."""
    mine = jnp.broadcast_to(jax.lax.axis_index(SEQUENCE) == piece, x.shape[:1])
    return jax.lax.psum(where_rows(mine, x), SEQUENCE)


def own_group(x: Array, devices_per_group: int, axis: int) -> Array:
    """Slice from `axis` the one group that this device's heads belong to; keeps the axis with size 1."""
    group = jax.lax.axis_index(TENSOR) // devices_per_group
    return jax.lax.dynamic_slice_in_dim(x, group, 1, axis=axis)


def mean_over_group(x: Array, num_groups: int, devices_per_group: int) -> Array:
    """Average `x` over the `tensor` devices that share a group, by one psum for all groups."""
    group = jax.lax.axis_index(TENSOR) // devices_per_group
    mine = jax.nn.one_hot(group, num_groups, dtype=x.dtype)  # (g,)
    sums = jax.lax.psum(x[..., None] * mine, TENSOR)
    return (sums * mine).sum(axis=-1) / devices_per_group


def where_rows(rows: Bool[Array, " b"], x: Array, otherwise: Array | float = 0.0) -> Array:
    """Select `x (b, ...)` in rows where `rows (b,)` is true, else `otherwise`."""
    return jnp.where(rows.reshape(-1, *(1,) * (x.ndim - 1)), x, jnp.asarray(otherwise, x.dtype))


def pad_tokens(x: Array, count: int) -> Array:
    """Append `count` zeros to axis 1 of `x (b, l, ...)`."""
    return jnp.pad(x, ((0, 0), (0, count)) + ((0, 0),) * (x.ndim - 2)) if count else x
