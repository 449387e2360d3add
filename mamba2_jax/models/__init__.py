"""Mamba-2 models: embeddings, blocks and head; input checks, cache, loading and saving."""

from mamba2_jax.models.cache import Mamba2Cache
from mamba2_jax.models.classification import Mamba2ClassifierOutput, Mamba2ForSequenceClassification
from mamba2_jax.models.inspection import MixerValues, inspect
from mamba2_jax.models.mamba2 import Mamba2CausalLMOutput, Mamba2ForCausalLM, Mamba2Model, Mamba2Output
from mamba2_jax.models.pooling import embed

__all__ = [
    "Mamba2Cache",
    "Mamba2CausalLMOutput",
    "Mamba2ClassifierOutput",
    "Mamba2ForCausalLM",
    "Mamba2ForSequenceClassification",
    "Mamba2Model",
    "Mamba2Output",
    "MixerValues",
    "embed",
    "inspect",
]
