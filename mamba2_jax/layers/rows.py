"""Masks and segment ids of a batch: their checks, and the `Rows` that layers read."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mamba2_jax.layers.state import Rows
from mamba2_jax.ops.checks import check_integer, check_shape, is_concrete
from mamba2_jax.typing import Array


def as_array(array) -> Any:
    """Convert a list or numpy array to numpy; return jax arrays and tracers unchanged."""
    return array if isinstance(array, jax.Array) else np.asarray(array)


def check_mask(
    name: str, attention_mask: Array | np.ndarray, batch: int, length: int
) -> Array | np.ndarray | None:
    """Check a 0/1 mask `(batch, length)` over the new tokens; return None if it is concrete and all ones."""
    attention_mask = as_array(attention_mask)
    check_integer(name, attention_mask=attention_mask)
    shape = tuple(attention_mask.shape)
    if len(shape) == 2 and shape[0] == batch and shape[1] > length:
        raise ValueError(
            f"{name}: attention_mask has shape {shape} for {length} new tokens; with a cache the mask covers "
            f"the new tokens only: pass attention_mask[:, -{length}:]"
        )
    check_shape(name, "attention_mask", attention_mask, "b l", b=batch, l=length)
    if not is_concrete(attention_mask):
        return attention_mask
    values = np.asarray(attention_mask)
    if not np.isin(values, (0, 1)).all():
        raise ValueError(f"{name}: attention_mask holds values other than 0 and 1")
    starts = np.diff(values.astype(np.int8), axis=1, prepend=0) == 1
    holes = np.flatnonzero(starts.sum(axis=1) > 1)
    if holes.size:
        raise ValueError(
            f"{name}: attention_mask has a hole in row {holes[0]}: ones must be contiguous, padding at the "
            "left or right end; use segment_ids for several documents in a row"
        )
    return None if values.all() else attention_mask


def check_segments(name: str, segment_ids, batch: int, length: int) -> Array | np.ndarray:
    """Check segment ids `(batch, length)`; return them as an array."""
    segment_ids = as_array(segment_ids)
    check_shape(name, "segment_ids", segment_ids, "b l", b=batch, l=length)
    check_integer(name, segment_ids=segment_ids)
    return segment_ids


def join_rows(attention_mask: Array | None, segment_ids: Array | None) -> Rows:
    """Combine attention mask and segment ids: a token counts only if valid in both."""
    mask = None if attention_mask is None else attention_mask.astype(bool)
    if segment_ids is None:
        return Rows(mask)
    segment_ids = segment_ids.astype(jnp.int32)
    if mask is not None:
        segment_ids = jnp.where(mask, segment_ids, 0)
    return Rows(segment_ids != 0, segment_ids)
