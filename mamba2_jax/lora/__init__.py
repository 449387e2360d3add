"""Low-rank adapters (LoRA) for projections, the convolution, the embedding and the head.

    W' = W + scale A B        scale = alpha / rank, or alpha / sqrt(rank) with use_rslora

`A` `(in, r)` and `B` `(r, out)` are small; `W` is frozen, so one base model serves many adapters. Works
without an optimizer; for training, `lora_filter` selects the trainable leaves. Files use PEFT's format. With
`use_dora`, W' also gets a trained norm per output channel; `modules_to_save` are trained in full beside it.

>>> import jax
>>> import jax.numpy as jnp
>>> from flax import nnx
>>> from mamba2_jax import Mamba2ForCausalLM, generate
>>> model = Mamba2ForCausalLM.from_pretrained()
>>> add_lora(model, LoraConfig(rank=4, targets=("in_proj", "out_proj")), rngs=nnx.Rngs(0))
>>> generate(model, jnp.array([[5, 6, 7]]), max_new_tokens=3).tokens.shape
(1, 3)
>>> trained = sum(leaf.size for leaf in jax.tree.leaves(lora_parameters(model)))
>>> trained < 0.05 * model.config.num_parameters()
True
>>> merge_lora(model)  # W becomes W'; returns what rounding took of a change that is still zero
0.0
>>> unmerge_lora(model)  # W is restored bit for bit

Source: Hu et al. 2021, arXiv:2106.09685; Kalajdzievski 2023, arXiv:2312.03732 (use_rslora).
"""

from mamba2_jax.lora.attach import (
    adapter_names,
    add_lora,
    lora_filter,
    lora_parameters,
    remove_lora,
    set_dropout_key,
    use_lora,
)
from mamba2_jax.lora.files import base_of, is_adapter, load_lora
from mamba2_jax.lora.merge import merge_lora, unmerge_lora
from mamba2_jax.lora.save import save_lora
from mamba2_jax.lora.settings import LoraConfig

__all__ = [
    "LoraConfig",
    "adapter_names",
    "add_lora",
    "base_of",
    "is_adapter",
    "load_lora",
    "lora_filter",
    "lora_parameters",
    "merge_lora",
    "remove_lora",
    "save_lora",
    "set_dropout_key",
    "unmerge_lora",
    "use_lora",
]
