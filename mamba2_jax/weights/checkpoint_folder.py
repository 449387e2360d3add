"""Write a checkpoint folder atomically: weights, config, generation config and tokenizer."""

import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

from mamba2_jax.config import Mamba2Config
from mamba2_jax.config.vocabulary import count_token_ids
from mamba2_jax.files import GENERATION_CONFIG, TOKENIZER_FILES, WEIGHT_FILES
from mamba2_jax.processes import is_first, meet
from mamba2_jax.weights import (
    Outgoing,
    file_order,
    new_folder,
    parse_size,
    progress_bar,
    write_json,
    write_safetensors,
    write_torch,
)
from mamba2_jax.weights.header import FLOAT_DTYPES

Format: TypeAlias = Literal["transformers", "state-spaces"]
FORMATS: tuple[Format, ...] = get_args(Format)

MAX_SHARD_SIZE = "5GB"


def write_checkpoint(
    target: Path,
    config: Mamba2Config,
    tensors: Sequence[Outgoing],
    *,
    format: Format = "transformers",
    max_shard_size: int | str = MAX_SHARD_SIZE,
    head: bool = True,
    classifier: Mapping[str, Any] | None = None,
    beside: Path | None = None,
    tokenizer: Path | None = None,
    show_progress: bool = False,
) -> None:
    """Write a checkpoint folder that transformers or state-spaces' code loads unchanged.

    Args:
        target: the folder to write; `weights.new_folder` tells how an existing one is replaced.
        config: the model config.
        tensors: the weights; their blocks are computed while they are written.
        format: form of the checkpoint.
        max_shard_size: bytes per weight file, or text such as "5GB"; state-spaces always has one file.
        head: False for a bare Mamba2Model.
        classifier: keys of a classifier in config.json; None: no classifier.
        beside: folder of the source checkpoint, whose generation_config.json is copied; None: written anew.
        tokenizer: folder whose tokenizer files are copied; None: none. `unpadded_vocab_size` follows it.
        show_progress: draw a progress bar on stderr.

    Raises:
        ImportError: the form "state-spaces" without PyTorch.
        NotImplementedError: the form cannot express this model.
        ValueError: the folder cannot be replaced, a value overflows its stored dtype, or the tokenizer has
            ids beyond the vocabulary.
    """
    limit = parse_size(max_shard_size)
    config = _with_vocabulary_of(tokenizer, config, may_differ=tokenizer == beside)
    if format == "transformers":
        content = _transformers_config(config, tensors, head, classifier)
    elif head:
        content = config.to_state_spaces_dict()
    else:
        raise ValueError("the form 'state-spaces' has no model without a head; save a Mamba2ForCausalLM")
    if not is_first():
        _help_to_write(tensors, format, limit)
        return
    with new_folder(target) as folder:
        write_json(folder / "config.json", content)
        _write_generation_config(folder, config, beside)
        if tokenizer is not None:
            for pattern in TOKENIZER_FILES:
                for file in filter(Path.is_file, tokenizer.glob(pattern)):
                    shutil.copyfile(file, folder / file.name)
        total = sum(tensor.nbytes for tensor in tensors)
        with progress_bar("saving weights", total, show_progress) as advance:
            if format == "transformers":
                write_safetensors(folder, tensors, limit, advance)
            else:
                tied = {"lm_head.weight": "backbone.embedding.weight"} if config.tie_word_embeddings else {}
                write_torch(folder / WEIGHT_FILES[-1].single, tensors, tied, advance)
    meet("mamba2_jax: a checkpoint is written")


def _with_vocabulary_of(tokenizer: Path | None, config: Mamba2Config, may_differ: bool) -> Mamba2Config:
    """Return the config with the number of token ids of a tokenizer, if its files tell."""
    count = None if tokenizer is None else count_token_ids(tokenizer)
    if count is None or count > config.vocab_size and may_differ:
        return config
    if count > config.vocab_size:
        raise ValueError(
            f"{tokenizer}: this tokenizer has ids up to {count - 1}, the model's vocab_size is"
            f" {config.vocab_size}; give the model's own, or call resize_vocabulary({count}) before"
        )
    return config.replace(unpadded_vocab_size=count if count < config.vocab_size else None)


def _help_to_write(tensors: Sequence[Outgoing], format: Format, limit: int) -> None:
    """Take part, in a process that does not write, in the all-gather of each tensor, in file order."""
    for tensor in file_order(tensors, limit) if format == "transformers" else tensors:
        for _ in tensor.blocks():
            pass
    meet("mamba2_jax: a checkpoint is written")


def _transformers_config(
    config: Mamba2Config, tensors: Sequence[Outgoing], head: bool, classifier: Mapping[str, Any] | None
) -> dict[str, Any]:
    # transformers 5.24 divides out_proj by sqrt(layers) whenever it loads a config with this option, which is
    # meant for initialization only.
    content = config.replace(rescale_prenorm_residual=False).to_dict()
    sizes: Counter[str] = Counter()
    for tensor in tensors:
        if tensor.dtype in FLOAT_DTYPES.values():
            sizes[tensor.dtype.name] += tensor.nbytes // tensor.dtype.itemsize
    # transformers loads all weights in this dtype; mlx-lm and transformers before 4.56 know the older key
    content["dtype"] = content["torch_dtype"] = sizes.most_common(1)[0][0]
    if not head:
        kind = "Model" if classifier is None else "ForSequenceClassification"
        content["architectures"] = [name.replace("ForCausalLM", kind) for name in content["architectures"]]
    return dict(sorted((content | dict(classifier or {})).items()))


def _write_generation_config(folder: Path, config: Mamba2Config, beside: Path | None) -> None:
    """Copy generation_config.json from `beside`, or write one with the special token ids of the config."""
    name = GENERATION_CONFIG
    if beside is not None and (beside / name).is_file():
        shutil.copyfile(beside / name, folder / name)
        return
    eos = list(config.eos_token_ids) if len(config.eos_token_ids) > 1 else config.eos_token_id
    ids = {"bos_token_id": config.bos_token_id, "eos_token_id": eos, "pad_token_id": config.pad_token_id}
    write_json(folder / name, {key: value for key, value in ids.items() if value is not None})
