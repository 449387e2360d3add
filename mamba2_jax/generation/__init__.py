"""Text from a model: `generate` whole batches inside `jit`, `stream` one text piece by piece."""

from mamba2_jax.generation.decoding import GenerateOutput, generate
from mamba2_jax.generation.streaming import stream

__all__ = ["GenerateOutput", "generate", "stream"]
