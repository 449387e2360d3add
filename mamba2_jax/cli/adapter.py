"""Load a model with an adapter, and name folders that hold something other than a model."""

import pathlib
from collections.abc import Callable
from typing import Any

from mamba2_jax.lora import base_of, is_adapter, load_lora
from mamba2_jax.models.mamba2 import Mamba2ForCausalLM
from mamba2_jax.training.folder import ADAPTER, MODEL, find_run


def base_folder(model: str | None, adapter: str | None) -> str | None:
    """Return the folder or hub id of the model to load: `model`, else the one that the adapter names."""
    if model is not None or adapter is None:
        return model
    base = base_of(adapter)
    if base is None:
        raise ValueError(f"{adapter}: does not say which model it is for; name the model too")
    return base


def load_with_adapter(
    model: str | None, adapter: str, tell: Callable[[Any], None], **options: Any
) -> Mamba2ForCausalLM:
    """Load a model, `None` for the base that the adapter names, and the adapter onto it.

    Args:
        model: folder or hub id.
        adapter: folder or hub id of the adapter.
        tell: receives messages for the user.
        **options: options of `from_pretrained`.
    """
    loaded = Mamba2ForCausalLM.from_pretrained(base_folder(model, adapter), report=tell, **options)
    load_lora(loaded, adapter)
    tell(f"adapter: {adapter}")
    return loaded


def refuse_other_folders(folder: pathlib.Path) -> None:
    """Raise ValueError if a folder holds an adapter or a training run, not a model."""
    if is_adapter(folder):
        base = base_of(folder)
        raise ValueError(
            f"{folder}: this is an adapter{f' for {base}' if base else ''}, not a model; give it as --adapter"
        )
    run = find_run(folder)
    if run is not None:
        results = [f"--model {run / MODEL}"] if (run / MODEL).is_dir() else []
        results += [f"--adapter {run / ADAPTER}"] if (run / ADAPTER).is_dir() else []
        raise ValueError(
            f"{folder}: this is a training run, not a model; give {' or '.join(results) or 'its result'}, or "
            f"write one of its checkpoints with mamba2-jax convert {folder} OUT"
        )
