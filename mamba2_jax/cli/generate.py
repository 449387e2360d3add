"""Run `mamba2-jax generate`: merge settings of checkpoint and user, stream the text, and time it."""

import pathlib
import time
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax

from mamba2_jax.cli.adapter import base_folder, refuse_other_folders
from mamba2_jax.files import GENERATION_CONFIG, read_json
from mamba2_jax.generation.sampling import make_sampler
from mamba2_jax.generation.streaming import TextStream, stream
from mamba2_jax.hub import resolve_folder
from mamba2_jax.lora import load_lora
from mamba2_jax.models.mamba2 import Mamba2ForCausalLM
from mamba2_jax.tokenizer import load_tokenizer, special_token_ids

Begin: TypeAlias = Callable[[int], TextStream]  # starts a stream of at most so many tokens

MAX_NEW_TOKENS = 128  # default if neither the user nor the checkpoint sets it
_SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
_FILTERS = ("top_k", "top_p", "min_p")
_KINDS = dict.fromkeys(_SAMPLING, (int, float)) | {"top_k": (int,), "max_new_tokens": (int,)}
_ENDINGS = {"eos": "the model", "stop": "a stop string", "length": "--max-new-tokens"}


class Loaded(NamedTuple):
    """A model, its tokenizer, and the settings of checkpoint and user."""

    model: Mamba2ForCausalLM
    tokenizer: Any
    settings: dict[str, Any]


def load(options: Any, tell: Callable[[object], None]) -> Loaded:
    """Load the model and its tokenizer, and check the options that `generate` and `chat` share.

    Raises:
        OSError: the checkpoint or the tokenizer does not exist.
        ValueError: invalid options or checkpoint files; the message names them.
    """
    folder = find_folder(options)
    settings = chosen_settings(options, folder)
    return Loaded(*load_model(options, folder, tell), settings)


def find_folder(options: Any) -> pathlib.Path:
    """Return the folder of the model that `--model` or `--adapter` names, downloaded if it is on the hub."""
    folder = resolve_folder(base_folder(options.model, options.adapter))
    refuse_other_folders(folder)
    return folder


def load_model(
    options: Any, folder: pathlib.Path, tell: Callable[[object], None], *, sharding: Any = None
) -> tuple[Mamba2ForCausalLM, Any]:
    """Load a model with its adapter, and its tokenizer, by the options `tokenizer`, `dtype` and `adapter`."""
    tokenizer = load_tokenizer(options.tokenizer or folder)
    dtype = None if options.dtype == "auto" else options.dtype
    model = Mamba2ForCausalLM.from_pretrained(folder, dtype=dtype, report=tell, sharding=sharding)
    if options.adapter is not None:
        load_lora(model, options.adapter)
    for note in special_token_ids(tokenizer, model.config).notes:
        tell(f"note: {note}")
    return model, tokenizer


def stream_options(options: Any, settings: dict[str, Any], turn: int = 0) -> dict[str, Any]:
    """Return the options of `stream` for the given turn of a conversation; each turn has its own key."""
    key = None
    if settings.get("temperature"):
        key = jax.random.fold_in(jax.random.key(options.seed), turn) if turn else jax.random.key(options.seed)
    chosen = {name: settings[name] for name in ("max_new_tokens", *_SAMPLING) if name in settings}
    return chosen | {"stop": options.stop, "key": key}


def prepare(options: Any, prompt: str, tell: Callable[[object], None]) -> tuple[Begin, int]:
    """Load the model and its tokenizer, and check the options and the prompt.

    Args:
        options: the options of the command, `cli.commands.Generate`.
        prompt: the text to continue, or with `--chat` the message to answer.
        tell: receives messages for the user.

    Returns:
        A function that starts a stream of at most so many tokens, and the maximum number of new tokens.

    Raises:
        OSError: the checkpoint or the tokenizer does not exist.
        ValueError: invalid options, prompt or checkpoint files; the message names them.
    """
    from mamba2_jax.cli.chat import new_conversation

    loaded = load(options, tell)

    def begin(max_new_tokens: int) -> TextStream:
        chosen = stream_options(options, loaded.settings | {"max_new_tokens": max_new_tokens})
        if options.chat:
            return new_conversation(options, loaded).say(prompt, **chosen)
        return stream(loaded.model, loaded.tokenizer, prompt, **chosen)

    begin(1)  # raises the prompt's errors before any text is printed
    return begin, loaded.settings["max_new_tokens"]


def chosen_settings(options: Any, folder: pathlib.Path) -> dict[str, Any]:
    """Merge the options of the user over the settings of the checkpoint in `folder`, and check both."""
    settings = _checkpoint_settings(folder / GENERATION_CONFIG)
    ours = {name: getattr(options, name) for name in ("max_new_tokens", *_SAMPLING)}
    if ours["temperature"] == 0:
        settings = {name: value for name, value in settings.items() if name not in _FILTERS}
    settings |= {name: value for name, value in ours.items() if value is not None}
    if settings.get("top_k") == 0:
        del settings["top_k"]
    make_sampler("generate", **{name: value for name, value in settings.items() if name in _SAMPLING})
    if settings.setdefault("max_new_tokens", MAX_NEW_TOKENS) < 1:
        raise ValueError(f"--max-new-tokens {settings['max_new_tokens']} must be at least 1")
    return settings


def _checkpoint_settings(file: pathlib.Path) -> dict[str, Any]:
    """Read the defaults of a checkpoint by the rules of transformers: greedy unless `do_sample` is set."""
    if not file.is_file():
        return {}
    content = read_json(file)
    if not isinstance(content, dict):
        raise ValueError(f"{file}: wants a JSON object")
    found = {name: content[name] for name in _KINDS if content.get(name) is not None}
    for name, value in found.items():
        if isinstance(value, bool) or not isinstance(value, _KINDS[name]):
            raise ValueError(f"{file}: {name}={value!r} is not a number of its kind; correct it")
    if found.get("top_k") == 0:
        del found["top_k"]
    if content.get("do_sample"):
        found.setdefault("temperature", 1.0)
    else:
        found = {name: value for name, value in found.items() if name not in (*_FILTERS, "temperature")}
    make_sampler(str(file), **{name: value for name, value in found.items() if name in _SAMPLING})
    return found


def write_and_time(begin: Begin, max_new_tokens: int, tell: Callable[[object], None]) -> None:
    """Stream the text to stdout, then report tokens per second and the time to the first token."""
    started = time.perf_counter()
    pieces = begin(max_new_tokens)
    first, tokens_at_first, piece = None, 0, ""
    for piece in pieces:
        if first is None:
            first, tokens_at_first = time.perf_counter(), pieces.num_tokens
        print(piece, end="", flush=True)
    ended = time.perf_counter()
    if not piece.endswith("\n"):
        print(flush=True)
    # The first call included compilation; a repeat measures the time to first token without it.
    again = time.perf_counter()
    next(begin(1), None)
    again = time.perf_counter() - again
    count = pieces.num_tokens
    lines = [f"{count} tokens, ended by {_ENDINGS[pieces.finish_reason or 'length']}"]
    if first is not None and count > tokens_at_first:
        speed = (count - tokens_at_first) / (ended - first)
        lines.append(f"speed: {speed:.1f} tokens/s after the first, compiling excluded")
    including = ((ended if first is None else first) - started) * 1e3
    lines.append(f"time to first token: {again * 1e3:.0f} ms, with compiling {including:.0f} ms")
    tell("\n".join(lines))
