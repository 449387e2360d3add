"""Saving the result of a run: a checkpoint, in transformers' form if it can be, or an adapter in PEFT's."""

import pathlib
import tempfile
import warnings
from collections.abc import Callable
from typing import Any, Literal

from mamba2_jax.files import TOKENIZER_FILES
from mamba2_jax.lora import merge_lora, save_lora, unmerge_lora
from mamba2_jax.lora.attach import adapter_names
from mamba2_jax.models.mamba2 import Mamba2ForCausalLM
from mamba2_jax.training.config import LoraOptions
from mamba2_jax.training.folder import ADAPTER, MODEL, choose_checkpoint


def form_of_result(model: Mamba2ForCausalLM) -> Literal["transformers", "state-spaces"]:
    """Return the form in which a model is saved: the original's, if transformers lacks an option of it.

    Raises:
        NotImplementedError: neither has it.
    """
    try:
        model.config.to_dict()
    except NotImplementedError:
        model.config.to_state_spaces_dict()
        return "state-spaces"
    return "transformers"


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
    with tempfile.TemporaryDirectory() as beside:
        is_new = tokenizer is not None and (replaced or not _came_with(model, tokenizer))
        if is_new and tokenizer is not None:
            tokenizer.save_pretrained(beside)
            if max(tokenizer.get_vocab().values()) >= model.config.vocab_size:  # no reason to lose a run
                report("note: the tokenizer is not saved, as it has ids beyond the model's vocab_size")
                is_new = False
        form = form_of_result(model)
        model.save_pretrained(folder, format=form, dtype=dtype, tokenizer=beside if is_new else None)
    if adapters:
        unmerge_lora(model)
    report(f"model: {folder}" + ("" if form == "transformers" else f", in the form {form}"))


def _came_with(model: Mamba2ForCausalLM, tokenizer: Any) -> bool:
    """Return whether a tokenizer was loaded from the files beside the model's source checkpoint."""
    if model.origin is None or pathlib.Path(tokenizer.name_or_path).resolve() != model.origin.folder:
        return False
    return any(file for pattern in TOKENIZER_FILES for file in model.origin.folder.glob(pattern))


def tell_best(output: pathlib.Path, last: int, report: Callable[[str], None]) -> None:
    """Tell of a checkpoint that is kept because its evaluation loss is lower than that of step `last`."""
    path, words = choose_checkpoint(output)
    if int(path.name) != last:
        report(f"{words}; mamba2-jax convert {output} OUT writes it as a model")


def tell_rounding(part: float, option: str, report: Callable[[str], None]) -> None:
    """Say which part of an adapter's change `merge_lora` rounded away, and the option that avoids it."""
    if part > 0.001:
        report(
            f"note: rounding the merged weights took away {part:.1%} of what training changed (as a norm); "
            f"{option} float32 keeps it"
        )
