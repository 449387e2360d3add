"""Weights trained in full beside an adapter: the model holds one set at a time, its own or an adapter's.

While the adapter is in use, the model's parameters are the adapter's and `FullWeights` keeps the model's own;
otherwise the other way round. A head tied to the embedding is untied as long as either is replaced.
"""

from collections.abc import Iterable, Mapping
from functools import reduce
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from mamba2_jax.config.quantization import type_for
from mamba2_jax.layers.adaptable import BaseWeight
from mamba2_jax.lora.targets import ends_in
from mamba2_jax.typing import Array
from mamba2_jax.weights.table import EMBEDDING, HEAD, StoredTensor, as_rows, checkpoint_table, stored_names


class FullWeights(nnx.Module):
    """The set of weights that is not in the model, by parameter path.

    Args:
        names: `modules_to_save`, for the config.
        tensors: names of the stored tensors that are replaced.
        values: the adapter's values by path.
        unties: using them unties the head from the embedding.
    """

    def __init__(
        self, names: Iterable[str], tensors: Iterable[str], values: Mapping[str, Array], unties: bool
    ):
        self.names, self.tensors, self.unties = tuple(names), tuple(tensors), unties
        self.kept = nnx.Dict({path: BaseWeight(value) for path, value in values.items()})
        self.in_use = False


def full_weights(model: Any) -> Mapping[str, FullWeights]:
    """Return the model's full weights by adapter name."""
    return getattr(model, "full", None) or {}


def attach_full(model: Any, name: str, full: FullWeights) -> None:
    """Add the full weights of an adapter to the model, not in use yet."""
    if not full_weights(model):
        model.full = nnx.Dict()
    model.full[name] = full


def detach_full(model: Any, name: str) -> None:
    """Remove the full weights of an adapter; the model's own come back."""
    set_in_use(model, model.full[name], False)
    del model.full[name]
    if not model.full:
        del model.full


def match_full(op: str, model: Any, names: Iterable[str]) -> list[StoredTensor]:
    """Select the stored tensors that belong to, or are, one of the named modules and parameters.

    Raises:
        ValueError: a name matches no tensor.
    """
    whole = hasattr(model, "backbone")
    table = checkpoint_table(model.config.replace(tie_word_embeddings=False), whole)
    modules = {stored: [_module(name) for name in (stored.name, *stored_names(stored))] for stored in table}
    chosen = {}
    for name in names:
        found = [s for s, paths in modules.items() if s.leaves and any(ends_in(path, name) for path in paths)]
        if any(stored.matrices for stored in found):
            raise ValueError(
                f"{op}: modules_to_save={name!r} is a mixture of experts, which is not supported"
            )
        if not found:
            ends = {paths[0].rpartition(".")[2] for paths in modules.values()}
            raise ValueError(
                f"{op}: modules_to_save={str(name)[:120]!r} names no part of this model; it has "
                f"{', '.join(sorted(ends))}"
            )
        chosen |= {stored.name: stored for stored in found}
    return list(chosen.values())


def _module(name: str) -> str:
    return name.removesuffix(".weight").removesuffix(".bias")


def new_full_weights(
    model: Any, names: Iterable[str], tensors: list[StoredTensor], values: Mapping[str, Array] | None = None
) -> FullWeights:
    """Make full weights that begin at the model's own, in float32, or at `values` by path."""
    for stored in tensors:
        if type_for(stored, model.config.quantization) is not None:
            raise ValueError(
                f"modules_to_save: {stored.name} is quantized, and quantized weights cannot be trained; leave"
                " it out, or dequantize() the model"
            )
    if values is None:
        values = {leaf.path: _widened(model, leaf.path) for stored in tensors for leaf in stored.leaves}
    unties = _is_tied(model) and any(stored.name in (EMBEDDING, HEAD) for stored in tensors)
    return FullWeights(names, (stored.name for stored in tensors), values, unties)


def set_in_use(model: Any, full: FullWeights, used: bool) -> None:
    """Put the adapter's weights into the model, or take them out."""
    if full.in_use == used:
        return
    if used and full.unties:
        untie(model)
    for path, kept in full.kept.items():
        parameter = parameter_at(model, path)
        live = parameter[...]
        parameter.set_value(kept[...])
        kept.set_value(live)
    if not used and full.unties:
        tie(model)
    full.in_use = used


def adapter_values(model: Any, full: FullWeights) -> dict[str, Array]:
    """Return the adapter's values by path, wherever they are."""
    if not full.in_use:
        return {path: kept[...] for path, kept in full.kept.items()}
    return {path: parameter_at(model, path)[...] for path in full.kept}


def leaves_of(stored: StoredTensor, tensor: np.ndarray) -> dict[str, Array]:
    """Divide a stored tensor among its leaves, by path."""
    rows, values = tensor.reshape(tensor.shape[0], -1), {}
    for leaf in stored.leaves:
        part = np.empty(leaf.shape, tensor.dtype)
        as_rows(leaf, part)[...] = rows[slice(*leaf.rows)]
        values[leaf.path] = jnp.asarray(part)
    return values


def parameter_at(model: Any, path: str) -> Any:
    """Return the parameter, or the module, at a path of the checkpoint table."""
    if not hasattr(model, "backbone"):
        path = path.removeprefix("backbone.")
    return reduce(
        lambda at, part: at[int(part)] if part.isdecimal() else getattr(at, part), path.split("."), model
    )


def untie(model: Any) -> None:
    """Untie the head: give it a copy of the embedding as its own weight."""
    model.lm_head = nnx.data(nnx.clone(model.backbone.embeddings))
    if model.lm_head.lora is not None:
        del model.lm_head.lora
    model.config = model.backbone.config = model.config.replace(tie_word_embeddings=False)


def tie(model: Any) -> None:
    """Tie the head to the embedding; its own weight is dropped."""
    model.lm_head = None
    model.config = model.backbone.config = model.config.replace(tie_word_embeddings=True)


def _is_tied(model: Any) -> bool:
    return hasattr(model, "lm_head") and model.lm_head is None


def _widened(model: Any, path: str) -> Array:
    parameter = parameter_at(model, EMBEDDING if path == HEAD and _is_tied(model) else path)
    return jnp.array(parameter[...], jnp.promote_types(parameter.dtype, jnp.float32))
