"""The attention layer of the hybrid checkpoints as a Flax NNX module.

    hidden -> in_proj -> q, k, v           (and value, gate of an MLP beside the heads)
              q, k, v -> causal conv, no activation
              q, k rotated by their place in the document
              attention(q, k, v) -> out_proj

q, k and v are leaves of their own, so that heads can be split over devices.
"""

import math

import jax.numpy as jnp
from flax import nnx

from mamba2_jax.config import AttentionConfig, Mamba2Config
from mamba2_jax.layers.adaptable import Adaptable
from mamba2_jax.layers.parts import Projection, keep_rows, residual_gain, split_pair, uniform, zeros
from mamba2_jax.layers.state import AttentionConvState, KeyValues, LayerState, Rows
from mamba2_jax.ops import (
    attention_step,
    causal_attention,
    causal_conv1d,
    causal_conv1d_step,
    rotary_embedding,
    silu_gate,
    write_slots,
)
from mamba2_jax.ops.segments import document_index
from mamba2_jax.typing import Array, Bool, DTypeLike, Float, Int


class QKVProjection(Adaptable):
    """`d -> q, k, v`: matrices `(d, h*p)`, `(d, kv*p)`, `(d, kv*p)`.

    Where a gated MLP runs beside the heads, a fourth for its value and gate `(d, 2, m)`.
    """

    def __init__(
        self,
        attention: AttentionConfig,
        width: int,
        *,
        dtype: DTypeLike,
        param_dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        bound = 1 / math.sqrt(width)
        query, key, mlp = attention.query_width, attention.key_width, attention.mlp_width
        self.dtype = dtype
        self.weight_q = uniform(rngs, (width, query), bound, param_dtype)
        self.weight_k = uniform(rngs, (width, key), bound, param_dtype)
        self.weight_v = uniform(rngs, (width, key), bound, param_dtype)
        self.weight_mlp = uniform(rngs, (width, 2, mlp), bound, param_dtype) if mlp else None
        has_bias = attention.qkv_proj_bias
        self.bias_q = zeros((query,), param_dtype) if has_bias else None
        self.bias_k = zeros((key,), param_dtype) if has_bias else None
        self.bias_v = zeros((key,), param_dtype) if has_bias else None
        self.bias_mlp = zeros((2, mlp), param_dtype) if has_bias and mlp else None

    def __call__(self, hidden: Float[Array, "b l d"]) -> tuple[Array, Array, Array, Array | None]:
        """Return q `(b, l, h*p)`, k and v `(b, l, kv*p)`, and the MLP's `(b, l, 2, m)` or None."""
        q, k, v = (self.project(hidden, part).astype(self.dtype) for part in ("_q", "_k", "_v"))
        mlp = None if self.weight_mlp is None else self.project(hidden, "_mlp").astype(self.dtype)
        return q, k, v, mlp


class QKVConv1d(Adaptable):
    """The depthwise convolution over q, k and v: taps `(k, h*p)` and `(k, kv*p)`, no activation."""

    def __init__(self, attention: AttentionConfig, *, param_dtype: DTypeLike, rngs: nnx.Rngs):
        taps, query, key = attention.d_conv, attention.query_width, attention.key_width
        bound = 1 / math.sqrt(taps)
        self.weight_q = uniform(rngs, (taps, query), bound, param_dtype)
        self.weight_k = uniform(rngs, (taps, key), bound, param_dtype)
        self.weight_v = uniform(rngs, (taps, key), bound, param_dtype)
        self.bias_q = uniform(rngs, (query,), bound, param_dtype)
        self.bias_k = uniform(rngs, (key,), bound, param_dtype)
        self.bias_v = uniform(rngs, (key,), bound, param_dtype)

    def __call__(
        self, q: Array, k: Array, v: Array, state: AttentionConvState, rows: Rows, one_token: bool
    ) -> tuple[Array, Array, Array, AttentionConvState]:
        """Convolve q, k and v `(b, l, ...)`; returns them and the state after them."""

        def convolve(x, part, bias, before):
            weight = self.taps(f"weight_{part}")
            if one_token:
                y, after = causal_conv1d_step(x[:, 0], weight, bias[...], before, activation=None)
                return y[:, None], keep_rows(rows.mask, after, before)
            return causal_conv1d(
                x,
                weight,
                bias[...],
                initial_state=before,
                segment_ids=rows.marks,
                activation=None,
            )

        q, state_q = convolve(q, "q", self.bias_q, state.q)
        k, state_k = convolve(k, "k", self.bias_k, state.k)
        v, state_v = convolve(v, "v", self.bias_v, state.v)
        return q, k, v, AttentionConvState(state_q, state_k, state_v)


class AttentionMixer(nnx.Module):
    """Causal attention in the place of a `Mamba2Mixer`.

    Args:
        config: with `attn_cfg`.
        dtype: compute dtype of the matrix products.
        param_dtype: dtype of the parameters made here.
        rngs: source of the initial values.

    Raises:
        ValueError: the config has no `attn_cfg`.
    """

    def __init__(
        self,
        config: Mamba2Config,
        *,
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        attention = config.attn_cfg
        if attention is None:
            raise ValueError("AttentionMixer: the config has no attn_cfg; say what the layer looks like")
        self.attention = attention
        self.dtype = jnp.dtype(dtype)
        options = {"param_dtype": param_dtype, "rngs": rngs}
        self.in_proj = QKVProjection(attention, config.hidden_size, dtype=self.dtype, **options)
        self.conv1d = QKVConv1d(attention, **options) if attention.d_conv else None
        self.out_proj = Projection(
            attention.query_width + attention.mlp_width,
            (config.hidden_size,),
            bias=attention.out_proj_bias,
            gain=residual_gain(config),
            dtype=self.dtype,
            **options,
        )

    def __call__(
        self, hidden: Float[Array, "b l d"], state: LayerState, rows: Rows
    ) -> tuple[Float[Array, "b l d"], LayerState]:
        """Mix a sequence. Arguments and results as for `Mamba2Mixer`; `rows` with `past` and `positions`."""
        kept, past, positions = state.attention, rows.past, rows.positions
        if kept is None or past is None or positions is None:
            raise ValueError(
                "AttentionMixer: state or rows lack what attention needs; give those of the model"
            )
        batch, length, _ = hidden.shape
        one_token = length == 1 and kept.keys.shape[1] > 0
        q, k, v, mlp = self.in_proj(hidden)
        conv = state.conv
        if self.conv1d is not None:
            if not isinstance(conv, AttentionConvState):
                raise ValueError(
                    "AttentionMixer: state lacks that of the convolution; give that of the model"
                )
            q, k, v, conv = self.conv1d(q, k, v, conv, rows, one_token)
        q, k, v = (x.reshape(batch, length, -1, self.attention.head_dim) for x in (q, k, v))
        q, k = self._rotate(q, positions), self._rotate(k, positions)
        y, kept = self._attend(q, k, v, kept, rows, past, positions, one_token)
        y = y.reshape(batch, length, -1)
        if mlp is not None:
            value, gate = split_pair(mlp)
            y = jnp.concatenate([y, silu_gate(value, gate)], axis=-1)
        return self.out_proj(y), LayerState(conv, None, kept)

    def _rotate(self, x: Float[Array, "b l h p"], positions: Int[Array, "b l"]) -> Float[Array, "b l h p"]:
        return rotary_embedding(
            x,
            positions,
            rotary_dim=self.attention.rotary_emb_dim,
            base=self.attention.rotary_emb_base,
            interleaved=self.attention.rotary_emb_interleaved,
        )

    def _attend(
        self, q, k, v, kept: KeyValues, rows: Rows, past: Array, positions: Array, one_token: bool
    ) -> tuple[Float[Array, "b l h p"], KeyValues]:
        """Attend, and keep the keys and values of the row's last document."""
        scale = self.attention.softmax_scale
        if kept.keys.shape[1] == 0:  # nothing came before
            y = causal_attention(q, k, v, segment_ids=rows.marks, scale=scale)
            if rows.mask is None:
                return y, KeyValues(k, v)
            empty = jnp.zeros_like(k)
            return y, _keep(KeyValues(empty, empty), k, v, rows, positions)[0]
        after, full = _keep(kept, k, v, rows, positions)
        if one_token:
            y = attention_step(q[:, 0], after.keys, after.values, positions[:, 0] + 1, scale=scale)[:, None]
        else:
            before = (kept.keys, kept.values, past)
            y = causal_attention(q, k, v, past=before, segment_ids=rows.marks, scale=scale)
        # Inside a jit no error can be raised: NaN, so that a full buffer is never taken for an answer.
        return jnp.where(full[:, None, None, None], jnp.nan, y), after


def _keep(
    kept: KeyValues, k: Float[Array, "b l kv p"], v, rows: Rows, positions: Int[Array, "b l"]
) -> tuple[KeyValues, Bool[Array, " b"]]:
    """Write the tokens of each row's last document into their slots; also say which rows had no room."""
    capacity = kept.keys.shape[1]
    counts = jnp.ones(positions.shape, bool) if rows.mask is None else rows.mask
    if rows.segment_ids is not None and positions.shape[1] > 1:
        document = document_index(rows.segment_ids)
        last = document[:, -1:]
        counts = counts & (document == last)
        goes_on = (last == 1)[..., None, None]  # else the document before is forgotten
        kept = KeyValues(jnp.where(goes_on, kept.keys, 0), jnp.where(goes_on, kept.values, 0))
    full = jnp.any(counts & (positions >= capacity), axis=1)
    slots = jnp.where(counts, positions, capacity)  # beyond the buffer: no place
    return KeyValues(write_slots(kept.keys, k, slots), write_slots(kept.values, v, slots)), full
