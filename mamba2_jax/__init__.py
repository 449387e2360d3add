"""Mamba-2 in JAX: load PyTorch checkpoints, reproduce their numbers, and generate text inside `jit`.

>>> import jax.numpy as jnp
>>> from mamba2_jax import Mamba2ForCausalLM, generate, load_tokenizer
>>> model = Mamba2ForCausalLM.from_pretrained()  # the small Python-writing model inside the package
>>> tokenizer = load_tokenizer()
>>> ids = jnp.array([tokenizer.encode("def main():")])
>>> new = generate(model, ids, max_new_tokens=8)
>>> text = tokenizer.decode(new.tokens[0])
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mamba2_jax.config import Mamba2Config
    from mamba2_jax.generation import GenerateOutput, generate
    from mamba2_jax.generation.streaming import stream
    from mamba2_jax.layers import Mamba2Block, Mamba2Mixer
    from mamba2_jax.models.cache import Mamba2Cache
    from mamba2_jax.models.classification import Mamba2ClassifierOutput, Mamba2ForSequenceClassification
    from mamba2_jax.models.inspection import MixerValues, inspect
    from mamba2_jax.models.mamba2 import Mamba2CausalLMOutput, Mamba2ForCausalLM, Mamba2Model, Mamba2Output
    from mamba2_jax.models.pooling import embed
    from mamba2_jax.tokenizer import load_tokenizer

__all__ = [
    "GenerateOutput",
    "Mamba2Block",
    "Mamba2Cache",
    "Mamba2CausalLMOutput",
    "Mamba2ClassifierOutput",
    "Mamba2Config",
    "Mamba2ForCausalLM",
    "Mamba2ForSequenceClassification",
    "Mamba2Mixer",
    "Mamba2Model",
    "Mamba2Output",
    "MixerValues",
    "embed",
    "generate",
    "inspect",
    "load_tokenizer",
    "stream",
]

_MODULES = {
    "config.mamba2": ("Mamba2Config",),
    "generation.decoding": ("GenerateOutput", "generate"),
    "generation.streaming": ("stream",),
    "layers.block": ("Mamba2Block",),
    "layers.mamba2": ("Mamba2Mixer",),
    "models.cache": ("Mamba2Cache",),
    "models.classification": ("Mamba2ClassifierOutput", "Mamba2ForSequenceClassification"),
    "models.inspection": ("MixerValues", "inspect"),
    "models.pooling": ("embed",),
    "models.mamba2": ("Mamba2CausalLMOutput", "Mamba2ForCausalLM", "Mamba2Model", "Mamba2Output"),
    "tokenizer": ("load_tokenizer",),
}
_HOMES = {name: module for module, names in _MODULES.items() for name in names}


_SUBPACKAGES = frozenset(
    ("config", "evaluation", "layers", "lora", "models", "ops", "sharding", "training", "weights")
)


def __getattr__(name: str) -> Any:
    # Lazy imports: `mamba2-jax --help` must not wait for JAX.
    if name in _SUBPACKAGES:
        return importlib.import_module(f"{__name__}.{name}")
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_SUBPACKAGES})
