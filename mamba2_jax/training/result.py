"""Saving the result of a run: a checkpoint in transformers' form, or an adapter in PEFT's format."""

import pathlib
import tempfile
import warnings
from collections.abc import Callable
from typing import Any

from mamba2_jax.lora import merge_lora, save_lora, unmerge_lora
from mamba2_jax.lora.attach import adapter_names
from mamba2_jax.models.mamba2 import Mamba2ForCausalLM

MODEL_FOLDER = "model"
ADAPTER_FOLDER = "adapter"


def save_result(
    model: Mamba2ForCausalLM,
    output: pathlib.Path,
    tokenizer: Any,
    merge: bool,
    report: Callable[[str], None],
) -> None:
    """Write the trained model to `output/model`, or its adapter to `output/adapter`.

    Args:
        model: the trained model.
        output: folder of the run.
        tokenizer: saved too if the source checkpoint of the model has no tokenizer.
        merge: with an adapter, also write the model with the adapter merged into its weights.
        report: called with messages: the paths written, and warnings about PEFT.
    """
    adapters = adapter_names(model)
    if len(adapters) == 1:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", UserWarning)
            origin = None if model.origin is None else str(model.origin.folder)
            save_lora(model, output / ADAPTER_FOLDER, name=adapters[0], base_model=origin)
        for warning in caught:
            report(f"note: {warning.message}")
        report(f"adapter: {output / ADAPTER_FOLDER}")
        if not merge:
            return
        merge_lora(model)
    folder = output / MODEL_FOLDER
    with tempfile.TemporaryDirectory() as own:
        if tokenizer is not None and not (model.origin and any(model.origin.folder.glob("tokenizer*"))):
            tokenizer.save_pretrained(own)
        model.save_pretrained(folder, tokenizer=own if any(pathlib.Path(own).iterdir()) else None)
    if adapters:
        unmerge_lora(model)
    report(f"model: {folder}")
