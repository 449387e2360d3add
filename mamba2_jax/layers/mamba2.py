"""The Mamba-2 mixer as a Flax NNX module.

    hidden -> norm -> in_proj -> z, x, B, C, dt
                      x, B, C -> causal conv, silu
                      ssd(x, dt, A, B, C) -> y
                      gated norm(y, z) -> out_proj -> + hidden

In a hybrid the mixer of some blocks is attention.
"""

import math
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from mamba2_jax.config import Mamba2Config
from mamba2_jax.layers.mamba2_inputs import CausalConv1d, InProjection
from mamba2_jax.layers.mamba2_step import each_token, matrices_alone, one_token
from mamba2_jax.layers.parts import Projection, RMSNorm, residual_gain, scaled, split_pair
from mamba2_jax.layers.piece import Piece, piece_config
from mamba2_jax.layers.state import ConvState, LayerState, Part, Rows
from mamba2_jax.ops import gated_rms_norm, silu_gate
from mamba2_jax.ops.mixer_step import decay_rate, step_sizes
from mamba2_jax.ops.pieces import own_group
from mamba2_jax.ops.scan.sharded import ssd_of_a_piece
from mamba2_jax.typing import Array, DTypeLike, Float

_ONE_DEVICE = Part()


class Mamba2Mixer(Piece):
    """Sequence mixer: input projection, convolution, SSD, gated norm (or gate alone), output projection.

    Args:
        hidden_size: width of the input and the output; or a config, which has all sizes and options.
        state_size: size of the state per channel.
        head_dim: channels per head.
        num_heads: heads; None: `expand * hidden_size / head_dim`.
        expand: inner width per width; not used if `num_heads` is given.
        n_groups: groups of heads that share B and C.
        conv_kernel: taps of the convolution.
        chunk_size: tokens per chunk of the scan in XLA; changes speed, not results. None: the platform's.
        use_bias: bias of the input and output projections.
        use_conv_bias: bias of the convolution.
        dtype: compute dtype of the matrix products.
        param_dtype: dtype of the initial parameters.
        ssd_implementation: `implementation` of `ops.ssd`; decoding prefers the kernel of this name of
            `ops.mixer_step`, and uses the default where there is none or it cannot run.
        rngs: source of the initial values.

    Source: Dao & Gu 2024, arXiv:2405.21060, section 7.

    >>> mixer = Mamba2Mixer(32, state_size=16, head_dim=8, rngs=nnx.Rngs(0))
    >>> mixer(jnp.ones((2, 5, 32))).shape
    (2, 5, 32)
    >>> update, state = mixer(jnp.ones((2, 5, 32)), state=mixer.initial_state(2))
    """

    def __init__(
        self,
        hidden_size: int | Mamba2Config,
        *,
        state_size: int = 128,
        head_dim: int = 64,
        num_heads: int | None = None,
        expand: int = 2,
        n_groups: int = 1,
        conv_kernel: int = 4,
        chunk_size: int | None = None,
        use_bias: bool = False,
        use_conv_bias: bool = True,
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike = jnp.float32,
        ssd_implementation: str | None = None,
        rngs: nnx.Rngs,
    ):
        config = self.config = piece_config(
            type(self).__name__,
            hidden_size,
            state_size=state_size,
            head_dim=head_dim,
            num_heads=num_heads,
            expand=expand,
            n_groups=n_groups,
            conv_kernel=conv_kernel,
            use_bias=use_bias,
            use_conv_bias=use_conv_bias,
        )
        self.chunk_size = chunk_size
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

    @property
    def hidden_size(self) -> int:
        """Return the width of the input and the output."""
        return self.config.hidden_size

    @property
    def out_dtype(self) -> jnp.dtype:
        """Return the dtype of the output, the compute dtype."""
        return self.dtype

    def initial_state(self, batch: int) -> LayerState:
        """Return the state of `batch` rows before any token, a pytree of arrays of fixed size."""
        ssm_dtype = jnp.promote_types(self.dtype, jnp.float32)
        return self.empty_state(self.config, batch, dtype=self.dtype, ssm_dtype=ssm_dtype, capacity=0)

    def mix(
        self, hidden: Float[Array, "b l d"], state: LayerState, rows: Rows, part: Part = _ONE_DEVICE
    ) -> tuple[Float[Array, "b l d"], LayerState]:
        """Mix a sequence of tokens.

        Args:
            hidden: normed hidden states `(b, l, d)`.
            state: state of the layer after the preceding tokens.
            rows: mask and segment ids of the tokens.
            part: inside a `shard_map`: how the arguments are one device's shards.

        Returns:
            The float32 update of the residual stream `(b, l, d)`, and the state after the sequence.
        """
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

    def scan_inputs(
        self, hidden: Float[Array, "b l d"], state: LayerState, rows: Rows
    ) -> dict[str, Float[Array, "..."]]:
        """Return the arguments x, dt, A, B, C and D that `mix` gives `ops.ssd` for a sequence."""
        if not isinstance(state.conv, ConvState):
            raise ValueError("Mamba2Mixer: state is not that of a Mamba-2 layer; give that of the model")
        zx, BC, dt = self.in_proj(hidden)
        return self._convolved(split_pair(zx)[1], BC, dt, state.conv, rows, _ONE_DEVICE)[0]

    def _convolved(
        self, x, BC, dt, conv: ConvState, rows: Rows, part: Part
    ) -> tuple[dict[str, Array], ConvState]:
        """Return the arguments of `ops.ssd` by name, and the final state of the convolution."""
        dt = step_sizes(dt, self.dt_bias[...], self.time_step_limit, rows.mask)
        x, BC, conv = self.conv1d(x, BC, conv, rows, part.num_pieces)
        B, C = self._split_BC(BC, part)
        A = decay_rate(self.A_log[...], jnp.promote_types(self.dtype, jnp.float32))
        x = x.reshape(*dt.shape, self.head_dim)
        return {"x": x, "dt": dt, "A": A, "B": B, "C": C, "D": self.D[...]}, conv

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
        scan, conv = self._convolved(x, BC, dt, conv, rows, part)
        x, dt, A, B, C, D = scan.values()
        y, after = ssd_of_a_piece(
            *(x, dt, A, B, C, D, ssm, rows.segment_ids),
            num_pieces=part.num_pieces,
            chunk_size=self.chunk_size,
            implementation=self.ssd_implementation,
        )
        return self._gate(y.reshape(z.shape), z, part), LayerState(conv, after.astype(ssm.dtype), None)

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
