"""Model configuration: `Mamba2Config`, readers and writers of the published forms, and field checks."""

from mamba2_jax.config.attention import AttentionConfig
from mamba2_jax.config.mamba2 import Mamba2Config

__all__ = ["AttentionConfig", "Mamba2Config"]
