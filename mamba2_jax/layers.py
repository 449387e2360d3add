"""The Mamba-2 block as Flax NNX modules.

    hidden -> norm -> in_proj -> z, x, B, C, dt
                      x, B, C -> causal conv, silu
                      ssd(x, dt, A, B, C) -> y
                      gated norm(y, z) -> out_proj -> + hidden

The input projection and the convolution keep one leaf per meaning (z and x, B and C, dt), so that
heads and groups can be split over devices.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from mamba2_jax.cache import ConvState
from mamba2_jax.config import Mamba2Config
from mamba2_jax.lora.adapters import Adaptable
from mamba2_jax.ops import causal_conv1d, causal_conv1d_step, gated_rms_norm, rms_norm, ssd, ssd_step
from mamba2_jax.ops.linear import embedding_lookup, linear
from mamba2_jax.typing import Array, Bool, DTypeLike, Float, Int


class Rows(NamedTuple):
    """Which tokens of a batch count, and where documents begin. None: all of them, one document a row."""

    mask: Bool[Array, "b l"] | None = None
    segment_ids: Int[Array, "b l"] | None = None  # 0 wherever the mask is false


class LayerState(NamedTuple):
    """One layer's part of `Mamba2Cache`."""

    conv: ConvState
    ssm: Float[Array, "b h p n"]


class Embedding(Adaptable):
    """A table of `(v, d)`; drawn from a normal of `std`."""

    def __init__(self, vocab_size: int, width: int, std: float, param_dtype: DTypeLike, rngs: nnx.Rngs):
        self.weight = nnx.Param(std * jax.random.normal(rngs.params(), (vocab_size, width), param_dtype))

    def __call__(self, ids: Int[Array, "*b"], *, dtype: DTypeLike) -> Float[Array, "*b d"]:
        """Look tokens up, in `dtype`."""
        rows = embedding_lookup(self.weight[...], ids)
        for adapter in self.adapters_in_use():
            low = adapter.scale * embedding_lookup(adapter.A[...], ids)
            rows = rows + linear(low, adapter.B["weight"][...], dtype=dtype)
        return rows.astype(dtype)


class RMSNorm(nnx.Module):
    """Root-mean-square norm with a weight `(d,)`."""

    def __init__(self, width: int, eps: float, param_dtype: DTypeLike):
        self.eps = eps
        self.weight = nnx.Param(jnp.ones((width,), param_dtype))

    def __call__(self, x: Float[Array, "b l d"]) -> Float[Array, "b l d"]:
        """Normalise over the last axis, in the dtype of `x`."""
        return rms_norm(x, self.weight[...], eps=self.eps)


class InProjection(Adaptable):
    """`d -> z, x, B, C, dt`: three matrices `(d, 2, e)`, `(d, 2, gn)`, `(d, h)`."""

    def __init__(self, config: Mamba2Config, *, dtype: DTypeLike, param_dtype: DTypeLike, rngs: nnx.Rngs):
        width, inner, heads = config.hidden_size, config.d_ssm, config.num_heads
        group_width = config.n_groups * config.state_size
        bound = 1 / math.sqrt(width)
        self.dtype = dtype
        self.weight_zx = _uniform(rngs, (width, 2, inner), bound, param_dtype)
        self.weight_BC = _uniform(rngs, (width, 2, group_width), bound, param_dtype)
        self.weight_dt = _uniform(rngs, (width, heads), bound, param_dtype)
        self.bias_zx = _zeros((2, inner), param_dtype) if config.use_bias else None
        self.bias_BC = _zeros((2, group_width), param_dtype) if config.use_bias else None
        self.bias_dt = _zeros((heads,), param_dtype) if config.use_bias else None

    def __call__(self, hidden: Float[Array, "b l d"]) -> tuple[Array, Array, Array, Array]:
        """Return z `(b, l, e)`, x `(b, l, e)`, B and C `(b, l, 2, gn)`, and float32 dt `(b, l, h)`."""
        zx = self.project(hidden, "_zx").astype(self.dtype)
        BC = self.project(hidden, "_BC").astype(self.dtype)
        dt = self.project(hidden, "_dt")
        return zx[..., 0, :], zx[..., 1, :], BC, dt


class CausalConv1d(Adaptable):
    """The depthwise convolution over x, B and C: taps `(k, e)` and `(k, 2, gn)`, then silu."""

    def __init__(self, config: Mamba2Config, *, param_dtype: DTypeLike, rngs: nnx.Rngs):
        taps, inner, group_width = config.conv_kernel, config.d_ssm, config.n_groups * config.state_size
        bound = 1 / math.sqrt(taps)
        self.weight_x = _uniform(rngs, (taps, inner), bound, param_dtype)
        self.weight_BC = _uniform(rngs, (taps, 2, group_width), bound, param_dtype)
        has_bias = config.use_conv_bias
        self.bias_x = _uniform(rngs, (inner,), bound, param_dtype) if has_bias else None
        self.bias_BC = _uniform(rngs, (2, group_width), bound, param_dtype) if has_bias else None

    def __call__(
        self, x: Float[Array, "b l e"], BC: Float[Array, "b l 2 gn"], state: ConvState | None, rows: Rows
    ) -> tuple[Array, Array, ConvState]:
        """Convolve a sequence; returns x, BC and the state after it."""
        segment_ids = rows.mask if rows.segment_ids is None else rows.segment_ids
        x, state_x = causal_conv1d(
            x,
            self.taps("weight_x"),
            _value(self.bias_x),
            initial_state=None if state is None else state.x,
            segment_ids=segment_ids,
        )
        BC, state_BC = causal_conv1d(
            BC,
            self.taps("weight_BC"),
            _value(self.bias_BC),
            initial_state=None if state is None else state.BC,
            segment_ids=segment_ids,
        )
        return x, BC, ConvState(x=state_x, BC=state_BC)

    def step(
        self, x: Float[Array, "b e"], BC: Float[Array, "b 2 gn"], state: ConvState
    ) -> tuple[Array, Array, ConvState]:
        """Convolve one token; returns x, BC and the state after it."""
        x, state_x = causal_conv1d_step(x, self.taps("weight_x"), _value(self.bias_x), state.x)
        BC, state_BC = causal_conv1d_step(BC, self.taps("weight_BC"), _value(self.bias_BC), state.BC)
        return x, BC, ConvState(x=state_x, BC=state_BC)


class OutProjection(Adaptable):
    """`e -> d`: one matrix `(e, d)`."""

    def __init__(self, config: Mamba2Config, *, dtype: DTypeLike, param_dtype: DTypeLike, rngs: nnx.Rngs):
        bound = 1 / math.sqrt(config.d_ssm)
        if config.rescale_prenorm_residual:
            # One residual branch per layer: the sum of all of them keeps its variance (GPT-2's rule).
            bound /= math.sqrt(config.num_hidden_layers)
        self.dtype = dtype
        self.weight = _uniform(rngs, (config.d_ssm, config.hidden_size), bound, param_dtype)
        self.bias = _zeros((config.hidden_size,), param_dtype) if config.use_bias else None

    def __call__(self, y: Float[Array, "b l e"]) -> Float[Array, "b l d"]:
        """Project back to the residual stream, float32."""
        return self.project(y)


class Mamba2Mixer(nnx.Module):
    """The sequence mixer: projection, convolution, SSD, gated norm, projection.

    Args:
        config: sizes and options.
        dtype: compute dtype of the matrix products.
        param_dtype: dtype of the parameters made here.
        ssd_implementation: passed to `ops.ssd`.
        rngs: source of the initial values.

    Source: Dao & Gu 2024, arXiv:2405.21060, section 7.
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
        self.num_heads, self.head_dim = config.num_heads, config.head_dim
        self.num_groups, self.state_dim = config.n_groups, config.state_size
        self.time_step_limit = config.time_step_limit
        self.dtype = jnp.dtype(dtype)
        self.ssd_implementation = ssd_implementation

        self.in_proj = InProjection(config, dtype=self.dtype, param_dtype=param_dtype, rngs=rngs)
        self.conv1d = CausalConv1d(config, param_dtype=param_dtype, rngs=rngs)
        self.dt_bias = nnx.Param(_initial_dt_bias(config, rngs).astype(param_dtype))
        A = jax.random.uniform(rngs.params(), (self.num_heads,), jnp.float32, 1.0, 16.0)
        self.A_log = nnx.Param(jnp.log(A).astype(param_dtype))
        self.D = nnx.Param(jnp.ones((self.num_heads,), param_dtype))
        self.norm = RMSNorm(config.d_ssm, config.layer_norm_epsilon, param_dtype)
        self.out_proj = OutProjection(config, dtype=self.dtype, param_dtype=param_dtype, rngs=rngs)

    def __call__(
        self, hidden: Float[Array, "b l d"], state: LayerState, rows: Rows
    ) -> tuple[Float[Array, "b l d"], LayerState]:
        """Mix a sequence.

        Args:
            hidden: normed hidden states `(b, l, d)`.
            state: what the layer remembers of the tokens before.
            rows: which tokens count, and where documents begin.

        Returns:
            The float32 update of the residual stream `(b, l, d)`, and the state after the sequence.
        """
        z, x, BC, dt = self.in_proj(hidden)
        dt = jax.nn.softplus(dt + self.dt_bias[...].astype(dt.dtype))
        dt = jnp.clip(dt, *self.time_step_limit)  # (b, l, h) float32
        if rows.mask is not None:
            dt = jnp.where(rows.mask[..., None], dt, 0.0)  # a token that does not count changes nothing
        mix = self._one_token if hidden.shape[1] == 1 else self._sequence
        y, state = mix(x, BC, dt, state, rows)
        y = gated_rms_norm(
            y, z, self.norm.weight[...], eps=self.norm.eps, num_groups=self.num_groups
        )  # (b, l, e)
        return self.out_proj(y), state

    def _sequence(self, x, BC, dt, state: LayerState, rows: Rows) -> tuple[Array, LayerState]:
        batch, length, _ = x.shape
        x, BC, conv = self.conv1d(x, BC, state.conv, rows)
        B, C = (BC[:, :, i].reshape(batch, length, self.num_groups, self.state_dim) for i in (0, 1))
        y, ssm = ssd(
            x.reshape(batch, length, self.num_heads, self.head_dim),
            dt,
            self._A(),
            B,
            C,
            D=self.D[...],
            initial_state=state.ssm,
            segment_ids=rows.segment_ids,
            implementation=self.ssd_implementation,
        )
        return y.reshape(batch, length, -1), LayerState(conv, ssm.astype(state.ssm.dtype))

    def _one_token(self, x, BC, dt, state: LayerState, rows: Rows) -> tuple[Array, LayerState]:
        batch = x.shape[0]
        x, BC, conv = self.conv1d.step(x[:, 0], BC[:, 0], state.conv)
        if rows.mask is not None:
            kept = rows.mask[:, 0]
            conv = jax.tree.map(lambda new, old: _where_rows(kept, new, old), conv, state.conv)
        B, C = (BC[:, i].reshape(batch, self.num_groups, self.state_dim) for i in (0, 1))
        heads = x.reshape(batch, self.num_heads, self.head_dim)
        y, ssm = ssd_step(heads, dt[:, 0], self._A(), B, C, state.ssm, D=self.D[...])
        return y.reshape(batch, 1, -1), LayerState(conv, ssm)

    def _A(self) -> Float[Array, " h"]:
        return -jnp.exp(self.A_log[...].astype(jnp.promote_types(self.dtype, jnp.float32)))


class Mamba2Block(nnx.Module):
    """Norm, mixer, residual. Arguments as for `Mamba2Mixer`."""

    def __init__(
        self,
        config: Mamba2Config,
        *,
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike = jnp.float32,
        ssd_implementation: str | None = None,
        rngs: nnx.Rngs,
    ):
        self.dtype = jnp.dtype(dtype)
        self.residual_in_fp32 = config.residual_in_fp32
        self.norm = RMSNorm(config.hidden_size, config.layer_norm_epsilon, param_dtype)
        self.mixer = Mamba2Mixer(
            config, dtype=dtype, param_dtype=param_dtype, ssd_implementation=ssd_implementation, rngs=rngs
        )

    def __call__(
        self, hidden: Float[Array, "b l d"], state: LayerState, rows: Rows
    ) -> tuple[Float[Array, "b l d"], LayerState]:
        """Add the mixer's update to the residual stream; returns it and the layer's state."""
        update, state = self.mixer(self.norm(hidden).astype(self.dtype), state, rows)
        stream = jnp.promote_types(self.dtype, jnp.float32) if self.residual_in_fp32 else self.dtype
        return hidden.astype(stream) + update.astype(stream), state


def _initial_dt_bias(config: Mamba2Config, rngs: nnx.Rngs) -> Float[Array, " h"]:
    """Inverse softplus of step sizes drawn log-uniformly from `time_step_min .. time_step_max`."""
    low, high = math.log(config.time_step_min), math.log(config.time_step_max)
    dt = jnp.exp(jax.random.uniform(rngs.params(), (config.num_heads,), jnp.float32, low, high))
    dt = jnp.maximum(dt, config.time_step_floor)
    return dt + jnp.log(-jnp.expm1(-dt))


def _uniform(rngs: nnx.Rngs, shape: tuple[int, ...], bound: float, dtype: DTypeLike) -> nnx.Param:
    values = jax.random.uniform(rngs.params(), shape, jnp.float32, -bound, bound)
    return nnx.Param(values.astype(dtype))


def _zeros(shape: tuple[int, ...], dtype: DTypeLike) -> nnx.Param:
    return nnx.Param(jnp.zeros(shape, dtype))


def _value(param: nnx.Param | None) -> Array | None:
    return None if param is None else param[...]


def _where_rows(rows: Bool[Array, " b"], new: Array, old: Array) -> Array:
    return jnp.where(rows.reshape(-1, *(1,) * (new.ndim - 1)), new, old)
