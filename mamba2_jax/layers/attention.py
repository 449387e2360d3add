"""Attention layer of the hybrid checkpoints as a Flax NNX module.

    hidden -> in_proj -> q, k, v           (and value, gate of an MLP parallel to the heads;
                                            or q_proj, k_proj, v_proj, with o_proj at the end)
              q, k, v -> causal conv, no activation
              q, k -> rotary embedding by position in the document
              attention(q, k, v) -> out_proj

q, k and v are separate leaves, so that heads can be sharded over devices.
"""

import math

import jax.numpy as jnp
from flax import nnx

from mamba2_jax.config import AttentionConfig, Mamba2Config
from mamba2_jax.layers.adaptable import Adaptable
from mamba2_jax.layers.parts import Projection, keep_rows, residual_gain, scaled, split_pair, uniform, zeros
from mamba2_jax.layers.state import (
    AttentionConvState,
    KeyValues,
    LayerState,
    Rows,
    windows_after_each,
)
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
    """Projection `d -> q, k, v`, with weights `(d, h*p)`, `(d, kv*p)`, `(d, kv*p)`.

    With a gated MLP parallel to the heads, a fourth weight `(d, 2, m)` for its value and gate.
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
        """Compute q `(b, l, h*p)`, k and v `(b, l, kv*p)`, and the MLP's `(b, l, 2, m)` or None."""
        q, k, v = (self.project(hidden, part).astype(self.dtype) for part in ("_q", "_k", "_v"))
        mlp = None if self.weight_mlp is None else self.project(hidden, "_mlp").astype(self.dtype)
        return q, k, v, mlp


class QKVConv1d(Adaptable):
    """Depthwise causal convolution of q, k and v, with taps `(k, h*p)` and `(k, kv*p)`; no activation."""

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
        """Convolve q, k and v `(b, l, ...)`; return the results and the final convolution state."""

        def convolve(x, part, bias, before):
            weight = self.taps(f"weight_{part}")
            if one_token:
                y, after = causal_conv1d_step(x[:, 0], weight, bias[...], before, activation=None)
                return y[:, None], keep_rows(rows.mask, after, before)
            y, after = causal_conv1d(
                x,
                weight,
                bias[...],
                initial_state=before,
                segment_ids=rows.marks,
                activation=None,
            )
            return y, after if rows.every_state is None else windows_after_each(before, x)

        q, state_q = convolve(q, "q", self.bias_q, state.q)
        k, state_k = convolve(k, "k", self.bias_k, state.k)
        v, state_v = convolve(v, "v", self.bias_v, state.v)
        return q, k, v, AttentionConvState(state_q, state_k, state_v)


class AttentionMixer(nnx.Module):
    """Causal attention mixer with the interface of `Mamba2Mixer`.

    Args:
        config: with `attn_cfg`.
        dtype: compute dtype of the matrix products.
        param_dtype: dtype of new parameters.
        ssd_implementation: ignored; every kind of mixer takes it.
        rngs: random keys of the initial values.

    Raises:
        ValueError: the config has no `attn_cfg`.
    """

    def __init__(
        self,
        config: Mamba2Config,
        *,
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike = jnp.float32,
        ssd_implementation: str | None = None,
        rngs: nnx.Rngs,
    ):
        attention = _attention_of(config)
        self.attention = attention
        self.dtype = jnp.dtype(dtype)
        options = {"param_dtype": param_dtype, "rngs": rngs}
        self.multiplier = config.multipliers.attention_out
        self.conv1d = QKVConv1d(attention, **options) if attention.d_conv else None
        out_proj = Projection(
            attention.query_width + attention.mlp_width,
            (config.hidden_size,),
            bias=attention.out_proj_bias,
            gain=residual_gain(config),
            dtype=self.dtype,
            **options,
        )
        if attention.separate:
            bias = {"bias": attention.qkv_proj_bias, "dtype": self.dtype}
            self.q_proj = Projection(config.hidden_size, (attention.query_width,), **bias, **options)
            self.k_proj = Projection(config.hidden_size, (attention.key_width,), **bias, **options)
            self.v_proj = Projection(config.hidden_size, (attention.key_width,), **bias, **options)
            self.o_proj = out_proj
        else:
            self.in_proj = QKVProjection(attention, config.hidden_size, dtype=self.dtype, **options)
            self.out_proj = out_proj

    @staticmethod
    def empty_state(
        config: Mamba2Config, batch: int, *, dtype: DTypeLike, ssm_dtype: DTypeLike, capacity: int
    ) -> LayerState:
        """The state before any token, with room for `capacity` a row; arguments of `Mamba2Cache.zeros`."""
        attention = _attention_of(config)
        conv = None
        if attention.d_conv:
            widths = {"q": attention.query_width, "k": attention.key_width, "v": attention.key_width}
            reach = attention.d_conv - 1
            conv = AttentionConvState(
                **{name: jnp.zeros((batch, reach, width), dtype) for name, width in widths.items()}
            )
        shape = (batch, capacity, attention.num_heads_kv, attention.head_dim)
        return LayerState(conv, None, KeyValues(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)))

    def mix(
        self, hidden: Float[Array, "b l d"], state: LayerState, rows: Rows
    ) -> tuple[Float[Array, "b l d"], LayerState]:
        """Mix tokens `(b, l, d)` as `Mamba2Mixer` does; `rows` must have `past` and `positions`."""
        kept, past, positions = state.attention, rows.past, rows.positions
        if kept is None or past is None or positions is None:
            raise ValueError(
                "AttentionMixer: state.attention, rows.past or rows.positions is None; take the model's"
            )
        batch, length, _ = hidden.shape
        one_token = length == 1 and kept.keys.shape[1] > 0 and rows.rolling is None
        q, k, v, mlp = self._project(hidden)
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
        output = self.o_proj if self.attention.separate else self.out_proj
        return scaled(output(y), self.multiplier), LayerState(conv, None, kept)

    def _project(self, hidden: Float[Array, "b l d"]) -> tuple[Array, Array, Array, Array | None]:
        """Compute q `(b, l, h*p)`, k and v `(b, l, kv*p)`, and the MLP's `(b, l, 2, m)` or None."""
        if not self.attention.separate:
            return self.in_proj(hidden)
        q, k, v = (one(hidden).astype(self.dtype) for one in (self.q_proj, self.k_proj, self.v_proj))
        return q, k, v, None

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
        """Compute attention, and store the keys and values of each row's last document."""
        scale = self.attention.softmax_scale
        if kept.keys.shape[1] == 0:  # nothing is cached
            y = causal_attention(q, k, v, segment_ids=rows.marks, scale=scale)
            if rows.rolling is not None:
                return y, kept
            if rows.mask is None:
                return y, KeyValues(k, v)
            empty = jnp.zeros_like(k)
            return y, _keep(KeyValues(empty, empty), k, v, rows, positions)[0]
        after, full = _keep(kept, k, v, rows, positions)
        if one_token:
            y = attention_step(q[:, 0], after.keys, after.values, positions[:, 0] + 1, scale=scale)[:, None]
        else:
            before = (kept.keys, kept.values, jnp.minimum(past, kept.keys.shape[1]))
            y = causal_attention(q, k, v, past=before, segment_ids=rows.marks, scale=scale)
        # Inside jit no error can be raised: NaN marks rows that overflowed their buffer.
        return jnp.where(full[:, None, None, None], jnp.nan, y), after


def _attention_of(config: Mamba2Config) -> AttentionConfig:
    if config.attn_cfg is None:
        raise ValueError("AttentionMixer: the config has no attn_cfg; say what the layer looks like")
    return config.attn_cfg


def _keep(
    kept: KeyValues, k: Float[Array, "b l kv p"], v, rows: Rows, positions: Int[Array, "b l"]
) -> tuple[KeyValues, Bool[Array, " b"]]:
    """Write keys and values of each row's last document to their slots; also return which rows overflow."""
    capacity = kept.keys.shape[1]
    counts = jnp.ones(positions.shape, bool) if rows.mask is None else rows.mask
    if rows.segment_ids is not None and positions.shape[1] > 1:
        document = document_index(rows.segment_ids)
        last = document[:, -1:]
        counts = counts & (document == last)
        goes_on = (last == 1)[..., None, None]  # a new document drops the cached one
        kept = KeyValues(jnp.where(goes_on, kept.keys, 0), jnp.where(goes_on, kept.values, 0))
    if rows.rolling is None:
        full, slots = jnp.any(counts & (positions >= capacity), axis=1), positions
    else:
        end = jnp.where(counts, positions, -1).max(axis=1, keepdims=True)
        counts &= positions > end - capacity  # of tokens for the same slot, the last
        full, slots = jnp.zeros(positions.shape[:1], bool), positions % capacity
    slots = jnp.where(counts, slots, capacity)  # out of bounds: dropped
    return KeyValues(write_slots(kept.keys, k, slots), write_slots(kept.values, v, slots)), full
