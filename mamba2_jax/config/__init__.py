"""Model configuration: `Mamba2Config`, readers and writers of the published forms, and field checks."""

from mamba2_jax.config.attention import AttentionConfig
from mamba2_jax.config.experts import ExpertsConfig
from mamba2_jax.config.mamba2 import Mamba2Config
from mamba2_jax.config.mlp import MLPConfig, Multipliers

__all__ = ["AttentionConfig", "ExpertsConfig", "MLPConfig", "Mamba2Config", "Multipliers"]
