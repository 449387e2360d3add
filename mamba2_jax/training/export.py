"""Make a model of any checkpoint of a run, as its result would have been."""

import pathlib
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from mamba2_jax.config import Mamba2Config
from mamba2_jax.lora import LoraConfig, add_lora, merge_lora
from mamba2_jax.lora.attach import adapter_names, settings_of
from mamba2_jax.models.cache import Mamba2Cache
from mamba2_jax.models.mamba2 import Mamba2ForCausalLM
from mamba2_jax.models.origin import Origin
from mamba2_jax.sharding import array_path
from mamba2_jax.training.carry import initial_cache
from mamba2_jax.training.checkpoint import read_checkpoint
from mamba2_jax.training.checksums import fingerprint
from mamba2_jax.training.folder import choose_checkpoint
from mamba2_jax.training.options import plain
from mamba2_jax.typing import DTypeLike


def describe_model(model: Mamba2ForCausalLM) -> dict[str, Any]:
    """Return, as JSON values, what `model_of` needs to rebuild a model from its trained parameters."""
    try:
        config = model.config.to_dict()
    except NotImplementedError:  # transformers has no words for it
        config = model.config.replace(quantization=None).to_state_spaces_dict()
        config |= {"quantization": model.config.quantization} if model.config.quantization else {}
    origin, names = model.origin, adapter_names(model)
    return {
        "config": config,
        "dtype": model.dtype.name,
        "adapter": plain(settings_of(model, names[0])) if len(names) == 1 else None,
        "folder": None if origin is None else str(origin.folder),
        "stored_dtypes": [] if origin is None else [list(pair) for pair in origin.stored_dtypes],
    }


def model_of(
    path: pathlib.Path, base: str | pathlib.Path | None = None, dtype: DTypeLike | None = None
) -> tuple[Mamba2ForCausalLM, float]:
    """Rebuild the model of a checkpoint; an adapter is merged into its base, dequantized if need be.

    Args:
        path: folder of one checkpoint.
        base: folder or hub id of the model that an adapter was trained on; None: where the run found it.
        dtype: dtype of the weights that an adapter changes; None: that of the base.

    Returns:
        The model, which saves in the dtypes of the model that the run began with; and the part of an
        adapter's change that rounding took away, 0 without an adapter.

    Raises:
        FileNotFoundError: the base of an adapter is not there.
        ValueError: the checkpoint is damaged, of an earlier version, or of another base.
    """
    content, params = read_checkpoint(path)
    described = content["extra"].get("model")
    if described is None:
        raise ValueError(f"{path}: an earlier version wrote it, without the config; resume the run once")
    if described["adapter"] is None:
        config = Mamba2Config.from_dict(described["config"])
        model = Mamba2ForCausalLM._from_arrays(config, params, dtype=jnp.float32)
        rounded = 0.0
    else:
        model, rounded = _with_adapter(path, params, content["extra"], base, dtype)
    if described["folder"] is not None:
        dtypes = tuple((name, dtype) for name, dtype in described["stored_dtypes"])
        model.origin = Origin(pathlib.Path(described["folder"]), dtypes)
    return model, rounded


def initial_state_of(path: str | pathlib.Path, rows: int = 1) -> Mamba2Cache:
    """Read the trained initial state of a run, to begin texts with: `generate(..., cache=...)`.

    Args:
        path: a run or one of its checkpoints, as for `choose_checkpoint`.
        rows: number of rows of the cache.

    Raises:
        FileNotFoundError: no run, or one without a checkpoint.
        ValueError: the run trained no initial state, or the checkpoint is damaged.
    """
    path, _ = choose_checkpoint(path)
    content, params = read_checkpoint(path)
    described = content["extra"]["model"]
    cache = initial_cache(params, Mamba2Config.from_dict(described["config"]), rows, described["dtype"])
    if cache is None:
        raise ValueError(f"{path}: the run trained no initial state; set train_initial_state")
    return cache


def _with_adapter(
    path: pathlib.Path, params: dict[str, Any], extra: dict[str, Any], base: Any, dtype: DTypeLike | None
) -> tuple[Mamba2ForCausalLM, float]:
    base = extra["model"]["folder"] if base is None else base
    if base is None:
        raise ValueError(f"{path}: holds an adapter of a model that was in no folder; name its base")
    quantization = extra["model"]["config"].get("quantization")
    model = Mamba2ForCausalLM.from_pretrained(base, quantize=quantization)
    if fingerprint(base_arrays(model)) != extra["run"]["base"]:
        raise ValueError(f"{base}: not the weights that the adapter in {path} was trained on")
    add_lora(model, LoraConfig(**extra["model"]["adapter"]), rngs=nnx.Rngs(0))
    parameters = nnx.state(model, nnx.Param)
    for name, leaf in nnx.to_flat_state(parameters):
        if (array := params.get(".".join(map(str, name)))) is not None:
            leaf.set_value(array)
    nnx.update(model, parameters)
    if quantization is not None:
        model.dequantize(model.backbone.norm_f.weight.dtype if dtype is None else dtype)
    return model, merge_lora(model, dtype=dtype)


def base_arrays(model: Mamba2ForCausalLM) -> dict[str, Any]:
    """Return the model's parameters without adapters, by path."""
    parameters = nnx.state(model, nnx.All(nnx.Param, nnx.Not(nnx.LoRAParam)))
    return {array_path(path): leaf for path, leaf in jax.tree.leaves_with_path(parameters)}
