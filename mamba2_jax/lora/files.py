"""Adapter files in PEFT's format: `adapter_config.json` and `adapter_model.safetensors`."""

import json
import os
import pathlib
import tempfile
import warnings
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors.numpy import save_file

from mamba2_jax.hub import resolve_folder
from mamba2_jax.layers.adaptable import Adapter
from mamba2_jax.lora.attach import Site, adapter_names, attach, sites_of, weights_of
from mamba2_jax.lora.full import adapter_values, full_weights, leaves_of, match_full, new_full_weights
from mamba2_jax.lora.peft import (
    MAGNITUDE,
    PREFIX,
    REFUSED_BY_PEFT,
    factor_shapes,
    from_peft,
    is_targeted,
    magnitude_from_peft,
    peft_config,
    read_peft_config,
    to_peft,
)
from mamba2_jax.lora.settings import LoraConfig
from mamba2_jax.lora.targets import Target
from mamba2_jax.processes import fetch, is_first, meet
from mamba2_jax.typing import Array, DTypeLike
from mamba2_jax.weights.files import CheckpointError, show
from mamba2_jax.weights.header import FLOAT_DTYPES
from mamba2_jax.weights.reader import Checkpoint, open_file
from mamba2_jax.weights.table import StoredTensor, assemble

CONFIG_NAME = "adapter_config.json"
TENSORS_NAME = "adapter_model.safetensors"
PICKLE_NAME = "adapter_model.bin"  # from older versions of PEFT; never written, read as plain tensors only
_NO_MODULES = ("A_log", "D", "dt_bias")  # parameters of a mixer; PEFT trains modules
_BASE_KEYS = ("base_layer.weight", "weight")
_KEYS = ("lora_A.weight", "lora_B.weight", "lora_embedding_A", "lora_embedding_B", MAGNITUDE, *_BASE_KEYS)


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
    sites = {
        path if whole else path.removeprefix("backbone."): site for path, site in sites_of(model).items()
    }
    adapters = {
        path: adapters[name] for path, site in sites.items() if name in (adapters := site.module.lora or {})
    }
    tensors = {
        f"{PREFIX}{path}.{key}": array
        for path, adapter in adapters.items()
        for key, array in to_peft(sites[path].target, adapter).items()
    }
    full = full_weights(model).get(name)
    saved = () if full is None else full.names
    if full is not None:
        values = {path: fetch(array) for path, array in adapter_values(model, full).items()}
        for stored in match_full("save_lora", model, saved):
            inner = stored.name if whole else stored.name.removeprefix("backbone.")
            tensors[f"{PREFIX}{inner}"] = assemble(stored, values)
    task = "CAUSAL_LM" if whole else "FEATURE_EXTRACTION"
    config = peft_config(adapters, sites, base_model, task, saved)
    if is_first():
        _write(folder, tensors, config)
    meet("mamba2_jax: an adapter is written")
    refused = sorted({path.rpartition(".")[2] for path in adapters} & REFUSED_BY_PEFT)
    refused += [name for name in saved if name in _NO_MODULES]
    if refused:
        warnings.warn(
            f"save_lora: PEFT takes no adapter on {' and '.join(refused)} of Mamba-2, so only load_lora reads"
            f" {folder}; for transformers, merge_lora and save the model",
            stacklevel=2,
        )


def _write(folder: pathlib.Path, tensors: dict[str, np.ndarray], config: dict) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".saving-") as part:  # a crash leaves the old files
        save_file(tensors, f"{part}/{TENSORS_NAME}", metadata={"format": "pt"})
        pathlib.Path(part, CONFIG_NAME).write_text(json.dumps(config, indent=2) + "\n")
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
        saved, problems = _find_full(checkpoint, model, settings.modules_to_save)
        others = [name for name in checkpoint.tensors if name not in saved.values()]
        found, more = _group(others, sites)
        problems += more
        for module in sites:
            if is_targeted(module, settings, pattern) and not _factors(found.get(module, {})):
                problems.append(f"target_modules names {module}, but the file has no tensor of it")
        for module, tensors in found.items():
            rank = settings.rank_of(module)
            problems += _check_shapes(checkpoint, sites[module].target, tensors, rank, settings.use_dora)
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
        values, more = _read_full(checkpoint, saved, param_dtype)
        problems += more
    if problems:
        raise CheckpointError(folder / file, problems)
    full = new_full_weights(model, settings.modules_to_save, list(saved), values) if saved else None
    attach(model, name, adapters, "load_lora", full)


def _find_full(
    checkpoint: Checkpoint, model: nnx.Module, names: Sequence[str]
) -> tuple[dict[StoredTensor, str], list[str]]:
    """Find the stored name of each tensor of `modules_to_save`; also return problems."""
    saved, problems = {}, []
    try:
        wanted = match_full("load_lora", model, names)
    except ValueError as error:
        return {}, [str(error)]
    for stored in wanted:
        possible = [f"{PREFIX}{name}" for name in (stored.name, stored.name.removeprefix("backbone."))]
        name = next((name for name in possible if name in checkpoint.tensors), None)
        if name is None:
            problems.append(f"modules_to_save names {stored.name}, but the file has no tensor of it")
            continue
        saved[stored] = name
        info = checkpoint.tensors[name]
        if info.shape != stored.shape:
            problems.append(f"tensor {show(name)} has shape {info.shape}, the model wants {stored.shape}")
        if info.dtype not in FLOAT_DTYPES:
            problems.append(f"tensor {show(name)} is {info.dtype}, want {', '.join(FLOAT_DTYPES)}")
    return saved, problems


def _read_full(
    checkpoint: Checkpoint, saved: dict[StoredTensor, str], param_dtype: DTypeLike | None
) -> tuple[dict[str, Array], list[str]]:
    """Read the tensors of `modules_to_save`, by parameter path; also return problems."""
    values, problems = {}, []
    for stored, name in saved.items():
        tensor = checkpoint.read(name)
        if not np.isfinite(tensor.astype(np.float64)).all():
            problems.append(f"tensor {show(name)} has NaN or infinite values")
        dtype = jax.dtypes.canonicalize_dtype(tensor.dtype if param_dtype is None else param_dtype)
        values |= leaves_of(stored, tensor.astype(dtype))
    return values, problems


def _group(names: list[str], sites: dict[str, Site]) -> tuple[dict[str, dict[str, str]], list[str]]:
    """Group stored tensor names as module -> key below the module -> stored name; also return problems."""
    found: dict[str, dict[str, str]] = {}
    problems = []
    for stored in names:
        ending = next((key for key in _KEYS if stored.endswith(f".{key}")), "")
        inner = stored.removeprefix(PREFIX).removesuffix(f".{ending}")
        module = next((path for path in (inner, f"backbone.{inner}") if path in sites), None)
        if module is None or not ending or not stored.startswith(PREFIX):
            problems.append(f"tensor {show(stored)} belongs to no module of this model that takes an adapter")
        elif ending in found.setdefault(module, {}):
            problems.append(f"tensor {show(stored)} repeats {show(found[module][ending])}")
        else:
            found[module][ending] = stored
    return found, problems


def _factors(tensors: dict[str, str]) -> set[str]:
    return tensors.keys() - set(_BASE_KEYS)


def _check_shapes(
    checkpoint: Checkpoint, target: Target, tensors: dict[str, str], rank: int, dora: bool
) -> list[str]:
    """Check that all factors exist, with the config's rank and the model's shapes; return problems."""
    if not _factors(tensors):
        return []
    problems = []
    wanted = factor_shapes(target, rank, dora)
    if dora and MAGNITUDE not in wanted:
        problems.append(f"use_dora is not supported on {target.name}")
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
    shapes = factor_shapes(target, settings.rank_of(target.name), settings.use_dora)
    A, B, *magnitude = (checkpoint.read(tensors[key]) for key in shapes)
    problems = [
        f"{target.name} has NaN or infinite values in its adapter"
        for factor in (A, B, *magnitude)
        if not np.isfinite(factor.astype(np.float64)).all()
    ][:1]
    dtype = jax.dtypes.canonicalize_dtype(A.dtype if param_dtype is None else param_dtype)
    A, parts = from_peft(target, A, B)
    adapter = Adapter(
        jnp.asarray(A.astype(dtype)),
        {leaf: jnp.asarray(part.astype(dtype)) for leaf, part in parts.items()},
        alpha=settings.alpha_of(target.name),
        use_rslora=settings.use_rslora,
        dropout=settings.dropout,
        magnitude={
            leaf: jnp.asarray(part.astype(dtype))
            for vector in magnitude
            for leaf, part in magnitude_from_peft(target, vector).items()
        }
        or None,
    )
    return adapter, problems
