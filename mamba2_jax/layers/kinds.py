"""The module of each kind of layer: the mixer of a block, with the state that it begins from.

The tensors of a kind stand in `mamba2_jax.config.kinds` under the same name, because files, shardings and the
number of parameters are read off them where there is no module. A mixer is made with the arguments of
`Mamba2Mixer`, and has its `empty_state`.
"""

from mamba2_jax.layers.attention import AttentionMixer
from mamba2_jax.layers.mamba2 import Mamba2Mixer

MIXERS: dict[str, type[Mamba2Mixer] | type[AttentionMixer]] = {
    "mamba2": Mamba2Mixer,
    "attention": AttentionMixer,
}
