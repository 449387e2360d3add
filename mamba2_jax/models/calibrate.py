"""Round the weights of a model so that the outputs of its projections change least on a text (GPTQ).

Rounding to the nearest level treats all inputs of a matrix alike. GPTQ rounds one input after the other and
lets the inputs that are not yet rounded make up for the error, by the Gram matrix of the inputs on the text.
Layers are done in order, on what the rounded layers before them compute.

`qwix.contrib.gptq_core` (0.1.8) is not used, because it compiles a program per column: a first matrix of
256 x 128 takes 30 seconds of a CPU, where `quantize_by_gram` takes 1.2, and 0.28 against 0.03 when compiled.

Source: Frantar et al. 2022, arXiv:2210.17323.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mamba2_jax.config.leaves import Leaf
from mamba2_jax.layers.adaptable import Adaptable
from mamba2_jax.layers.block import Mamba2Block
from mamba2_jax.models.inputs import check_inputs
from mamba2_jax.ops.quantized import QuantizedWeight
from mamba2_jax.typing import Array, Float
from mamba2_jax.weight_types import WeightType

_COLUMNS = 128
_DAMPING = 0.01  # of the mean diagonal, as in the paper


class Matrix(NamedTuple):
    """A matrix to quantize: its leaf, its parameter in the model, and its type."""

    leaf: Leaf
    parameter: nnx.Param
    own: WeightType


def quantize_with_text(op: str, model: Any, ids: Any, matrices: Mapping[int, Sequence[Matrix]]) -> None:
    """Quantize the projections of a model's layers in place, in order.

    Args:
        op: name for messages.
        model: a model whose layers hold floats.
        ids: token ids `(b, l)`, without padding.
        matrices: by `id` of the module that holds them; those of modules that do not project stay floats.

    Raises:
        ValueError: invalid ids, or a model on a mesh.
    """
    backbone = getattr(model, "backbone", model)
    if backbone.mesh is not None:
        raise ValueError(f"{op}: calibration needs a model on one device; quantize before to_mesh")
    inputs = check_inputs(op, model.config, jnp.asarray(ids), None, None, None, None)

    def quantize_then(run: Callable, block: Mamba2Block, hidden: Array, *state: Any) -> Any:
        with observed(block) as grams:
            block.mix(hidden, *state)
        for module, gram in grams.items():
            if module in matrices:
                _round(matrices[module], gram)
        return run(block, hidden, *state)

    with backbone.on_its_device():
        backbone.forward(*inputs, wrap_block=lambda run: partial(quantize_then, run))


@contextmanager
def observed(block: nnx.Module) -> Iterator[dict[int, Float[Array, "d d"]]]:
    """Sum the Gram matrix of the inputs of each projection of a block, by the `id` of its module."""
    modules = [module for _, module in nnx.iter_modules(block) if isinstance(module, Adaptable)]
    grams: dict[int, Array] = {}

    def project(module: Adaptable, x: Array, part: str = "") -> Array:
        if id(module) not in grams:  # its other parts have the same inputs
            rows = x.reshape(-1, x.shape[-1]).astype(jnp.float32)
            grams[id(module)] = rows.T @ rows
        return type(module).project(module, x, part)

    for module in modules:
        vars(module)["project"] = partial(project, module)
    try:
        yield grams
    finally:
        for module in modules:
            del vars(module)["project"]


def _round(matrices: Sequence[Matrix], gram: Float[Array, "d d"]) -> None:
    """Quantize the matrices of one module, whose inputs have the given Gram matrix."""
    rows = [jnp.moveaxis(one.parameter[...].astype(jnp.float32), 0, -1) for one in matrices]
    joined = jnp.concatenate([one.reshape(-1, gram.shape[0]) for one in rows])
    quantized = quantize_by_gram(joined, gram, matrices[0].own)
    borders = np.cumsum([math.prod(one.shape[:-1]) for one in rows])[:-1]
    parts = [jnp.split(array, borders) for array in quantized]
    for one, matrix, values, scales in zip(rows, matrices, *parts, strict=True):
        values, scales = (array.reshape(*one.shape[:-1], -1) for array in (values, scales))
        matrix.parameter.set_value(QuantizedWeight(values, scales, True))


@partial(jax.jit, static_argnames="own")
def quantize_by_gram(
    rows: Float[Array, "o d"], gram: Float[Array, "d d"], own: WeightType
) -> tuple[Array, Array]:
    """Quantize rows so that `(rows - quantized) gram (rows - quantized).T` has a small trace.

    Args:
        rows: `(o, d)`, float32.
        gram: `(d, d)`, the sum of the outer products of inputs.
        own: type to quantize to.

    Returns:
        Values and scales, as of `WeightType.quantize`.
    """
    width, groups = rows.shape[1], own.groups(rows.shape[1])
    size = width // groups if own.group else math.gcd(width, _COLUMNS)  # columns that are rounded together
    diagonal = jnp.diag(gram)
    gram = gram + jnp.diag(jnp.where(diagonal == 0, 1.0, 0.0) + _DAMPING * diagonal.mean())
    inverse = jax.scipy.linalg.cho_solve((jnp.linalg.cholesky(gram), True), jnp.eye(width))
    factor = jnp.linalg.cholesky(inverse).T  # row i: how the later inputs make up for an error in input i
    whole = own.scales(rows[:, None])[:, 0]  # of a type with one group

    def column(i: Array, state: tuple, scale: Array, factor: Array) -> tuple:
        block, levels, errors = state
        level = own.nearest(block[:, i], scale)
        error = (block[:, i] - level * scale) / factor[i, i]
        block = block - error[:, None] * factor[i]
        return block, levels.at[:, i].set(level), errors.at[:, i].set(error)

    def step(rows: Array, at: Array) -> tuple[Array, tuple[Array, Array]]:
        block = jax.lax.dynamic_slice_in_dim(rows, at, size, 1)
        scale = own.scales(block[:, None])[:, 0] if own.group else whole
        right = jax.lax.dynamic_slice_in_dim(factor, at, size, 0)  # (size, d)
        inside = jax.lax.dynamic_slice_in_dim(right, at, size, 1)
        begin = (block, jnp.zeros_like(block), jnp.zeros_like(block))
        _, levels, errors = jax.lax.fori_loop(
            0, size, lambda i, state: column(i, state, scale, inside), begin
        )
        later = jnp.where(jnp.arange(width) >= at + size, right, 0)
        return rows - errors @ later, (levels, scale)

    _, (levels, scales) = jax.lax.scan(step, rows, jnp.arange(0, width, size))
    levels = jnp.moveaxis(levels, 0, 1).reshape(len(rows), groups, -1)
    scales = jnp.moveaxis(scales, 0, 1) if own.group else whole[:, None]
    return own.pack(levels), scales
