"""Where a model's weights come from: the folder of a checkpoint, and what is in it beside weights."""

from dataclasses import dataclass
from pathlib import Path

from mamba2_jax.files import GENERATION_CONFIG, read_json
from mamba2_jax.hub import EMBEDDED_MODEL, resolve_folder
from mamba2_jax.lora.files import base_of, is_adapter


@dataclass(frozen=True)
class Origin:
    """Source checkpoint of a model's weights; `save_pretrained` takes dtypes and extra files from it.

    Args:
        folder: checkpoint folder; its tokenizer and generation config are copied when the model is saved.
        stored_dtypes: pairs of a tensor's canonical name and its stored dtype.
    """

    folder: Path
    stored_dtypes: tuple[tuple[str, str], ...]


def checkpoint_folder(path: str | Path | None, revision: str | None) -> Path:
    """Return the local folder of a checkpoint; None is the model in the package.

    Raises:
        ValueError: the folder holds an adapter.
    """
    folder = EMBEDDED_MODEL if path is None else resolve_folder(path, revision)
    if is_adapter(folder):
        raise ValueError(
            f"{path}: this is an adapter, not a model; load its base {base_of(folder) or ''}, and the "
            "adapter with load_lora (on the command line: --adapter)"
        )
    return folder


def read_end_ids(folder: Path) -> tuple[int, ...]:
    """Read the end ids of a folder's `generation_config.json`; empty if it only repeats the config's.

    Raises:
        ValueError: not JSON, or no token ids; the message names the file.
    """
    file = folder / GENERATION_CONFIG
    if not file.is_file():
        return ()
    content = read_json(file)
    if not isinstance(content, dict):
        raise ValueError(f"{file}: wants a JSON object")
    eos = content.get("eos_token_id")
    if eos is None or content.get("_from_model_config"):
        return ()
    ids = eos if isinstance(eos, list) else [eos]
    if any(isinstance(token, bool) or not isinstance(token, int) or token < 0 for token in ids):
        raise ValueError(f"{file}: eos_token_id={eos!r} is not a token id or a list of them; correct it")
    return tuple(ids)
