"""Change the number of token ids of a model: rows of its embedding and head."""

from typing import TYPE_CHECKING, Any, Literal, TypeAlias, get_args

import jax
import jax.numpy as jnp
from flax import nnx

from mamba2_jax.config import Mamba2Config
from mamba2_jax.ops.checks import check_choice
from mamba2_jax.sharding import parameter_shardings

if TYPE_CHECKING:
    from mamba2_jax.models.pretrained import PretrainedModel

NewRows: TypeAlias = Literal["mean", "zeros"]


def resize_vocabulary(model: "PretrainedModel", size: int, multiple: int, new_rows: NewRows) -> None:
    """Resize a model in place; `PretrainedModel.resize_vocabulary` describes the arguments."""
    op = f"{type(model).__name__}.resize_vocabulary"
    check_choice(op, "new_rows", new_rows, get_args(NewRows))
    for name, value in (("size", size), ("multiple", multiple)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{op}: {name}={value!r}, wants a positive integer")
    padded = -(-size // multiple) * multiple
    old = model.config
    if old.quantization is not None:
        raise ValueError(f"{op}: the weights are {old.quantization}; dequantize() the model first")
    new = old.replace(vocab_size=padded, unpadded_vocab_size=size if size < padded else None)
    backbone: Any = getattr(model, "backbone", model)
    tables = {"backbone.embeddings.weight": backbone.embeddings}
    if getattr(model, "lm_head", None) is not None:
        tables["lm_head.weight"] = getattr(model, "lm_head")  # noqa: B009
    if any(module.lora for module in (*tables.values(), getattr(model, "head", None)) if module is not None):
        raise ValueError(f"{op}: embedding or head have adapters; merge_lora or remove_lora them first")
    shardings = None if backbone.mesh is None else parameter_shardings(list(tables), new, backbone.mesh)
    for path, module in tables.items():
        weight = _resized(module.weight[...], padded, old.real_vocab_size, new_rows)
        module.weight.set_value(weight if shardings is None else jax.device_put(weight, shardings[path]))
    set_config(model, new)


def set_config(model: "PretrainedModel", config: Mamba2Config) -> None:
    """Replace the config of a model in all modules that hold it."""
    old = model.config
    for _, module in nnx.iter_modules(model):
        if getattr(module, "config", None) == old:
            module.config = config  # pyright: ignore[reportAttributeAccessIssue]


def _resized(weight: jax.Array, rows: int, used: int, new_rows: NewRows) -> jax.Array:
    """Return the first `rows` rows `(rows, d)` of a table, with new ones where it has fewer."""
    missing = max(0, rows - weight.shape[0])
    mean = weight[:used].astype(jnp.float32).mean(0).astype(weight.dtype)  # (d,)
    new = jnp.zeros_like(mean) if new_rows == "zeros" else mean
    return jnp.concatenate([weight[:rows], jnp.broadcast_to(new, (missing, weight.shape[1]))])
