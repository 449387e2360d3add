"""The residual block: for each branch a norm, the sum of its modules, and the residual sum."""

import warnings
from typing import Unpack

import jax.numpy as jnp
from flax import nnx

from mamba2_jax.config import Mamba2Config
from mamba2_jax.config.layers import NORMS, Layer, layer_of
from mamba2_jax.layers.experts import Experts
from mamba2_jax.layers.kinds import MIXERS, MODULES
from mamba2_jax.layers.mamba2 import Mamba2Mixer
from mamba2_jax.layers.mamba2_on_mesh import left_to_compiler, mix_on_mesh
from mamba2_jax.layers.parts import RMSNorm, scaled
from mamba2_jax.layers.piece import Piece, Sizes, piece_config
from mamba2_jax.layers.state import LayerState, Rows
from mamba2_jax.typing import Array, DTypeLike, Float


class Mamba2Block(Piece):
    """Residual block: for each branch `stream += sum(module(norm(stream)))`.

    A plain Mamba-2 has one branch with one module, `norm` and `mixer`; a second branch has `norm2`, and an
    MLP as `mlp`.

    Args:
        hidden_size: width of the residual stream; or a config, which has all sizes and options.
        layer: its branches; None: those of a Mamba-2 layer of the config.
        d_intermediate: width of a gated MLP after the mixer, rounded up to a multiple of 128; 0: none.
        residual_in_fp32: return a float32 stream also when `dtype` is narrower.
        layer_norm_epsilon: epsilon of the norms.
        dtype: as for `Mamba2Mixer`.
        param_dtype: as for `Mamba2Mixer`.
        chunk_size: as for `Mamba2Mixer`.
        ssd_implementation: as for `Mamba2Mixer`.
        rngs: as for `Mamba2Mixer`.
        **sizes: sizes of the mixer, as for `Mamba2Mixer`.

    >>> block = Mamba2Block(32, state_size=16, head_dim=8, d_intermediate=128, rngs=nnx.Rngs(0))
    >>> block(jnp.ones((2, 5, 32))).shape
    (2, 5, 32)
    """

    norm: RMSNorm
    mixer: Mamba2Mixer  # in a hybrid's other layers, another module or none

    def __init__(
        self,
        hidden_size: int | Mamba2Config,
        *,
        layer: Layer | None = None,
        d_intermediate: int = 0,
        residual_in_fp32: bool = True,
        layer_norm_epsilon: float = 1e-5,
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike = jnp.float32,
        chunk_size: int | None = None,
        ssd_implementation: str | None = None,
        rngs: nnx.Rngs,
        **sizes: Unpack[Sizes],
    ):
        options = {"d_intermediate": d_intermediate, "residual_in_fp32": residual_in_fp32}
        options["layer_norm_epsilon"] = layer_norm_epsilon
        config = piece_config(type(self).__name__, hidden_size, **options, **sizes)
        self.dtype = jnp.dtype(dtype)
        self.residual_in_fp32 = config.residual_in_fp32
        self.multiplier = config.multipliers.residual
        self.branches = layer_of("M", config.feed_forward) if layer is None else layer
        modules = {"dtype": self.dtype, "param_dtype": param_dtype, "rngs": rngs}
        for norm, branch in zip(NORMS, self.branches, strict=False):
            setattr(self, norm, RMSNorm(config.hidden_size, config.layer_norm_epsilon, param_dtype))
            for slot in branch:
                more = {"ssd_implementation": ssd_implementation} if slot.kind in MIXERS else {}
                more |= {"chunk_size": chunk_size} if slot.kind == "mamba2" else {}
                setattr(self, slot.attribute, MODULES[slot.kind](config, **more, **modules))

    @property
    def hidden_size(self) -> int:
        """Return the width of the residual stream."""
        return self.norm.weight.shape[0]

    @property
    def out_dtype(self) -> jnp.dtype:
        """Return the dtype of the residual stream."""
        return jnp.promote_types(self.dtype, jnp.float32) if self.residual_in_fp32 else self.dtype

    def initial_state(self, batch: int) -> LayerState:
        """Return the state of `batch` rows before any token, a pytree of arrays of fixed size."""
        kinds = {slot.kind for branch in self.branches for slot in branch}
        if "mamba2" not in kinds or "attention" in kinds:
            raise ValueError(
                f"Mamba2Block: a block of {', '.join(sorted(kinds))} runs in a model only; this call is for "
                "blocks whose only mixer is Mamba-2"
            )
        return self.mixer.initial_state(batch)

    def mix(
        self, hidden: Float[Array, "b l d"], state: LayerState, rows: Rows
    ) -> tuple[Float[Array, "b l d"], LayerState]:
        """Add the updates to the residual stream `(b, l, d)`; return the stream and the layer's new state."""
        hidden, state, _ = self._run(hidden, state, rows, with_load=False)
        return hidden, state

    def with_load(
        self, hidden: Float[Array, "b l d"], state: LayerState, rows: Rows
    ) -> tuple[Float[Array, "b l d"], LayerState, Float[Array, "2 e"] | None]:
        """Run `mix`; also return the load of the layer's experts, None without experts."""
        return self._run(hidden, state, rows, with_load=True)

    def _run(
        self, hidden: Array, state: LayerState, rows: Rows, with_load: bool
    ) -> tuple[Array, LayerState, Array | None]:
        load = None
        stream = self.out_dtype
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
    return mixer.mix(normed, state, rows)
