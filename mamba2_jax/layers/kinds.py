"""The module of each kind in a layer.

The tensors of a kind are declared in `mamba2_jax.config.kinds` under the same name, because files, shardings
and the parameter count need them without a module. A module takes `config, dtype, param_dtype, rngs`. A mixer
also takes `ssd_implementation`, has a static method `empty_state`, and is called with the layer's state.
"""

from flax import nnx

from mamba2_jax.layers.attention import AttentionMixer
from mamba2_jax.layers.mamba2 import Mamba2Mixer
from mamba2_jax.layers.parts import MLP

MIXERS: dict[str, type[Mamba2Mixer] | type[AttentionMixer]] = {
    "mamba2": Mamba2Mixer,
    "attention": AttentionMixer,
}
"""Modules that mix tokens, and so have a state."""

MODULES: dict[str, type[nnx.Module]] = {**MIXERS, "mlp": MLP}
"""All modules."""
