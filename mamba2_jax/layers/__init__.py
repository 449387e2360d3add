"""Flax NNX modules of the layers: mixers, MLP and the residual block around them."""

from mamba2_jax.layers.attention import AttentionMixer
from mamba2_jax.layers.block import Mamba2Block
from mamba2_jax.layers.mamba2 import Mamba2Mixer

__all__ = ["AttentionMixer", "Mamba2Block", "Mamba2Mixer"]
