"""Merge adapters into a model's weights, and take them out again, in place."""

import math

import jax.numpy as jnp
from flax import nnx

from mamba2_jax.layers.adaptable import Adapter, BaseWeight
from mamba2_jax.lora.attach import adapters_in_use, is_tied, refuse_merged, sites_of, weights_of
from mamba2_jax.lora.full import full_weights, tie, untie
from mamba2_jax.typing import Array, DTypeLike
from mamba2_jax.weights.table import EMBEDDING, HEAD, Leaf


def merge_lora(model: nnx.Module, *, keep_base: bool = True, dtype: DTypeLike | None = None) -> float:
    """Add the adapters in use to the weights, in float32, rounded once to each weight's dtype.

    A head tied to the embedding is untied if an adapter updates either of the two.

    Args:
        model: a model with adapters.
        keep_base: keep a copy of the changed weights (as much memory as they take), so that `unmerge_lora`
            restores them bit for bit. False: drop the original weights and all adapters permanently.
        dtype: dtype of the changed weights; None keeps that of each.

    Returns:
        The part of the change that rounding took away: the norm of what is lost over the norm of the change,
        0 in float32. In bfloat16, which keeps 8 bits, changes far smaller than the weights are mostly lost.

    Raises:
        ValueError: no adapter is in use, adapters are already merged, or the weights are quantized.
    """
    sites = sites_of(model)
    refuse_merged("merge_lora", sites)
    kind = getattr(model, "config").quantization  # noqa: B009
    if kind is not None:
        raise ValueError(
            f"merge_lora: the weights are {kind}, which would lose most of the change; dequantize() the model"
            " first, or save the adapter alone (save_lora)"
        )
    if not adapters_in_use(model):
        raise ValueError("merge_lora: no adapter is in use; add_lora, load_lora or use_lora first")
    if is_tied(model) and any(
        site.module.adapters_in_use()
        for site in sites.values()
        if site.target.stored.name in (EMBEDDING, HEAD)
    ):
        _untie(model)
    lost, changed = 0.0, 0.0
    for site in sites.values():
        if adapters := site.module.adapters_in_use():
            base = {}
            for leaf, weight in weights_of(model, site):
                before = weight[...]
                base[leaf.name] = BaseWeight(before)
                exact = _merged(before, leaf, adapters)
                weight.set_value(exact.astype(before.dtype if dtype is None else dtype))
                lost += float(jnp.sum(jnp.square(weight[...].astype(exact.dtype) - exact)))
                changed += float(jnp.sum(jnp.square(exact - before.astype(exact.dtype))))
            site.module.unmerged = nnx.Dict(base)
    if not keep_base:
        for site in sites.values():
            for name in {"lora", "unmerged", "untied_by_merge"} & vars(site.module).keys():
                delattr(site.module, name)
        if full_weights(model):
            del model.full
    return math.sqrt(lost / changed) if changed else 0.0


def _merged(weight: Array, leaf: Leaf, adapters: list[Adapter]) -> Array:
    """Add adapters to one weight, in float32."""
    wide = weight.astype(jnp.promote_types(weight.dtype, jnp.float32))
    axis = leaf.role.input_axis
    merged = wide + sum(adapter.delta(leaf.name, axis) for adapter in adapters)
    for adapter in adapters:  # at most one with a magnitude, and then alone
        stretch = adapter.stretch(leaf.name, weight, axis)
        if stretch is not None:
            merged = merged * jnp.expand_dims(stretch, axis)
    return merged


def unmerge_lora(model: nnx.Module) -> None:
    """Restore the weights from before `merge_lora` bit for bit, and apply the adapters separately again.

    Raises:
        ValueError: no adapter is merged.
    """
    sites = sites_of(model)
    if not any(module.unmerged is not None for _, module in sites.values()):
        raise ValueError("unmerge_lora: no adapter is merged (keep_base=False merges for good)")
    for site in sites.values():
        if site.module.unmerged is not None:
            for leaf, weight in weights_of(model, site):
                weight.set_value(site.module.unmerged[leaf.name][...])
            del site.module.unmerged
    _tie_again(model)


def _untie(model) -> None:
    """Untie the head for a merge, until `_tie_again`."""
    untie(model)
    model.head.untied_by_merge = True


def _tie_again(model) -> None:
    """Tie the head to the embedding again if `_untie` untied it."""
    if hasattr(model, "head") and model.head.untied_by_merge:
        tie(model)
        model.head.untied_by_merge = False
