"""Saving the result of a run: a checkpoint in transformers' form, or an adapter in PEFT's format."""

import pathlib
import warnings
from collections.abc import Callable
from typing import Any

from mamba2_jax.files import TOKENIZER_FILES
from mamba2_jax.lora import merge_lora, save_lora, unmerge_lora
from mamba2_jax.lora.attach import adapter_names
from mamba2_jax.models.mamba2 import Mamba2ForCausalLM
from mamba2_jax.processes import is_first
from mamba2_jax.training.config import LoraOptions
from mamba2_jax.training.folder import ADAPTER, MODEL


def save_result(
    model: Mamba2ForCausalLM,
    output: pathlib.Path,
    tokenizer: Any,
    lora: LoraOptions,
    report: Callable[[str], None],
    replaced: bool = False,
) -> None:
    """Write the trained model to `output/model`, or its adapter to `output/adapter`.

    Args:
        model: the trained model.
        output: folder of the run.
        tokenizer: saved in place of that of the model's source checkpoint, if it was loaded from elsewhere,
            `replaced` is set, or the source has none.
        lora: with an adapter, say whether also to write the model with the adapter merged, in which dtype.
        report: called with messages: the paths written, and warnings about PEFT.
        replaced: whether the tokenizer was changed since it was loaded.
    """
    adapters = adapter_names(model)
    if len(adapters) == 1:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", UserWarning)
            origin = None if model.origin is None else str(model.origin.folder)
            save_lora(model, output / ADAPTER, name=adapters[0], base_model=origin)
        for warning in caught:
            report(f"note: {warning.message}")
        report(f"adapter: {output / ADAPTER}")
        if not lora.merge:
            return
    dtype = None if lora.merge_dtype == "stored" else lora.merge_dtype
    if adapters:
        tell_rounding(merge_lora(model, dtype=dtype), "lora.merge_dtype", report)
    folder = output / MODEL
    model.save_pretrained(folder, dtype=dtype)
    if adapters:
        unmerge_lora(model)
    if is_first() and tokenizer is not None:
        loaded_from = pathlib.Path(tokenizer.name_or_path).resolve()
        own = model.origin is not None and loaded_from == model.origin.folder and not replaced
        present = [file for pattern in TOKENIZER_FILES for file in folder.glob(pattern)]
        if not (own and present):
            for file in present:
                file.unlink()
            tokenizer.save_pretrained(folder)
    report(f"model: {folder}")


def tell_rounding(part: float, option: str, report: Callable[[str], None]) -> None:
    """Say which part of an adapter's change `merge_lora` rounded away, and the option that avoids it."""
    if part > 0.001:
        report(
            f"note: rounding the merged weights took away {part:.1%} of what training changed (as a norm); "
            f"{option} float32 keeps it"
        )
