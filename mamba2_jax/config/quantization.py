"""The tensors and leaves of quantized weights: values and scales in place of a matrix.

Both have the matrix's name with a suffix, `...out_proj.weight.values` and `...out_proj.weight.scales`, and
the input axis last, in files and in the model, so that a row of one output channel is contiguous in memory.
"""

import dataclasses
import math
from typing import TYPE_CHECKING

from mamba2_jax.config.leaves import OUTPUT_HEAD, QUANTIZED, Leaf, StoredTensor
from mamba2_jax.weight_types import WEIGHT_TYPES, TypeName, WeightType

if TYPE_CHECKING:
    from mamba2_jax.config.mamba2 import Mamba2Config

VALUES, SCALES = ".values", ".scales"


def type_for(stored: StoredTensor, quantization: TypeName | None) -> WeightType | None:
    """Return the type that a tensor has in a model of the given type; None: it holds floats."""
    role = stored.leaves[0].role if stored.leaves else OUTPUT_HEAD  # a head in the files only
    if quantization is None or not role.quantized:
        return None
    own = WEIGHT_TYPES[quantization]
    return WEIGHT_TYPES[own.of_tables] if role.quantized == "table" else own


def check_quantize(op: str, quantize: TypeName | None, config: "Mamba2Config") -> TypeName | None:
    """Return the type to quantize the weights of a model to; None if they are to stay as they are.

    Raises:
        ValueError: an unknown type, or weights that are quantized in another one.
    """
    if quantize is None or quantize == config.quantization:
        return None
    if quantize not in WEIGHT_TYPES:
        raise ValueError(f"{op}: quantize={quantize!r} is not one of {', '.join(map(repr, WEIGHT_TYPES))}")
    if config.quantization is not None:
        raise ValueError(
            f"{op}: quantize={quantize!r}, but the weights are {config.quantization} already; quantize the "
            "floats that they were made from"
        )
    return quantize


def quantized_tensors(stored: StoredTensor, quantization: TypeName | None) -> tuple[StoredTensor, ...]:
    """Return what a tensor is stored as in a model of the given type: itself, or its values and scales.

    Raises:
        ValueError: the type's groups do not divide the rows of the tensor.
    """
    kind = type_for(stored, quantization)
    if kind is None:
        return (stored,)
    width = stored.shape[-1]
    try:
        groups = kind.groups(width)
    except ValueError as error:
        raise ValueError(f"{stored.name}: {error}") from None
    return (
        _tensor(stored, VALUES, width // kind.per_value, groups if kind.group else 0, kind.stored),
        _tensor(stored, SCALES, groups, groups, "F32"),
    )


def _tensor(stored: StoredTensor, suffix: str, columns: int, groups: int, dtype: str) -> StoredTensor:
    """Return a tensor of `columns` numbers per row; its input axis is cut between `groups`, 0: anywhere."""
    return dataclasses.replace(
        stored,
        name=stored.name + suffix,
        shape=(*stored.shape[:-1], columns),
        leaves=tuple(_leaf(leaf, suffix, columns, groups) for leaf in stored.leaves),
        file_name=(stored.file_name or stored.name) + suffix,
        dtype=dtype,
    )


def _leaf(leaf: Leaf, suffix: str, columns: int, groups: int) -> Leaf:
    at = 0 if leaf.role.rows_last else len(leaf.axes) - 1  # the input axis

    def moved(entries: tuple, last) -> tuple:
        return (*entries[:at], *entries[at + 1 :], last)

    axis, units = leaf.axes[at], leaf.units[at]
    if groups == 1:
        axis, units = "1", 1
    elif groups:
        units = math.gcd(units, groups)
    return dataclasses.replace(
        leaf,
        path=leaf.path + suffix,
        axes=moved(leaf.axes, axis),
        units=moved(leaf.units, units),
        shape=moved(leaf.shape, columns),
        role=QUANTIZED,
    )
