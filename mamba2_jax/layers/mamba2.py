"""The Mamba-2 block as Flax NNX modules.

    hidden -> norm -> in_proj -> z, x, B, C, dt
                      x, B, C -> causal conv, silu
                      ssd(x, dt, A, B, C) -> y
                      gated norm(y, z) -> out_proj -> + hidden

The input projection and the convolution have one leaf per meaning (z and x, B and C, dt), so that heads and
groups can be sharded over devices. In a hybrid the mixer of some blocks is attention.
"""

import math
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from mamba2_jax.config import Mamba2Config
from mamba2_jax.layers.adaptable import Adaptable
from mamba2_jax.layers.mamba2_step import each_token, matrices_alone, one_token
from mamba2_jax.layers.parts import (
    Projection,
    RMSNorm,
    residual_gain,
    scaled,
    scaled_pair,
    split_pair,
    uniform,
    value_of,
    zeros,
)
from mamba2_jax.layers.state import ConvState, LayerState, Part, Rows
from mamba2_jax.ops import gated_rms_norm, silu_gate
from mamba2_jax.ops.conv.sharded import convolve_a_piece
from mamba2_jax.ops.mixer_step import decay_rate, step_sizes
from mamba2_jax.ops.pieces import own_group
from mamba2_jax.ops.scan.sharded import ssd_of_a_piece
from mamba2_jax.typing import Array, DTypeLike, Float


class InProjection(Adaptable):
    """Input projection `d -> z, x, B, C, dt`: three matrices `(d, 2, e)`, `(d, 2, gn)`, `(d, h)`.

    A fourth matrix `(d, 2, m)` gives gate and value of a gated MLP in parallel to the SSM, if there is one.
    """

    def __init__(self, config: Mamba2Config, *, dtype: DTypeLike, param_dtype: DTypeLike, rngs: nnx.Rngs):
        width, inner, heads = config.hidden_size, config.d_ssm, config.num_heads
        group_width, mlp = config.groups_state_size, config.parallel_mlp_width
        bound = 1 / math.sqrt(width)
        self.dtype = dtype
        self.multipliers = config.multipliers.ssm
        self.weight_z0x0 = uniform(rngs, (width, 2, mlp), bound, param_dtype) if mlp else None
        self.weight_zx = uniform(rngs, (width, 2, inner), bound, param_dtype)
        self.weight_BC = uniform(rngs, (width, 2, group_width), bound, param_dtype)
        self.weight_dt = uniform(rngs, (width, heads), bound, param_dtype)
        self.bias_z0x0 = zeros((2, mlp), param_dtype) if config.use_bias and mlp else None
        self.bias_zx = zeros((2, inner), param_dtype) if config.use_bias else None
        self.bias_BC = zeros((2, group_width), param_dtype) if config.use_bias else None
        self.bias_dt = zeros((heads,), param_dtype) if config.use_bias else None

    def __call__(self, hidden: Float[Array, "b l d"]) -> tuple[Array, Array, Array]:
        """Return z and x `(b, l, 2, e)`, B and C `(b, l, 2, gn)`, and float32 dt `(b, l, h)`."""
        of_z, of_x, of_B, of_C, of_dt = self.multipliers
        zx = scaled_pair(self.project(hidden, "_zx"), of_z, of_x).astype(self.dtype)
        BC = scaled_pair(self.project(hidden, "_BC"), of_B, of_C).astype(self.dtype)
        dt = scaled(self.project(hidden, "_dt"), of_dt)
        return zx, BC, dt

    def mlp(self, hidden: Float[Array, "b l d"]) -> Float[Array, "b l m"] | None:
        """Compute the gated MLP in parallel to the SSM, `silu(z0) * x0`; None if there is none."""
        if self.weight_z0x0 is None:
            return None
        gate, value = split_pair(self.project(hidden, "_z0x0").astype(self.dtype))
        return silu_gate(value, gate)


class CausalConv1d(Adaptable):
    """Depthwise convolution over x, B and C, with taps `(k, e)` and `(k, 2, gn)`, then silu."""

    def __init__(self, config: Mamba2Config, *, param_dtype: DTypeLike, rngs: nnx.Rngs):
        taps, inner, group_width = config.conv_kernel, config.d_ssm, config.groups_state_size
        bound = 1 / math.sqrt(taps)
        self.weight_x = uniform(rngs, (taps, inner), bound, param_dtype)
        self.weight_BC = uniform(rngs, (taps, 2, group_width), bound, param_dtype)
        has_bias = config.use_conv_bias
        self.bias_x = uniform(rngs, (inner,), bound, param_dtype) if has_bias else None
        self.bias_BC = uniform(rngs, (2, group_width), bound, param_dtype) if has_bias else None

    def __call__(
        self,
        x: Float[Array, "b l e"],
        BC: Float[Array, "b l 2 gn"],
        state: ConvState,
        rows: Rows,
        num_pieces: int,
    ) -> tuple[Array, Array, ConvState]:
        """Convolve a sequence, or one of its `num_pieces` pieces; return x, BC and the final state."""
        marks = None if rows.marks is None else rows.marks.astype(jnp.int32)
        convolve = partial(convolve_a_piece, num_pieces=num_pieces, activation="silu")
        x, state_x = convolve(x, self.taps("weight_x"), value_of(self.bias_x), state.x, marks)
        BC, state_BC = convolve(BC, self.taps("weight_BC"), value_of(self.bias_BC), state.BC, marks)
        return x, BC, ConvState(x=state_x, BC=state_BC)


class Mamba2Mixer(nnx.Module):
    """Sequence mixer: input projection, convolution, SSD, gated norm (or gate alone), output projection.

    Args:
        config: sizes and options.
        dtype: compute dtype of the matrix products.
        param_dtype: dtype of the initial parameters.
        ssd_implementation: `implementation` of `ops.ssd`; decoding prefers the kernel of this name of
            `ops.mixer_step`, and uses the default where there is none or it cannot run.
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
        self.config = config
        self.head_dim, self.state_dim = config.head_dim, config.state_size
        self.time_step_limit = config.time_step_limit
        self.norm_before_gate = config.norm_before_gate
        self.multiplier = config.multipliers.ssm_out
        self.dtype = jnp.dtype(dtype)
        self.ssd_implementation = ssd_implementation
        self.mesh: Mesh | None = None  # set by `to_mesh` of the model

        self.in_proj = InProjection(config, dtype=self.dtype, param_dtype=param_dtype, rngs=rngs)
        self.conv1d = CausalConv1d(config, param_dtype=param_dtype, rngs=rngs)
        self.dt_bias = nnx.Param(_initial_dt_bias(config, rngs.params()).astype(param_dtype))
        A = jax.random.uniform(rngs.params(), (config.num_heads,), jnp.float32, 1.0, 16.0)
        self.A_log = nnx.Param(jnp.log(A).astype(param_dtype))
        skips = (config.num_heads, self.head_dim) if config.D_has_hdim else (config.num_heads,)
        self.D = nnx.Param(jnp.ones(skips, param_dtype))
        self.norm = RMSNorm(config.d_ssm, config.layer_norm_epsilon, param_dtype) if config.rmsnorm else None
        self.out_proj = Projection(
            config.inner_width,
            (config.hidden_size,),
            bias=config.use_bias,
            gain=residual_gain(config),
            dtype=self.dtype,
            param_dtype=param_dtype,
            rngs=rngs,
        )

    @staticmethod
    def empty_state(
        config: Mamba2Config, batch: int, *, dtype: DTypeLike, ssm_dtype: DTypeLike, capacity: int
    ) -> LayerState:
        """Return the state before any token, of a size independent of `capacity`; see `Mamba2Cache.zeros`."""
        reach = config.conv_kernel - 1
        conv = ConvState(
            x=jnp.zeros((batch, reach, config.d_ssm), dtype),
            BC=jnp.zeros((batch, reach, 2, config.groups_state_size), dtype),
        )
        ssm = jnp.zeros((batch, config.num_heads, config.head_dim, config.state_size), ssm_dtype)
        return LayerState(conv, ssm, None)

    def __call__(
        self, hidden: Float[Array, "b l d"], state: LayerState, rows: Rows
    ) -> tuple[Float[Array, "b l d"], LayerState]:
        """Mix a sequence of tokens.

        Args:
            hidden: normed hidden states `(b, l, d)`.
            state: state of the layer after the preceding tokens.
            rows: mask and segment ids of the tokens.

        Returns:
            The float32 update of the residual stream `(b, l, d)`, and the state after the sequence.
        """
        return self.mix(hidden, state, rows, Part())

    def mix(self, hidden: Array, state: LayerState, rows: Rows, part: Part) -> tuple[Array, LayerState]:
        """Run `__call__` on whole arrays, or on one device's shards inside a `shard_map` as `part` says."""
        conv, ssm = state.conv, state.ssm
        if not isinstance(conv, ConvState) or ssm is None:
            raise ValueError("Mamba2Mixer: state is not that of a Mamba-2 layer; give that of the model")
        if rows.every_state is not None:
            y, state = each_token(self, self.in_proj(hidden), state, part)
        elif hidden.shape[1] > 1 or part.num_pieces > 1:
            y, state = self._sequence(*self.in_proj(hidden), conv, ssm, rows, part)
        else:
            mask = None if rows.mask is None else rows.mask[:, 0]
            matrices = matrices_alone(self.in_proj, self.out_proj)
            if matrices is not None:
                update, state = one_token(self, hidden[:, 0], state, mask, part, matrices)
                return scaled(update[:, None], self.multiplier), state
            zx, BC, dt = self.in_proj(hidden)
            y, state = one_token(self, (zx[:, 0], BC[:, 0], dt[:, 0]), state, mask, part)
            y = y[:, None]
        beside = self.in_proj.mlp(hidden)
        if beside is not None:
            y = jnp.concatenate([beside, y], axis=-1)  # (b, l, m + e)
        return scaled(self.out_proj(y), self.multiplier), state

    def _gate(self, y: Float[Array, "b l e"], z: Float[Array, "b l e"], part: Part) -> Float[Array, "b l e"]:
        if self.norm is None:
            return silu_gate(y, z)
        return gated_rms_norm(
            y,
            z,
            self.norm.weight[...],
            eps=self.norm.eps,
            num_groups=1 if part.devices_per_group > 1 else self.num_groups,
            norm_before_gate=self.norm_before_gate,
            combine=partial(part.mean_over_group, num_groups=self.num_groups),
        )

    def _sequence(
        self, zx, BC, dt, conv: ConvState, ssm: Array, rows: Rows, part: Part
    ) -> tuple[Array, LayerState]:
        z, x = split_pair(zx)
        dt = step_sizes(dt, self.dt_bias[...], self.time_step_limit, rows.mask)
        x, BC, conv = self.conv1d(x, BC, conv, rows, part.num_pieces)
        B, C = self._split_BC(BC, part)
        y, after = ssd_of_a_piece(
            x.reshape(*dt.shape, self.head_dim),
            dt,
            decay_rate(self.A_log[...], jnp.promote_types(self.dtype, jnp.float32)),
            B,
            C,
            self.D[...],
            ssm,
            rows.segment_ids,
            num_pieces=part.num_pieces,
            implementation=self.ssd_implementation,
        )
        return self._gate(y.reshape(x.shape), z, part), LayerState(conv, after.astype(ssm.dtype), None)

    def _split_BC(self, BC: Float[Array, "*b 2 gn"], part: Part) -> list[Float[Array, "*b g n"]]:
        """Split BC into B and C, with only the groups of this device's heads."""
        BC = BC.reshape(*BC.shape[:-1], self.num_groups, self.state_dim)
        if part.devices_per_group > 1:
            BC = own_group(BC, part.devices_per_group, axis=BC.ndim - 2)
        return [one.squeeze(-3) for one in jax.lax.split(BC, (1, 1), axis=BC.ndim - 3)]

    @property
    def num_groups(self) -> int:
        """Return the number of groups of B and C; inside a `shard_map`, those of this device."""
        return self.in_proj.weight_BC.shape[-1] // self.state_dim


def _initial_dt_bias(config: Mamba2Config, key: Array) -> Float[Array, " h"]:
    """Draw step sizes log-uniformly from `time_step_min .. time_step_max`; return their inverse softplus."""
    low, high = math.log(config.time_step_min), math.log(config.time_step_max)
    dt = jnp.exp(jax.random.uniform(key, (config.num_heads,), jnp.float32, low, high))
    dt = jnp.maximum(dt, config.time_step_floor)
    return dt + jnp.log(-jnp.expm1(-dt))
