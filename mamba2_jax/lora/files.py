"""Read adapter files in PEFT's format: `adapter_config.json` and `adapter_model.safetensors`."""

import os
import pathlib
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mamba2_jax.hub import resolve_folder
from mamba2_jax.layers.adaptable import Adapter
from mamba2_jax.lora.attach import Site, attach, sites_of, weights_of
from mamba2_jax.lora.full import leaves_of, match_full, new_full_weights
from mamba2_jax.lora.peft import (
    MAGNITUDE,
    PREFIX,
    factor_shapes,
    from_peft,
    is_targeted,
    magnitude_from_peft,
    read_peft_config,
)
from mamba2_jax.lora.settings import LoraConfig
from mamba2_jax.lora.targets import Target
from mamba2_jax.typing import Array, DTypeLike
from mamba2_jax.weights.files import CheckpointError, read_json_inside, show
from mamba2_jax.weights.header import FLOAT_DTYPES, TensorInfo
from mamba2_jax.weights.reader import Checkpoint, open_file
from mamba2_jax.weights.table import StoredTensor, stored_names

CONFIG_NAME = "adapter_config.json"
TENSORS_NAME = "adapter_model.safetensors"
PICKLE_NAME = "adapter_model.bin"  # from older versions of PEFT; never written, read as plain tensors only
ADAPTER_FILES = (CONFIG_NAME, "adapter_model.*")
"""Patterns of the files to download of an adapter on the hub."""
_BASE_KEYS = ("base_layer.weight", "weight")
_KEYS = ("lora_A.weight", "lora_B.weight", "lora_embedding_A", "lora_embedding_B", MAGNITUDE, *_BASE_KEYS)


def is_adapter(path: str | os.PathLike[str] | None) -> bool:
    """Return whether `path` is a folder that holds an adapter and no model."""
    folder = None if path is None else pathlib.Path(path).expanduser()
    return folder is not None and (folder / CONFIG_NAME).is_file() and not (folder / "config.json").exists()


def base_of(path: str | os.PathLike[str]) -> str | None:
    """Return the base model that an adapter's config names, if any.

    Raises:
        CheckpointError: the config cannot be read.
    """
    folder = resolve_folder(path if isinstance(path, str) else pathlib.Path(path), None, [CONFIG_NAME])
    base = read_json_inside(folder, CONFIG_NAME, "the config", 1 << 20)
    name = base.get("base_model_name_or_path")
    return name if isinstance(name, str) and name else None


def describe_adapter(folder: pathlib.Path) -> tuple[LoraConfig, list[TensorInfo]]:
    """Return the settings of the adapter in a folder and the headers of its tensors.

    Raises:
        CheckpointError: unreadable or unsupported files.
    """
    settings, _ = read_peft_config(folder, CONFIG_NAME)
    with open_file(folder, _tensors_file(folder)) as checkpoint:
        return settings, list(checkpoint.tensors.values())


def _tensors_file(folder: pathlib.Path) -> str:
    older = not (folder / TENSORS_NAME).exists() and (folder / PICKLE_NAME).exists()
    return PICKLE_NAME if older else TENSORS_NAME


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
    folder = resolve_folder(path, revision, ADAPTER_FILES)
    settings, pattern = read_peft_config(folder, CONFIG_NAME)
    file = _tensors_file(folder)
    sites = sites_of(model)
    with open_file(folder, file) as checkpoint:
        saved, problems = _find_full(checkpoint, model, settings.modules_to_save)
        others = [name for name in checkpoint.tensors if name not in saved.values()]
        found, more = _group(others, sites)
        problems += more
        for module, site in sites.items():
            theirs = site.target.file_name()
            targeted = is_targeted(site.target.file_names(), settings, pattern)
            if targeted and not _factors(found.get(module, {})):
                problems.append(f"target_modules names {theirs}, but the file has no tensor of it")
        for module, tensors in found.items():
            target = sites[module].target
            rank = settings.rank_of(target.file_name())
            if _factors(tensors) and not is_targeted(target.file_names(), settings, pattern):
                problems.append(f"target_modules does not name {target.file_name()}, which has tensors here")
            problems += _check_shapes(checkpoint, target, tensors, rank, settings.use_dora)
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
        possible = [f"{PREFIX}{name}" for name in stored_names(stored)]
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
    paths = {name: path for path, site in sites.items() for name in site.target.file_names()}
    for stored in names:
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
    if getattr(model, "config").quantization is not None:  # noqa: B009
        return []  # those of the file are not
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
    shapes = factor_shapes(target, settings.rank_of(target.file_name()), settings.use_dora)
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
        alpha=settings.alpha_of(target.file_name()),
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
