"""The residual block: norm and mixer, then norm and MLP if the config has an MLP."""

import warnings
from functools import partial

import jax.numpy as jnp
from flax import nnx

from mamba2_jax.config import Mamba2Config
from mamba2_jax.layers.kinds import MIXERS
from mamba2_jax.layers.mamba2 import Mamba2Mixer
from mamba2_jax.layers.mamba2_on_mesh import left_to_compiler, mix_on_mesh
from mamba2_jax.layers.parts import GatedMLP, RMSNorm
from mamba2_jax.layers.state import LayerState, Rows
from mamba2_jax.typing import Array, DTypeLike, Float


class Mamba2Block(nnx.Module):
    """Residual block: norm, mixer, residual sum; with `d_intermediate` then norm, MLP, residual sum.

    Args:
        config: sizes and options.
        kind: kind of layer, which selects the mixer: a key of `layers.kinds.MIXERS`.
        dtype: as for `Mamba2Mixer`.
        param_dtype: as for `Mamba2Mixer`.
        ssd_implementation: as for `Mamba2Mixer`.
        rngs: as for `Mamba2Mixer`.
    """

    def __init__(
        self,
        config: Mamba2Config,
        *,
        kind: str = "mamba2",
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike = jnp.float32,
        ssd_implementation: str | None = None,
        rngs: nnx.Rngs,
    ):
        self.dtype = jnp.dtype(dtype)
        self.residual_in_fp32 = config.residual_in_fp32
        options = {"dtype": self.dtype, "param_dtype": param_dtype, "rngs": rngs}
        norm = partial(RMSNorm, config.hidden_size, config.layer_norm_epsilon, param_dtype)
        self.norm = norm()
        self.mixer = MIXERS[kind](config, ssd_implementation=ssd_implementation, **options)
        self.norm2 = norm() if config.d_intermediate else None
        self.mlp = GatedMLP(config, **options) if config.d_intermediate else None

    def __call__(
        self, hidden: Float[Array, "b l d"], state: LayerState, rows: Rows
    ) -> tuple[Float[Array, "b l d"], LayerState]:
        """Add the updates to the residual stream `(b, l, d)`; return the stream and the layer's new state."""
        update, state = self._mix(self.norm(hidden).astype(self.dtype), state, rows)
        stream = jnp.promote_types(self.dtype, jnp.float32) if self.residual_in_fp32 else self.dtype
        hidden = hidden.astype(stream) + update.astype(stream)
        if self.mlp is not None and self.norm2 is not None:
            hidden = hidden + self.mlp(self.norm2(hidden).astype(self.dtype)).astype(stream)
        return hidden, state

    def _mix(self, normed: Array, state: LayerState, rows: Rows) -> tuple[Array, LayerState]:
        """Run the mixer; on a mesh as a `shard_map` where the sizes allow, else partitioned by XLA."""
        mixer = self.mixer
        if isinstance(mixer, Mamba2Mixer) and mixer.mesh is not None:
            reason = left_to_compiler(mixer, mixer.mesh)
            if reason is None:
                return mix_on_mesh(mixer, mixer.mesh, normed, state, rows)
            warnings.warn(  # while the layer is traced: once per compilation
                f"XLA partitions the mixers over the mesh, which may send more than needed: {reason}",
                stacklevel=2,
            )
        return mixer(normed, state, rows)
