"""What a model looks like: `Mamba2Config`, the published forms of config files, and the checks of both."""

from mamba2_jax.config.attention import AttentionConfig
from mamba2_jax.config.mamba2 import Mamba2Config

__all__ = ["AttentionConfig", "Mamba2Config"]
