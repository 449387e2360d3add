r"""Causal attention of hybrid models: prefill, one-token decode, and writes to the key/value buffer.

    y_t = sum over s <= t, same document, of  softmax_s(scale * q_t . k_s) v_s

Keys are rotated by their position in the document before they are cached. A row's buffer holds the row's
current document, token `i` in slot `i`: padding takes no slot, so the buffer does not depend on the padding.

>>> import jax, jax.numpy as jnp
>>> q, k, v = jax.random.normal(jax.random.key(0), (3, 1, 5, 2, 8))
>>> whole = causal_attention(q, k, v)
>>> slots = jnp.arange(5)[None]
>>> keys, values = (write_slots(jnp.zeros((1, 8, 2, 8)), new, slots) for new in (k, v))
>>> last = attention_step(q[:, -1], keys, values, jnp.array([5]))
>>> bool(jnp.allclose(last, whole[:, -1], atol=1e-6))
True
"""

import jax
import jax.numpy as jnp

from mamba2_jax.ops.checks import check_dtype, check_integer, check_shape
from mamba2_jax.ops.segments import document_index
from mamba2_jax.typing import Array, Float, Int

_QUERIES_AT_ONCE = 512  # limits the scores in memory to b * h * 512 * (s + l), also in the backward pass


def rotary_embedding(
    x: Float[Array, "b l h p"],
    positions: Int[Array, "b l"],
    *,
    rotary_dim: int,
    base: float = 10000.0,
    interleaved: bool = False,
) -> Float[Array, "b l h p"]:
    r"""Apply rotary position embedding to queries or keys `(b, l, h, p)`.

    Pair $i$ of the first `rotary_dim` channels is rotated by the angle
    $t\, \mathrm{base}^{-2i / \mathrm{rotary\_dim}}$ at position $t$; the other channels are unchanged.

    Args:
        x: queries or keys `(b, l, h, p)`.
        positions: position of each token in its document `(b, l)`, from 0.
        rotary_dim: number of rotated channels; even, at most `p`; 0 returns `x` unchanged.
        base: base of the frequencies.
        interleaved: pair `i` is channels `2i, 2i + 1`; otherwise `i, i + rotary_dim / 2`.

    Returns:
        `(b, l, h, p)` in the dtype of `x`; computed in float32 (float64 when `x` is).

    Raises:
        ValueError: an invalid shape or dtype; the message names the argument.

    Source: Su et al. 2021, arXiv:2104.09864, section 3.2.
    """
    check_shape("rotary_embedding", "x", x, "b l h p")
    check_shape("rotary_embedding", "positions", positions, "b l", b=x.shape[0], l=x.shape[1])
    check_dtype("rotary_embedding", x=x)
    check_integer("rotary_embedding", positions=positions)
    if rotary_dim % 2 or not 0 <= rotary_dim <= x.shape[-1]:
        raise ValueError(
            f"rotary_embedding: rotary_dim={rotary_dim}, wants an even number up to p={x.shape[-1]}"
        )
    if rotary_dim == 0:
        return x
    full = jnp.promote_types(x.dtype, jnp.float32)
    frequencies = base ** (-jnp.arange(0, rotary_dim, 2, dtype=full) / rotary_dim)  # (p/2,)
    angles = positions[:, :, None, None].astype(full) * frequencies  # (b, l, 1, p/2)
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    turning, rest = x[..., :rotary_dim].astype(full), x[..., rotary_dim:]
    if interleaved:
        first, second = turning[..., 0::2], turning[..., 1::2]
    else:
        first, second = jnp.split(turning, 2, axis=-1)
    turned = (first * cos - second * sin, second * cos + first * sin)
    if interleaved:
        turned = jnp.stack(turned, axis=-1).reshape(turning.shape)
    else:
        turned = jnp.concatenate(turned, axis=-1)
    return jnp.concatenate([turned.astype(x.dtype), rest], axis=-1)


def causal_attention(
    q: Float[Array, "b l h p"],
    k: Float[Array, "b l kv p"],
    v: Float[Array, "b l kv p"],
    *,
    past: tuple[Float[Array, "b s kv p"], Float[Array, "b s kv p"], Int[Array, " b"]] | None = None,
    segment_ids: Int[Array, "b l"] | None = None,
    scale: float | None = None,
) -> Float[Array, "b l h p"]:
    """Compute causal attention within documents, over cached and new tokens.

    Args:
        q: queries `(b, l, h, p)`.
        k: keys `(b, l, kv, p)`; `kv` divides `h`, head `i` uses key head `i // (h // kv)`.
        v: values `(b, l, kv, p)`.
        past: cached keys and values `(b, s, kv, p)`, and the number of valid slots per row `(b,)`. They
            belong to the row's first document.
        segment_ids: `(b, l)`, 0 is padding, any change starts a document. Results at padding are
            undefined.
        scale: factor on the scores; `1 / sqrt(p)` when absent.

    Returns:
        `(b, l, h, p)` in the dtype of `q`; the softmax is computed in float32.

    Raises:
        ValueError: an invalid shape or dtype; the message names the argument.
    """
    _check("causal_attention", q, k, v)
    batch, length = q.shape[:2]
    key_place, key_document, document = jnp.arange(length), None, None
    if segment_ids is not None or past is not None:
        marks = jnp.ones((batch, length), jnp.int32) if segment_ids is None else segment_ids
        check_shape("causal_attention", "segment_ids", marks, "b l", b=batch, l=length)
        check_integer("causal_attention", segment_ids=marks)
        marks = marks.astype(jnp.int32)
        document = document_index(marks)
        key_document = jnp.where(marks != 0, document, 0)  # no token is in document 0
        if past is not None:
            keys, values, count = past
            _check_buffers("causal_attention", q, keys, values, count)
            slots = jnp.arange(keys.shape[1])
            counts = (slots < count[:, None]).astype(jnp.int32)  # (b, s), 1: the row's first document
            key_document = jnp.concatenate([counts, key_document], axis=1)  # (b, s+l)
            key_place = jnp.concatenate([slots - keys.shape[1], key_place])  # (s+l,), negative in the past
            k = jnp.concatenate([keys.astype(k.dtype), k], axis=1)
            v = jnp.concatenate([values.astype(v.dtype), v], axis=1)

    def attend(q, place, document):
        mask = (key_place <= place[:, None])[None, None]  # (1, 1, t, s+l)
        if key_document is not None:
            mask = mask & (key_document[:, None] == document[..., None])[:, None]  # (b, 1, t, s+l)
        return jax.nn.dot_product_attention(q, k, v, mask=mask, scale=scale)

    if length <= _QUERIES_AT_ONCE:
        return attend(q, jnp.arange(length), document)
    num_blocks = -(-length // _QUERIES_AT_ONCE)
    padding = num_blocks * _QUERIES_AT_ONCE - length

    def blocks(array):
        """Reshape `(b, l, ...)` to `(blocks, b, t, ...)`."""
        array = jnp.pad(array, ((0, 0), (0, padding)) + ((0, 0),) * (array.ndim - 2))
        return jnp.moveaxis(array.reshape(batch, num_blocks, -1, *array.shape[2:]), 1, 0)

    places = jnp.arange(num_blocks * _QUERIES_AT_ONCE).reshape(num_blocks, -1)
    documents = None if document is None else blocks(document)
    # Remat: the backward pass recomputes the scores.
    y = jax.lax.map(jax.checkpoint(lambda block: attend(*block)), (blocks(q), places, documents))
    return jnp.moveaxis(y, 0, 1).reshape(batch, -1, *q.shape[2:])[:, :length]


def attention_step(
    q: Float[Array, "b h p"],
    keys: Float[Array, "b s kv p"],
    values: Float[Array, "b s kv p"],
    count: Int[Array, " b"],
    *,
    scale: float | None = None,
) -> Float[Array, "b h p"]:
    """Compute causal attention of one token, whose own key and value are already in the buffer.

    Args:
        q: queries `(b, h, p)`.
        keys: `(b, s, kv, p)`.
        values: `(b, s, kv, p)`.
        count: number of valid slots per row `(b,)`.
        scale: factor on the scores; `1 / sqrt(p)` when absent.

    Returns:
        `(b, h, p)` in the dtype of `q`.

    Raises:
        ValueError: an invalid shape or dtype; the message names the argument.
    """
    q = q[:, None]
    _check("attention_step", q, keys, values, length="s")
    _check_buffers("attention_step", q, keys, values, count)
    mask = (jnp.arange(keys.shape[1]) < count[:, None])[:, None, None]  # (b, 1, 1, s)
    return jax.nn.dot_product_attention(
        q, keys.astype(q.dtype), values.astype(q.dtype), mask=mask, scale=scale
    )[:, 0]


def write_slots(
    buffer: Float[Array, "b s kv p"], new: Float[Array, "b l kv p"], slots: Int[Array, "b l"]
) -> Float[Array, "b s kv p"]:
    """Scatter `new` into `buffer` at `slots`, in the dtype of `buffer`; out-of-range slots are dropped."""
    rows = jnp.arange(buffer.shape[0])[:, None]
    return buffer.at[rows, slots].set(new.astype(buffer.dtype), mode="drop")


def _check(op: str, q, k, v, length: str = "l") -> None:
    check_shape(op, "q", q, "b l h p")
    batch, _, num_heads, head_dim = q.shape
    sizes = {"b": batch, "p": head_dim} | ({"l": q.shape[1]} if length == "l" else {})
    check_shape(op, "k", k, f"b {length} kv p", **sizes)
    check_shape(op, "v", v, f"b {length} kv p", **sizes, kv=k.shape[2])
    if num_heads % k.shape[2]:
        raise ValueError(
            f"{op}: q has {num_heads} heads, wants a multiple of the {k.shape[2]} of k; check num_heads_kv"
        )
    check_dtype(op, q=q, k=k, v=v)


def _check_buffers(op: str, q, keys, values, count) -> None:
    check_shape(op, "keys", keys, "b s kv p", b=q.shape[0], p=q.shape[3])
    check_shape(op, "values", values, "b s kv p", **dict(zip("bs", keys.shape[:2], strict=True)))
    check_shape(op, "count", count, "b", b=q.shape[0])
    check_dtype(op, keys=keys, values=values)
    check_integer(op, count=count)
