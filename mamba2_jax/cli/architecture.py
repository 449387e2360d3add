"""New models for training from random weights: their config, tokenizer and vocabulary."""

import json
import pathlib
from collections.abc import Callable
from typing import Any

from flax import nnx

from mamba2_jax import Mamba2Config, Mamba2ForCausalLM, load_tokenizer
from mamba2_jax.config.forms import PRESET_NAMES
from mamba2_jax.config.options import OPTIONS
from mamba2_jax.files import read_json
from mamba2_jax.processes import is_first, meet
from mamba2_jax.tokenizer import special_token_ids, train_tokenizer
from mamba2_jax.training import TrainConfig
from mamba2_jax.training.data import iterate_texts
from mamba2_jax.training.folder import TOKENIZER
from mamba2_jax.training.options import read_fields

_PRESET = "mamba2-130m"
_PUBLISHED = ("model_type", "d_model", "dim")  # keys of the config files of checkpoints
_MULTIPLE = 16  # a vocabulary is padded to such a multiple, as the original's


def names_model(value: str) -> bool:
    """Return whether a value is a preset's name, or a file that `read_architecture` reads."""
    path = pathlib.Path(value).expanduser()
    keys = ("preset", "hidden_size", *_PUBLISHED)
    return value in PRESET_NAMES or (path.is_file() and any(key in read_fields(path) for key in keys))


def read_architecture(value: str) -> Mamba2Config:
    """Read the config of a new model.

    Args:
        value: a preset's name; a folder with a `config.json`; a JSON or YAML file; or a JSON object. File and
            object hold a published config, or fields of `Mamba2Config` that replace those of `preset`, where
            `num_heads` follows from `hidden_size`, `expand` and `head_dim`.

    Raises:
        FileNotFoundError: neither a preset nor a file.
        ValueError: invalid fields; the message names them.
    """
    if value in PRESET_NAMES:
        return Mamba2Config.preset(value)
    path = pathlib.Path(value).expanduser()
    if value.startswith("{"):
        fields, where = json.loads(value), "from_config"
    elif path.is_dir():
        return Mamba2Config.from_pretrained(path)
    elif path.is_file():
        fields, where = read_json(path) if path.suffix == ".json" else read_fields(path), value
    else:
        raise FileNotFoundError(
            f"from_config={value}: no such file or folder; name a config file or one of "
            f"{', '.join(PRESET_NAMES)}"
        )
    if not isinstance(fields, dict):
        raise ValueError(f"{where}: wants names and values of fields, got a {type(fields).__name__}")
    if any(key in fields for key in _PUBLISHED):
        return Mamba2Config.from_dict(fields)
    base = Mamba2Config.preset(fields.pop("preset", _PRESET))
    if unknown := sorted(set(fields) - OPTIONS.keys()):
        raise ValueError(f"{where}: there is no field {unknown[0]!r}; there are preset, {', '.join(OPTIONS)}")
    width = fields.get("hidden_size", base.hidden_size) * fields.get("expand", base.expand)
    fields = {name: _number(field) for name, field in fields.items()}
    if "vocab_size" in fields:
        fields.setdefault("unpadded_vocab_size", None)
    fields.setdefault("num_heads", width // fields.get("head_dim", base.head_dim))
    return base.replace(**fields)


def _number(field: Any) -> Any:
    """Return the number that a text spells: YAML parses 1e-5 as text."""
    try:
        return float(field) if isinstance(field, str) else field
    except ValueError:
        return field


def with_vocabulary(config: Mamba2Config, tokenizer: Any) -> Mamba2Config:
    """Return the config with the size and the special tokens of a tokenizer's vocabulary."""
    count = max(tokenizer.get_vocab().values()) + 1
    padded = -(-count // _MULTIPLE) * _MULTIPLE
    unpadded = None if padded == count else count
    config = config.replace(vocab_size=padded, unpadded_vocab_size=unpadded, eos_token_id=None)
    ids = special_token_ids(tokenizer, config.replace(bos_token_id=None, pad_token_id=None))
    eos = ids.eos[0] if len(ids.eos) == 1 else ids.eos or None
    return config.replace(bos_token_id=ids.bos, eos_token_id=eos, pad_token_id=ids.pad)


def tokenizer_of_data(
    data: tuple[str, ...], train: TrainConfig, vocab_size: int, tell: Callable[[str], None]
) -> Any:
    """Train a tokenizer on the data, kept in the run's folder; a resumed run takes that of its start."""
    folder = pathlib.Path(train.output).expanduser() / TOKENIZER
    if is_first() and not (train.resume and (folder / "tokenizer.json").is_file()):
        tokenizer = train_tokenizer(iterate_texts(data, train.data), vocab_size)
        tokenizer.save_pretrained(folder)
        tell(f"tokenizer: {len(tokenizer):,} tokens, trained on the data")
    meet("mamba2_jax: tokenizer")
    return load_tokenizer(folder)


def new_model(
    value: str, tokenizer: Any, seed: int, dtype: str | None, tell: Callable[[str], None]
) -> Mamba2ForCausalLM:
    """Initialise the model of `read_architecture` with the tokenizer's vocabulary, float32."""
    config = with_vocabulary(read_architecture(value), tokenizer)
    model = Mamba2ForCausalLM(config, dtype=dtype or "float32", rngs=nnx.Rngs(seed))
    tell(
        f"a new model of {config.num_parameters():,} parameters: {config.num_hidden_layers} layers of width "
        f"{config.hidden_size}, {config.vocab_size:,} tokens"
    )
    return model
