"""Locate the first non-finite tensor of a failed training step."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from mamba2_jax.training.loss import loss_fn
from mamba2_jax.training.step import Params, Structure


def first_not_finite(
    params: Params, frozen: Params, batch: Mapping[str, Any], structure: Structure
) -> str | None:
    """Return the name of the first tensor, in the order of the computation, that is not finite.

    Args:
        params: trained arrays.
        frozen: frozen arrays.
        batch: the batch of the failed step; with a leading axis of microbatches, each is checked in turn.
        structure: from `split_model`.

    Returns:
        The first tensor that holds NaN or infinity: a parameter, a block's output, the loss, or a gradient.
        None when all are finite.
    """
    parts = [batch]
    if batch["input_ids"].ndim == 3:
        parts = [
            {name: array[i] for name, array in batch.items()} for i in range(batch["input_ids"].shape[0])
        ]
    for part in parts:
        for name, finite in _finite_by_name(params, frozen, part, structure=structure):
            if not finite:
                return name
    return None


def _finite_by_name(params: Params, frozen: Params, batch, *, structure: Structure) -> list[tuple[str, bool]]:
    def look(params, frozen, batch):
        def outputs(params):
            model = structure.merge(params, frozen)
            inputs = (batch["input_ids"], batch.get("attention_mask"), batch.get("segment_ids"), None, None)
            return model.backbone.forward(*inputs, output_hidden_states=True).hidden_states

        blocks = list(outputs(params) or [])
        gradient = jax.value_and_grad(lambda params: loss_fn(structure.merge(params, frozen), batch)[0])
        loss, grads = gradient(params)
        found = [(f"parameter {name}", a) for name, a in [*params.items(), *frozen.items()]]
        found += [(f"output of backbone.layers.{i}", a) for i, a in enumerate(blocks[:-1])]
        found += [("output of backbone.norm_f", blocks[-1]), ("loss", loss)]
        found += [(f"gradient of {name}", a) for name, a in grads.items()]
        found = [(name, a) for name, a in found if jnp.issubdtype(a.dtype, jnp.inexact)]
        names[:] = [name for name, _ in found]
        return jnp.stack([jnp.isfinite(a).all() for _, a in found])

    names: list[str] = []
    finite = jax.jit(look)(params, frozen, batch)
    return list(zip(names, finite.tolist(), strict=True))
