"""Convert a checkpoint between forms, streaming block by block: the model is never in memory.

>>> import pathlib, tempfile
>>> from mamba2_jax.hub import EMBEDDED_MODEL
>>> folder = pathlib.Path(tempfile.mkdtemp()) / "float32"
>>> convert(EMBEDDED_MODEL, folder, dtype="float32")
>>> Mamba2Config.from_pretrained(folder) == Mamba2Config.from_pretrained(EMBEDDED_MODEL)
True
"""

from pathlib import Path

from mamba2_jax.config import Mamba2Config
from mamba2_jax.files import TOKENIZER_FILES, refuse_remote
from mamba2_jax.hub import resolve_folder
from mamba2_jax.typing import DTypeLike
from mamba2_jax.weight_types import TypeName
from mamba2_jax.weights import convertible_weights, open_checkpoint
from mamba2_jax.weights.checkpoint_folder import MAX_SHARD_SIZE, Format, write_checkpoint


def convert(
    source: str | Path | None,
    target: str | Path,
    *,
    to: Format = "transformers",
    dtype: DTypeLike | None = None,
    quantize: TypeName | None = None,
    max_shard_size: int | str = MAX_SHARD_SIZE,
    tokenizer: str | Path | None = None,
    revision: str | None = None,
    allow_non_finite: bool = False,
    overwrite: bool = False,
    show_progress: bool = False,
) -> None:
    """Convert a checkpoint of any readable form to another form or dtype; the write is atomic.

    Args:
        source: a folder or hub id; None: the embedded model.
        target: the folder to write.
        to: the form to write.
        dtype: stored float dtype; None keeps each tensor's own. A_log, dt_bias and D are never narrowed.
            Quantized weights become floats.
        quantize: "int8" or "int4": quantize the weights, as `from_pretrained` does. None: as they are.
        max_shard_size: bytes per file, or text such as "5GB"; for the form "transformers" only.
        tokenizer: folder or hub id whose tokenizer files are copied; None: the source's, if it has any.
        revision: branch, tag or commit of `source` on the hub.
        allow_non_finite: accept weights that hold NaN or infinity.
        overwrite: replace the checkpoint in a non-empty target; its other files are kept.
        show_progress: draw a progress bar on stderr.

    Raises:
        FileNotFoundError: the source does not exist.
        FileExistsError: the target is the source, or is not empty and `overwrite` is False.
        ImportError: PyTorch, needed to read or write a `.bin` file, is missing.
        NotImplementedError: the form cannot express this model.
        ValueError: the checkpoint is broken or does not match its config; every problem is listed.
    """
    refuse_remote(target)
    target = Path(target).expanduser()
    folder = resolve_folder(source, revision)
    if target.exists() and target.resolve() == folder.resolve():
        raise FileExistsError(f"{target}: this is the source itself; name another folder")
    check_target(target, overwrite)
    beside = folder if tokenizer is None else resolve_folder(tokenizer, allow_patterns=TOKENIZER_FILES)
    config = Mamba2Config.from_pretrained(folder)
    with open_checkpoint(folder) as checkpoint:
        tensors = convertible_weights(
            checkpoint,
            config,
            format=to,
            dtype=dtype,
            quantize=quantize,
            allow_non_finite=allow_non_finite,
        )
        if dtype is not None or quantize is not None:
            config = config.replace(quantization=quantize)
        write_checkpoint(
            target,
            config,
            tensors,
            format=to,
            max_shard_size=max_shard_size,
            beside=folder,
            tokenizer=beside,
            show_progress=show_progress,
        )


def check_target(target: Path, overwrite: bool) -> None:
    """Raise FileExistsError if the folder to write is not empty and must not be replaced."""
    if not overwrite and target.is_dir() and any(target.iterdir()):
        raise FileExistsError(f"{target}: not empty; name another folder, or set overwrite")
