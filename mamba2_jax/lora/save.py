"""Write adapter files in PEFT's format: `adapter_config.json` and `adapter_model.safetensors`."""

import json
import os
import pathlib
import tempfile
import warnings

import numpy as np
from flax import nnx

from mamba2_jax.files import refuse_remote
from mamba2_jax.lora.attach import adapter_names, sites_of
from mamba2_jax.lora.files import CONFIG_NAME, TENSORS_NAME
from mamba2_jax.lora.full import adapter_values, full_weights, match_full
from mamba2_jax.lora.peft import PREFIX, REFUSED_BY_PEFT, REFUSING_FAMILIES, peft_config, to_peft
from mamba2_jax.processes import fetch, is_first, meet
from mamba2_jax.weights.folder import locked
from mamba2_jax.weights.safetensors_file import write_arrays
from mamba2_jax.weights.table import assemble, written_name

_NO_MODULES = ("A_log", "D", "dt_bias")  # parameters of a mixer; PEFT trains modules


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
    refuse_remote(folder)
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
    full = full_weights(model).get(name)
    saved = () if full is None else full.names
    if full is not None:
        values = {path: fetch(array) for path, array in adapter_values(model, full).items()}
        for stored in match_full("save_lora", model, saved):
            tensors[f"{PREFIX}{written_name(stored, 'transformers', whole)}"] = assemble(stored, values)
    task = "CAUSAL_LM" if whole else "FEATURE_EXTRACTION"
    config = peft_config(adapters, sites, base_model, task, saved)
    if is_first():
        _write(folder, tensors, config)
    meet("mamba2_jax: an adapter is written")
    refused = sorted({path.rpartition(".")[2] for path in adapters} & REFUSED_BY_PEFT)
    if getattr(model, "config").family not in REFUSING_FAMILIES:  # noqa: B009
        refused = []
    refused += [name for name in saved if name in _NO_MODULES]
    if refused:
        warnings.warn(
            f"save_lora: PEFT takes no adapter on {' and '.join(refused)} of this model, so only load_lora"
            f" reads {folder}; for transformers, merge_lora and save the model",
            stacklevel=2,
        )


def _write(folder: pathlib.Path, tensors: dict[str, np.ndarray], config: dict) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".saving-") as part:  # a crash leaves the old files
        write_arrays(pathlib.Path(part, TENSORS_NAME), tensors, {"format": "pt"})
        pathlib.Path(part, CONFIG_NAME).write_text(json.dumps(config, indent=2) + "\n")
        with locked(folder):  # so that no tensors of one writer get the config of another
            for file in (TENSORS_NAME, CONFIG_NAME):
                os.replace(f"{part}/{file}", folder / file)
