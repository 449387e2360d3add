"""Checks of model inputs at the public entry points, and the `Rows` masks that layers read."""

import jax
import jax.numpy as jnp
import numpy as np

from mamba2_jax.config import Mamba2Config
from mamba2_jax.layers.rows import as_array, check_mask, check_segments
from mamba2_jax.layers.rows import join_rows as join_rows
from mamba2_jax.layers.state import Rows
from mamba2_jax.models.cache import Mamba2Cache, bucket
from mamba2_jax.ops.checks import check_dtype, check_integer, check_shape, is_concrete
from mamba2_jax.ops.cross_entropy import IGNORED_LABEL
from mamba2_jax.ops.segments import document_starts
from mamba2_jax.typing import Array, Int


def check_inputs(
    name: str, config: Mamba2Config, input_ids, attention_mask, segment_ids, cache, inputs_embeds
) -> tuple:
    """Check the arguments of a model call and return them as arrays for `forward`.

    Shapes and dtypes are always checked; values (ids in range, masks without holes) only on concrete arrays,
    so that nothing inside `jit` syncs the device. A concrete mask of ones becomes None. Attention buffers too
    small for the new tokens are enlarged if the position of the cache is concrete.
    """
    if (input_ids is None) == (inputs_embeds is None):
        raise ValueError(f"{name}: give either input_ids or inputs_embeds, exactly one of them")
    if input_ids is not None:
        input_ids = as_array(input_ids)
        check_shape(name, "input_ids", input_ids, "b l")
        check_integer(name, input_ids=input_ids)
        _check_ids(name, "input_ids", input_ids, config)
    else:
        check_shape(name, "inputs_embeds", inputs_embeds, "b l d", d=config.hidden_size)
        check_dtype(name, inputs_embeds=inputs_embeds)
    batch, length = batch_and_length(input_ids, inputs_embeds)
    if attention_mask is not None:
        attention_mask = check_mask(name, attention_mask, batch, length)
    if segment_ids is not None:
        segment_ids = check_segments(name, segment_ids, batch, length)
    if cache is not None:
        _check_cache(name, config, cache, batch)
        cache = _with_room(cache, length)
    return input_ids, attention_mask, segment_ids, cache, inputs_embeds


def check_labels(name: str, config: Mamba2Config, labels, batch: int, length: int) -> Array:
    """Check labels `(batch, length)`: token ids or `IGNORED_LABEL`; return them as an array."""
    labels = as_array(labels)
    check_shape(name, "labels", labels, "b l", b=batch, l=length)
    check_integer(name, labels=labels)
    _check_ids(name, "labels", labels, config, ignored=IGNORED_LABEL)
    return labels


def _check_ids(name: str, argument: str, ids, config: Mamba2Config, ignored: int | None = None) -> None:
    if not is_concrete(ids):
        return
    values = np.asarray(ids)
    wrong = (values < 0) | (values >= config.vocab_size)
    if ignored is not None:
        wrong &= values != ignored
    if wrong.any():
        row, column = np.argwhere(wrong)[0]
        raise ValueError(
            f"{name}: {argument}[{row}, {column}] = {values[row, column]} lies outside the vocabulary "
            f"0..{config.vocab_size - 1}; was another model's tokenizer used?"
        )


def _check_cache(name: str, config: Mamba2Config, cache: Mamba2Cache, batch: int) -> None:
    if not isinstance(cache, Mamba2Cache):
        raise ValueError(f"{name}: cache must be a Mamba2Cache, got {type(cache).__name__}")
    if cache.batch != batch:
        raise ValueError(
            f"{name}: cache holds {cache.batch} rows, the input {batch}; pick rows with cache[rows]"
        )
    capacity = cache.capacity or 0
    wanted = jax.eval_shape(lambda: Mamba2Cache.zeros(config, batch, capacity=capacity))
    if jax.tree.map(jnp.shape, cache) != jax.tree.map(jnp.shape, wanted):
        raise ValueError(f"{name}: cache does not fit this model's config; was it made by another model?")


def _with_room(cache: Mamba2Cache, length: int) -> Mamba2Cache:
    """Enlarge the key/value buffers of a concrete cache to hold `length` more tokens."""
    if cache.capacity is None or not is_concrete(cache.position):
        return cache
    needed = int(np.max(cache.position)) + length
    return cache if needed <= cache.capacity else cache.reserve(bucket(needed))


def batch_and_length(input_ids, inputs_embeds) -> tuple[int, int]:
    """Return `(b, l)` of `input_ids` or `inputs_embeds`, whichever is given."""
    shape = input_ids.shape if inputs_embeds is None else inputs_embeds.shape
    return shape[0], shape[1]


def next_token_targets(labels: Int[Array, "b l"], rows: Rows) -> Int[Array, "b l"]:
    """Shift labels left by one, so that position t holds the label of token t + 1, or `IGNORED_LABEL`.

    Padding and the first token of a document are never targets; the last position of a row has none.
    """
    targets = labels[:, 1:]
    counts = targets != IGNORED_LABEL
    if rows.mask is not None:
        counts &= rows.mask[:, 1:] & rows.mask[:, :-1]
    if rows.segment_ids is not None:
        counts &= ~document_starts(rows.segment_ids)[:, 1:]
    targets = jnp.where(counts, targets, IGNORED_LABEL)
    return jnp.pad(targets, ((0, 0), (0, 1)), constant_values=IGNORED_LABEL)
