"""Run `mamba2-jax convert`: checkpoints of any form, checkpoints of a training run, and adapters to merge."""

import pathlib
from collections.abc import Callable
from typing import Any

from mamba2_jax.files import refuse_remote
from mamba2_jax.training.folder import TOKENIZER, choose_checkpoint, find_run
from mamba2_jax.weights.convert import check_target, convert


def convert_command(options: Any, tell: Callable[[str], None]) -> None:
    """Write the checkpoint.

    Args:
        options: the options of the command, `cli.commands.Convert`.
        tell: receives messages for the user.

    Raises:
        OSError: the source does not exist, or the target is not empty.
        ValueError: options that do not fit the source, or a broken source; the message names them.
    """
    dtype = None if options.dtype == "stored" else options.dtype
    form = {"to": options.to, "max_shard_size": options.max_shard_size, "tokenizer": options.tokenizer}
    source = options.source
    from_run = _is_local(source) and find_run(source) is not None
    adapter = options.adapter or (source if _is_local(source) and _is_adapter(source) else None)
    if options.quantize is not None and (options.to != "transformers" or dtype is not None):
        raise ValueError(f"--quantize {options.quantize}: is for --to transformers without --dtype")
    if options.calibration is not None and options.quantize is None:
        raise ValueError(f"--calibration {options.calibration}: is for --quantize; name a type")
    if options.base is not None and not from_run and adapter != source:
        raise ValueError(f"--base {options.base}: {source} is no adapter and no run with one; leave it out")
    if not from_run and adapter is None and options.calibration is None:
        convert(
            source,
            options.target,
            dtype=dtype,
            quantize=options.quantize,
            allow_non_finite=options.allow_non_finite,
            overwrite=options.overwrite,
            show_progress=True,
            **form,
        )
        return
    refuse_remote(options.target)
    target = pathlib.Path(options.target).expanduser()
    check_target(target, options.overwrite)
    if from_run and options.adapter is not None:
        raise ValueError(f"--adapter {options.adapter}: {source} is a run, which has its own; leave it out")
    if adapter is None and not from_run:
        from mamba2_jax.models.mamba2 import Mamba2ForCausalLM

        model, rounded, beside = Mamba2ForCausalLM.from_pretrained(source), 0.0, None
    elif adapter is None:
        model, rounded, beside = _model_of_run(options, dtype, tell)
    else:
        model, rounded, beside = *_merged(options, adapter, dtype, tell), None
    from mamba2_jax.training.result import tell_rounding

    tell_rounding(rounded, "--dtype", tell)
    if options.quantize is not None:
        folder = beside or (source if model.origin is None else model.origin.folder)
        model.quantize(options.quantize, calibration=_calibration(options, folder))
    model.save_pretrained(
        target,
        format=form["to"],
        dtype=dtype,
        max_shard_size=form["max_shard_size"],
        tokenizer=form["tokenizer"] or beside,
        show_progress=True,
    )


_ROWS, _LENGTH = 16, 512  # tokens of a text for calibration


def _calibration(options: Any, folder: Any) -> Any:
    """Read the token ids `(b, l)` of the text for calibration; None without one."""
    if options.calibration is None:
        return None
    from mamba2_jax.tokenizer import load_tokenizer

    text = pathlib.Path(options.calibration).expanduser().read_text(encoding="utf-8")
    ids = load_tokenizer(options.tokenizer or folder).encode(text[: 40 * _ROWS * _LENGTH])
    length = min(_LENGTH, len(ids))
    rows = min(_ROWS, len(ids) // max(1, length))
    if not rows:
        raise ValueError(f"--calibration {options.calibration}: is empty")
    return [ids[row * length : (row + 1) * length] for row in range(rows)]


def _model_of_run(options: Any, dtype: Any, tell: Callable[[str], None]) -> tuple[Any, float, Any]:
    """Rebuild the model of a checkpoint; also return the part rounded away and the tokenizer's folder."""
    from mamba2_jax.training.export import model_of

    path, words = choose_checkpoint(options.source)
    tell(words)
    model, rounded = model_of(path, options.base, dtype)
    tokenizer = (find_run(path) or path) / TOKENIZER
    return model, rounded, tokenizer if tokenizer.is_dir() else None


def _merged(options: Any, adapter: str, dtype: Any, tell: Callable[[str], None]) -> tuple[Any, float]:
    """Load a model with an adapter merged; also return the part rounded away."""
    from mamba2_jax.cli.adapter import load_with_adapter
    from mamba2_jax.lora import merge_lora

    model = load_with_adapter(options.base if adapter == options.source else options.source, adapter, tell)
    if model.config.quantization is not None:
        tell(f"the {model.config.quantization} weights become floats, to which the adapter is added")
        model.dequantize(model.backbone.norm_f.weight.dtype if dtype is None else dtype)
    return model, merge_lora(model, dtype=dtype)


def _is_local(path: str) -> bool:
    return pathlib.Path(path).expanduser().is_dir()


def _is_adapter(path: str) -> bool:
    from mamba2_jax.lora import is_adapter

    return is_adapter(path)
