"""The module of each kind in a layer.

The tensors of a kind are declared in `mamba2_jax.config.kinds` under the same name, because files, shardings
and the parameter count need them without a module. A module takes `config, dtype, param_dtype, rngs`. A mixer
also takes `ssd_implementation`, has a static method `empty_state`, and is called with the layer's state.
"""

from collections.abc import Callable

from flax import nnx

from mamba2_jax.config import Mamba2Config
from mamba2_jax.layers.attention import AttentionMixer
from mamba2_jax.layers.experts import Experts
from mamba2_jax.layers.mamba2 import Mamba2Mixer
from mamba2_jax.layers.parts import MLP, SharedExpert, residual_gain
from mamba2_jax.typing import DTypeLike

MIXERS: dict[str, type[Mamba2Mixer] | type[AttentionMixer]] = {
    "mamba2": Mamba2Mixer,
    "attention": AttentionMixer,
}
"""Modules that mix tokens, and so have a state."""


def _experts(
    config: Mamba2Config, *, dtype: DTypeLike = "float32", param_dtype: DTypeLike = "float32", rngs: nnx.Rngs
) -> Experts:
    if config.experts_cfg is None:
        raise ValueError("Experts: the config has no experts_cfg; say what they look like")
    options = {"gain": residual_gain(config), "dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
    return Experts(config.experts_cfg, config.hidden_size, **options)


MODULES: dict[str, Callable[..., nnx.Module]] = {
    **MIXERS,
    "mlp": MLP,
    "shared_expert": SharedExpert,
    "experts": _experts,
}
"""All modules."""
