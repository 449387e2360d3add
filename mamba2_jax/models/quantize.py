"""Quantize the weights of a model in memory, and make them floats again."""

from collections.abc import Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from mamba2_jax.config.quantization import SCALES, VALUES, check_quantize, type_for
from mamba2_jax.config.table import role_of
from mamba2_jax.lora.attach import refuse_merged, sites_of
from mamba2_jax.lora.full import full_weights, parameter_at
from mamba2_jax.models.calibrate import Matrix, quantize_with_text
from mamba2_jax.models.vocabulary import set_config
from mamba2_jax.ops.quantized import QuantizedWeight
from mamba2_jax.typing import Array, DTypeLike
from mamba2_jax.weight_types import TypeName, WeightType
from mamba2_jax.weights import checkpoint_table

if TYPE_CHECKING:
    from mamba2_jax.models.pretrained import PretrainedModel


def quantize_model(model: "PretrainedModel", kind: TypeName, calibration: Any = None) -> None:
    """Quantize a model in place, matrix by matrix; `PretrainedModel.quantize` describes the arguments."""
    op = f"{type(model).__name__}.quantize"
    if check_quantize(op, kind, model.config) is None:
        return
    refuse_merged(op, sites_of(model))
    if full_weights(model):
        raise ValueError(f"{op}: an adapter replaces whole weights (modules_to_save); remove_lora it first")
    if calibration is not None:
        projections: dict[int, list[Matrix]] = {}
        for matrix in _matrices(model, kind):
            if matrix.leaf.role.is_matrix:
                module = parameter_at(model, matrix.leaf.path.rpartition(".")[0])
                projections.setdefault(id(module), []).append(matrix)
        quantize_with_text(op, model, calibration, projections)
    for leaf, parameter, own in _matrices(model, kind):
        if not isinstance(parameter[...], QuantizedWeight):
            parameter.set_value(_quantized(parameter[...], own, leaf.role.rows_last))
    _finish(model, kind)


def dequantize_model(model: "PretrainedModel", dtype: DTypeLike) -> None:
    """Make the weights of a model floats in place, matrix by matrix."""
    if model.config.quantization is None:
        return
    for _, parameter, _ in _matrices(model, model.config.quantization):
        parameter.set_value(_floats(parameter[...], dtype=jnp.dtype(dtype)))
    _finish(model, None)


def quantized_weight(path: str, arrays: Mapping[str, Array]) -> QuantizedWeight:
    """Make the quantized weight at a path of its arrays by path."""
    role = role_of(path)
    return QuantizedWeight(arrays[path + VALUES], arrays[path + SCALES], role is not None and role.rows_last)


def _matrices(model: Any, quantization: TypeName) -> Iterator[Matrix]:
    """Yield the matrices that a model of a type has quantized, with their parameters and types."""
    for stored in checkpoint_table(model.config.replace(quantization=None), hasattr(model, "backbone")):
        own = type_for(stored, quantization)
        if own is not None:
            for leaf in stored.leaves:
                yield Matrix(leaf, parameter_at(model, leaf.path), own)


def _finish(model: "PretrainedModel", quantization: TypeName | None) -> None:
    set_config(model, model.config.replace(quantization=quantization))
    mesh = getattr(model, "backbone", model).mesh  # pyright: ignore[reportAttributeAccessIssue]
    if mesh is not None:
        model.to_mesh(mesh)


@partial(jax.jit, static_argnames=("own", "rows_last"))
def _quantized(matrix: Array, own: WeightType, rows_last: bool) -> QuantizedWeight:
    rows = jnp.moveaxis(matrix, 0, -1) if rows_last else matrix
    return QuantizedWeight(*own.quantize(rows), rows_last)


@partial(jax.jit, static_argnames="dtype")
def _floats(weight: QuantizedWeight, dtype: DTypeLike) -> Array:
    return weight.astype(dtype)
