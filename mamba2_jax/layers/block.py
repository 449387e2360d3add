"""The residual block: for each branch a norm, the sum of its modules, and the residual sum."""

import warnings

import jax.numpy as jnp
from flax import nnx

from mamba2_jax.config import Mamba2Config
from mamba2_jax.config.layers import NORMS, Layer, layer_of
from mamba2_jax.layers.experts import Experts
from mamba2_jax.layers.kinds import MIXERS, MODULES
from mamba2_jax.layers.mamba2 import Mamba2Mixer
from mamba2_jax.layers.mamba2_on_mesh import left_to_compiler, mix_on_mesh
from mamba2_jax.layers.parts import RMSNorm, scaled
from mamba2_jax.layers.state import LayerState, Rows
from mamba2_jax.typing import Array, DTypeLike, Float


class Mamba2Block(nnx.Module):
    """Residual block: for each branch `stream += sum(module(norm(stream)))`.

    A plain Mamba-2 has one branch with one module, `norm` and `mixer`; a second branch has `norm2`, and an
    MLP as `mlp`.

    Args:
        config: sizes and options.
        layer: its branches; None: those of a Mamba-2 layer of the config.
        dtype: as for `Mamba2Mixer`.
        param_dtype: as for `Mamba2Mixer`.
        ssd_implementation: as for `Mamba2Mixer`.
        rngs: as for `Mamba2Mixer`.
    """

    def __init__(
        self,
        config: Mamba2Config,
        *,
        layer: Layer | None = None,
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike = jnp.float32,
        ssd_implementation: str | None = None,
        rngs: nnx.Rngs,
    ):
        self.dtype = jnp.dtype(dtype)
        self.residual_in_fp32 = config.residual_in_fp32
        self.multiplier = config.multipliers.residual
        self.branches = layer_of("M", config.feed_forward) if layer is None else layer
        options = {"dtype": self.dtype, "param_dtype": param_dtype, "rngs": rngs}
        for norm, branch in zip(NORMS, self.branches, strict=False):
            setattr(self, norm, RMSNorm(config.hidden_size, config.layer_norm_epsilon, param_dtype))
            for slot in branch:
                more = {"ssd_implementation": ssd_implementation} if slot.kind in MIXERS else {}
                setattr(self, slot.attribute, MODULES[slot.kind](config, **more, **options))

    def __call__(
        self, hidden: Float[Array, "b l d"], state: LayerState, rows: Rows
    ) -> tuple[Float[Array, "b l d"], LayerState]:
        """Add the updates to the residual stream `(b, l, d)`; return the stream and the layer's new state."""
        hidden, state, _ = self._run(hidden, state, rows, with_load=False)
        return hidden, state

    def with_load(
        self, hidden: Float[Array, "b l d"], state: LayerState, rows: Rows
    ) -> tuple[Float[Array, "b l d"], LayerState, Float[Array, "2 e"] | None]:
        """Run `__call__`; also return the load of the layer's experts, None without experts."""
        return self._run(hidden, state, rows, with_load=True)

    def _run(
        self, hidden: Array, state: LayerState, rows: Rows, with_load: bool
    ) -> tuple[Array, LayerState, Array | None]:
        load = None
        stream = jnp.promote_types(self.dtype, jnp.float32) if self.residual_in_fp32 else self.dtype
        for norm, branch in zip(NORMS, self.branches, strict=False):
            normed = getattr(self, norm)(hidden).astype(self.dtype)
            updates = []
            for slot in branch:
                module = getattr(self, slot.attribute)
                if slot.kind in MIXERS:
                    update, after = _mix(module, normed, state, rows)
                    state = state.updated(after)
                elif with_load and isinstance(module, Experts):
                    update, load = module.with_load(normed, rows.mask)
                else:
                    update = module(normed)
                updates.append(update)
            update = scaled(sum(updates[1:], start=updates[0]), self.multiplier)
            hidden = hidden.astype(stream) + update.astype(stream)
        return hidden, state, load


def _mix(mixer, normed: Array, state: LayerState, rows: Rows) -> tuple[Array, LayerState]:
    """Run a mixer; on a mesh as a `shard_map` where the sizes allow, else partitioned by XLA."""
    if isinstance(mixer, Mamba2Mixer) and mixer.mesh is not None:
        reason = left_to_compiler(mixer, mixer.mesh)
        if reason is None:
            return mix_on_mesh(mixer, mixer.mesh, normed, state._replace(attention=None), rows)
        warnings.warn(  # while the layer is traced: once per compilation
            f"XLA partitions the mixers over the mesh, which may send more than needed: {reason}",
            stacklevel=2,
        )
    return mixer(normed, state, rows)
