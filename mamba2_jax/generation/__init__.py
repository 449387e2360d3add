"""Text generation: `generate` continues whole batches inside `jit`, `stream` yields one text in chunks."""

from mamba2_jax.generation.decoding import GenerateOutput, generate
from mamba2_jax.generation.streaming import stream

__all__ = ["GenerateOutput", "generate", "stream"]
