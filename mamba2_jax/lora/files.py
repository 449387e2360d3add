"""Adapter files in PEFT's format: `adapter_config.json` and `adapter_model.safetensors`."""

import json
import os
import pathlib
import tempfile
import warnings

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors.numpy import save_file

from mamba2_jax.hub import resolve_folder
from mamba2_jax.layers.adaptable import Adapter
from mamba2_jax.lora.attach import Site, adapter_names, attach, sites_of, weights_of
from mamba2_jax.lora.peft import (
    PREFIX,
    REFUSED_BY_PEFT,
    REFUSING_FAMILIES,
    factor_shapes,
    from_peft,
    is_targeted,
    peft_config,
    read_peft_config,
    to_peft,
)
from mamba2_jax.lora.settings import LoraConfig
from mamba2_jax.lora.targets import Target
from mamba2_jax.processes import is_first, meet
from mamba2_jax.typing import DTypeLike
from mamba2_jax.weights.files import CheckpointError, show
from mamba2_jax.weights.folder import locked
from mamba2_jax.weights.header import FLOAT_DTYPES
from mamba2_jax.weights.reader import Checkpoint, open_file

CONFIG_NAME = "adapter_config.json"
TENSORS_NAME = "adapter_model.safetensors"
PICKLE_NAME = "adapter_model.bin"  # from older versions of PEFT; never written, read as plain tensors only
_BASE_KEYS = ("base_layer.weight", "weight")
_KEYS = ("lora_A.weight", "lora_B.weight", "lora_embedding_A", "lora_embedding_B", *_BASE_KEYS)


def save_lora(
    model: nnx.Module, folder: str | os.PathLike[str], *, name: str = "default", base_model: str | None = None
) -> None:
    """Write one adapter without the base weights, in files that `load_lora` and PEFT read.

    Warns if the adapter targets `out_proj` or `conv1d`: PEFT refuses adapters of Mamba-2 there.

    Args:
        model: a model with adapters.
        folder: created if it does not exist; an adapter in it is replaced.
        name: name of the adapter.
        base_model: folder or hub id of the base model, recorded in the config for PEFT.

    Raises:
        ValueError: the model has no adapter of this name, or `folder` is a file.
    """
    folder = pathlib.Path(folder)
    if name not in adapter_names(model):
        raise ValueError(f"save_lora: no adapter {name!r}; the model has {adapter_names(model)}")
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"save_lora: {folder} is a file; want a folder")
    whole = hasattr(model, "backbone")
    sites = {site.target.file_name(whole): site for site in sites_of(model).values()}
    adapters = {
        path: adapters[name] for path, site in sites.items() if name in (adapters := site.module.lora or {})
    }
    tensors = {
        f"{PREFIX}{path}.{key}": array
        for path, adapter in adapters.items()
        for key, array in to_peft(sites[path].target, adapter).items()
    }
    config = peft_config(adapters, sites, base_model, "CAUSAL_LM" if whole else "FEATURE_EXTRACTION")
    if is_first():
        _write(folder, tensors, config)
    meet("mamba2_jax: an adapter is written")
    refused = sorted({path.rpartition(".")[2] for path in adapters} & REFUSED_BY_PEFT)
    if refused and getattr(model, "config").family in REFUSING_FAMILIES:  # noqa: B009
        warnings.warn(
            f"save_lora: PEFT takes no adapter on {' and '.join(refused)} of this model, so only load_lora"
            f" reads {folder}; for transformers, merge_lora and save the model",
            stacklevel=2,
        )


def _write(folder: pathlib.Path, tensors: dict[str, np.ndarray], config: dict) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".saving-") as part:  # a crash leaves the old files
        save_file(tensors, f"{part}/{TENSORS_NAME}", metadata={"format": "pt"})
        pathlib.Path(part, CONFIG_NAME).write_text(json.dumps(config, indent=2) + "\n")
        with locked(folder):  # so that no tensors of one writer get the config of another
            for file in (TENSORS_NAME, CONFIG_NAME):
                os.replace(f"{part}/{file}", folder / file)


def load_lora(
    model: nnx.Module,
    path: str | os.PathLike[str],
    *,
    name: str = "default",
    param_dtype: DTypeLike | None = None,
    revision: str | None = None,
) -> None:
    """Load an adapter written by `save_lora` or PEFT, and make it the only one in use.

    All files are checked against the model before the model changes.

    Args:
        model: Mamba2ForCausalLM or Mamba2Model.
        path: a folder or a hub id.
        name: name for the adapter in this model.
        param_dtype: dtype of the adapter; None keeps the stored dtype.
        revision: branch, tag or commit of a hub id.

    Raises:
        FileNotFoundError: no such folder, or a hub id that cannot be reached.
        CheckpointError: files that are damaged, need an unsupported feature (DoRA, trained biases, ...), or
            do not match the model; the message lists every problem.
        ValueError: a name in use.
    """
    path = path if isinstance(path, str) else pathlib.Path(path)
    folder = resolve_folder(path, revision, [CONFIG_NAME, "adapter_model.*"])
    settings, pattern = read_peft_config(folder, CONFIG_NAME)
    older = not (folder / TENSORS_NAME).exists() and (folder / PICKLE_NAME).exists()
    file = PICKLE_NAME if older else TENSORS_NAME
    sites = sites_of(model)
    with open_file(folder, file) as checkpoint:
        found, problems = _group(checkpoint, sites)
        for module, site in sites.items():
            theirs = site.target.file_name()
            targeted = is_targeted(site.target.file_names(), settings, pattern)
            if targeted and not _factors(found.get(module, {})):
                problems.append(f"target_modules names {theirs}, but the file has no tensor of it")
        for module, tensors in found.items():
            target = sites[module].target
            if _factors(tensors) and not is_targeted(target.file_names(), settings, pattern):
                problems.append(f"target_modules does not name {target.file_name()}, which has tensors here")
            problems += _check_shapes(checkpoint, target, tensors, settings.rank_of(target.file_name()))
        if problems:
            raise CheckpointError(folder / file, problems)
        adapters = {}
        for module, tensors in found.items():
            problems += _check_base(checkpoint, model, sites[module], tensors)
            if _factors(tensors):
                adapters[module], more = _read(
                    checkpoint, sites[module].target, tensors, settings, param_dtype
                )
                problems += more
    if problems:
        raise CheckpointError(folder / file, problems)
    attach(model, name, adapters, "load_lora")


def _group(checkpoint: Checkpoint, sites: dict[str, Site]) -> tuple[dict[str, dict[str, str]], list[str]]:
    """Group stored tensor names as module -> key below the module -> stored name; also return problems."""
    found: dict[str, dict[str, str]] = {}
    problems = []
    paths = {name: path for path, site in sites.items() for name in site.target.file_names()}
    for stored in checkpoint.tensors:
        ending = next((key for key in _KEYS if stored.endswith(f".{key}")), "")
        inner = stored.removeprefix(PREFIX).removesuffix(f".{ending}")
        module = paths.get(inner)
        if module is None or not ending or not stored.startswith(PREFIX):
            problems.append(f"tensor {show(stored)} belongs to no module of this model that takes an adapter")
        elif ending in found.setdefault(module, {}):
            problems.append(f"tensor {show(stored)} repeats {show(found[module][ending])}")
        else:
            found[module][ending] = stored
    return found, problems


def _factors(tensors: dict[str, str]) -> set[str]:
    return tensors.keys() - set(_BASE_KEYS)


def _check_shapes(checkpoint: Checkpoint, target: Target, tensors: dict[str, str], rank: int) -> list[str]:
    """Check that both factors exist, with the config's rank and the model's shapes; return problems."""
    if not _factors(tensors):
        return []
    problems = []
    wanted = factor_shapes(target, rank)
    for key in wanted.keys() | _factors(tensors):
        if key not in tensors:
            problems.append(f"{target.name} has no {key}")
        elif key not in wanted:
            problems.append(f"tensor {show(tensors[key])}: {target.name} has {' and '.join(wanted)} instead")
        else:
            info = checkpoint.tensors[tensors[key]]
            if info.shape != wanted[key]:
                shapes = f"has shape {info.shape}, the model at rank {rank} wants {wanted[key]}"
                problems.append(f"tensor {show(info.name)} {shapes}")
            if info.dtype not in FLOAT_DTYPES:
                problems.append(f"tensor {show(info.name)} is {info.dtype}, want {', '.join(FLOAT_DTYPES)}")
    return sorted(problems)


def _check_base(checkpoint: Checkpoint, model: nnx.Module, site: Site, tensors: dict[str, str]) -> list[str]:
    """Check that base weights in the file (of an adapted embedding or head) equal this model's."""
    for key in _BASE_KEYS:
        if key not in tensors:
            continue
        info = checkpoint.tensors[tensors[key]]
        weights = [np.asarray(weight) for _, weight in weights_of(model, site)]
        same = (
            len(weights) == 1
            and info.dtype in FLOAT_DTYPES
            and info.shape == weights[0].shape
            and np.array_equal(checkpoint.read(info.name).astype(weights[0].dtype), weights[0])
        )
        if not same:
            message = "is a base weight, but not this model's: the adapter has another base or trained it"
            return [f"tensor {show(info.name)} {message}; merge the adapter with PEFT and load the result"]
    return []


def _read(
    checkpoint: Checkpoint,
    target: Target,
    tensors: dict[str, str],
    settings: LoraConfig,
    param_dtype: DTypeLike | None,
) -> tuple[Adapter, list[str]]:
    """Read one module's adapter; also return problems such as non-finite values."""
    A, B = (
        checkpoint.read(tensors[key]) for key in factor_shapes(target, settings.rank_of(target.file_name()))
    )
    problems = [
        f"{target.name} has NaN or infinite values in its adapter"
        for factor in (A, B)
        if not np.isfinite(factor.astype(np.float64)).all()
    ][:1]
    dtype = jax.dtypes.canonicalize_dtype(A.dtype if param_dtype is None else param_dtype)
    A, parts = from_peft(target, A, B)
    adapter = Adapter(
        jnp.asarray(A.astype(dtype)),
        {leaf: jnp.asarray(part.astype(dtype)) for leaf, part in parts.items()},
        alpha=settings.alpha_of(target.file_name()),
        use_rslora=settings.use_rslora,
        dropout=settings.dropout,
    )
    return adapter, problems
