"""What a Mamba-2 mixer computes before the scan: the input projection and the causal convolution.

Both have one leaf per meaning (z and x, B and C, dt), so that heads and groups can be sharded over devices.
"""

import math
from functools import partial

from flax import nnx

from mamba2_jax.config import Mamba2Config
from mamba2_jax.layers.adaptable import Adaptable
from mamba2_jax.layers.parts import scaled, scaled_pair, split_pair, uniform, value_of, zeros
from mamba2_jax.layers.state import ConvState, Rows
from mamba2_jax.ops import silu_gate
from mamba2_jax.ops.conv.sharded import convolve_a_piece
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
        convolve = partial(convolve_a_piece, num_pieces=num_pieces, activation="silu")
        x, state_x = convolve(x, self.taps("weight_x"), value_of(self.bias_x), state.x, rows.marks)
        BC, state_BC = convolve(BC, self.taps("weight_BC"), value_of(self.bias_BC), state.BC, rows.marks)
        return x, BC, ConvState(x=state_x, BC=state_BC)
