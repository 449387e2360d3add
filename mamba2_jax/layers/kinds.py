"""The mixer module of each kind of layer, with its empty state.

The tensors of a kind are declared in `mamba2_jax.config.kinds` under the same name, because files, shardings
and the parameter count need them without a module. A mixer takes the constructor arguments of `Mamba2Mixer`
and has a static method `empty_state`.
"""

from mamba2_jax.layers.attention import AttentionMixer
from mamba2_jax.layers.mamba2 import Mamba2Mixer

MIXERS: dict[str, type[Mamba2Mixer] | type[AttentionMixer]] = {
    "mamba2": Mamba2Mixer,
    "attention": AttentionMixer,
}
