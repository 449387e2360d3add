"""Prefill: read the prompts, in pieces of a fixed size, so that memory does not grow with their length.

A prompt of up to `PIECE` tokens is one call of the model. A longer one is padded to equal pieces, which one
compiled loop reads from state to state; only the token ids, and the keys and values of attention layers,
are as long as the prompt.
"""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp

from mamba2_jax.generation.sampling import Sampler
from mamba2_jax.models.cache import Mamba2Cache, bucket
from mamba2_jax.models.mamba2 import Mamba2ForCausalLM
from mamba2_jax.models.pooling import last_valid
from mamba2_jax.typing import Array, Bool, Float, Int

PIECE = 2048
"""Most tokens that one call of the model reads."""


def piece_size(length: int) -> int:
    """Return the tokens per piece of a prompt: equal pieces, so that the last is not mostly padding."""
    return bucket(-(-length // -(-length // PIECE)))


def padded_length(length: int) -> int:
    """Return the length of a prompt's buffer: a bucket, or a power of two of pieces.

    Pieces beyond the prompt are never read, and the fewer buffers there are, the fewer programs.
    """
    if length <= PIECE:
        return bucket(length)
    return piece_size(length) * (1 << (-(-length // PIECE) - 1).bit_length())


def read_prompts(
    model: Mamba2ForCausalLM,
    input_ids: Int[Array, "b l"] | None,
    attention_mask: Array | None,
    cache: Mamba2Cache | None,
    inputs_embeds: Float[Array, "b l d"] | None = None,
    *,
    piece: int,
    capacity: int = 0,
) -> tuple[Mamba2Cache, Float[Array, "b d"]]:
    """Run the model over prompts; call inside `jit`.

    Args:
        model: the model.
        input_ids: `(b, l)`.
        attention_mask: `(b, l)` of 0/1 or booleans, or None.
        cache: state to continue from, or None.
        inputs_embeds: `(b, l, d)` instead of `input_ids`.
        piece: tokens per piece; from `l` on, the prompt is read as a whole.
        capacity: slots in the key/value buffers of attention layers, for prompt and new tokens together.

    Returns:
        The state after each prompt, and the final hidden state of each row's last token `(b, d)`.
    """
    inputs: Any = input_ids if inputs_embeds is None else inputs_embeds
    batch, length = inputs.shape[:2]
    if cache is not None:
        cache = cache.reserve(capacity)
    if length <= piece:
        out = model.backbone.forward(input_ids, attention_mask, None, cache, inputs_embeds)
        return out.cache.reserve(capacity), last_valid(out.last_hidden_state, attention_mask)

    if cache is None:
        cache = Mamba2Cache.zeros(model.config, batch, model.dtype, capacity=capacity)
    # the dtype that a call returns, so that the loop's carry keeps it
    cache = replace(cache, conv=jax.tree.map(lambda state: state.astype(model.dtype), cache.conv))
    if attention_mask is None:
        lengths = jnp.full((batch,), length)
    else:
        inputs, lengths = to_the_left(inputs, attention_mask != 0)
    count = -(-length // piece)
    extra = ((0, 0), (0, count * piece - length), *((0, 0),) * (inputs.ndim - 2))
    inputs = jnp.pad(inputs, extra).reshape(batch, count, piece, *inputs.shape[2:])

    def read(carry):
        index, cache, hidden = carry
        tokens = jax.lax.dynamic_index_in_dim(inputs, index, axis=1, keepdims=False)
        position = index * piece + jnp.arange(piece)
        mask = position < lengths[:, None]
        ids, embeds = (tokens, None) if inputs_embeds is None else (None, tokens)
        out = model.backbone.forward(ids, mask, None, cache, embeds)
        ends_here = mask.any(axis=1, keepdims=True)  # or in a later piece, which then overwrites it
        hidden = jnp.where(ends_here, last_valid(out.last_hidden_state, mask), hidden)
        return index + 1, out.cache, hidden

    hidden = jnp.zeros((batch, model.config.hidden_size), model.dtype)
    start = (jnp.zeros((), jnp.int32), cache, hidden)
    used = -(-lengths.max() // piece)
    _, cache, hidden = jax.lax.while_loop(lambda carry: carry[0] < used, read, start)
    return cache, hidden


def tokens_seen(
    sampler: Sampler, input_ids: Int[Array, "b l"] | None, mask: Array | None, logits: Float[Array, "b v"]
) -> Bool[Array, "b v"] | None:
    """Mark the ids of each prompt, for the repetition penalty; None without one."""
    if sampler.repetition_penalty is None:
        return None
    seen = jnp.zeros(logits.shape, bool)
    if input_ids is None:  # embeddings have no ids: only new tokens are penalized
        return seen
    counts = jnp.ones(input_ids.shape, bool) if mask is None else mask != 0
    return seen.at[jnp.arange(seen.shape[0])[:, None], input_ids].max(counts)


def to_the_left(inputs: Array, mask: Bool[Array, "b l"]) -> tuple[Array, Int[Array, " b"]]:
    """Move left padding to the right end, so that all rows begin in the first piece; also return lengths."""
    start = jnp.argmax(mask, axis=1)  # (b,)
    index = jnp.minimum(start[:, None] + jnp.arange(mask.shape[1]), mask.shape[1] - 1)
    index = index.reshape(*index.shape, *(1,) * (inputs.ndim - 2))
    return jnp.take_along_axis(inputs, index, axis=1), mask.sum(axis=1, dtype=jnp.int32)
