"""Mamba-2 for people who work in JAX: PyTorch checkpoints in, the same numbers out, generation inside `jit`.

>>> import jax.numpy as jnp
>>> from mamba2_jax import Mamba2ForCausalLM, generate, load_tokenizer
>>> model = Mamba2ForCausalLM.from_pretrained()  # the small Python-writing model inside the package
>>> tokenizer = load_tokenizer()
>>> ids = jnp.array([tokenizer.encode("def main():")])
>>> new = generate(model, ids, max_new_tokens=8)
>>> text = tokenizer.decode(new.tokens[0])
"""

from mamba2_jax.cache import Mamba2Cache
from mamba2_jax.config import Mamba2Config
from mamba2_jax.generation import GenerateOutput, generate
from mamba2_jax.model import Mamba2CausalLMOutput, Mamba2ForCausalLM, Mamba2Model, Mamba2Output
from mamba2_jax.streaming import stream
from mamba2_jax.tokenizer import load_tokenizer

__all__ = [
    "GenerateOutput",
    "Mamba2Cache",
    "Mamba2CausalLMOutput",
    "Mamba2Config",
    "Mamba2ForCausalLM",
    "Mamba2Model",
    "Mamba2Output",
    "generate",
    "load_tokenizer",
    "stream",
]
