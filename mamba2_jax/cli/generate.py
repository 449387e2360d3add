"""Run `mamba2-jax generate`: merge settings of checkpoint and user, stream the text, and time it."""

import pathlib
import time
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax

from mamba2_jax.cli.adapter import base_folder, refuse_other_folders
from mamba2_jax.cli.waiting import keep_compiled, working
from mamba2_jax.files import GENERATION_CONFIG, read_json
from mamba2_jax.generation.constraints import ban_words, match_json_schema, match_regex
from mamba2_jax.generation.drafts import Draft, PromptLookup
from mamba2_jax.generation.options import SAMPLING, make_options
from mamba2_jax.generation.processors import Processor, penalize_repeats
from mamba2_jax.generation.sampling import make_sampler
from mamba2_jax.generation.streaming import TextStream, start_streams
from mamba2_jax.generation.text import prompt_tokens, render_chat, rendered_tokens
from mamba2_jax.hub import resolve_folder
from mamba2_jax.lora import load_lora
from mamba2_jax.models.mamba2 import Mamba2ForCausalLM
from mamba2_jax.tokenizer import load_tokenizer, special_token_ids

Begin: TypeAlias = Callable[[int], list[TextStream]]  # starts texts of at most so many tokens

MAX_NEW_TOKENS = 128  # default if neither the user nor the checkpoint sets it
PROMPT_LOOKUP = "prompt-lookup"
_FILTERS = ("top_k", "top_p", "min_p")
_SEARCH = ("num_draft_tokens", "num_beams", "length_penalty", "best_of", "num_return_sequences")
_KINDS = dict.fromkeys(SAMPLING, (int, float)) | {"top_k": (int,), "max_new_tokens": (int,)}
_ENDINGS = {"eos": "the model", "stop": "a stop string", "length": "--max-new-tokens"}


class Loaded(NamedTuple):
    """A model, its tokenizer, and what the options of checkpoint and user make of them."""

    model: Mamba2ForCausalLM
    tokenizer: Any
    settings: dict[str, Any]
    draft: Draft | None = None
    processors: tuple[Processor, ...] = ()


def load(options: Any, tell: Callable[[object], None]) -> Loaded:
    """Load the model and its tokenizer, and check the options that `generate` and `chat` share.

    Raises:
        ImportError: an option needs a package that is not installed.
        OSError: the checkpoint or the tokenizer does not exist.
        ValueError: invalid options or checkpoint files; the message names them.
    """
    keep_compiled()
    folder = find_folder(options)
    settings = chosen_settings(options, folder)
    with working("loading the model"):
        model, tokenizer = load_model(options, folder, tell)
        draft: Draft | None = PromptLookup() if options.draft == PROMPT_LOOKUP else None
        if options.draft is not None and draft is None:
            draft_folder = resolve_folder(options.draft)
            refuse_other_folders(draft_folder)
            dtype = None if options.dtype == "auto" else options.dtype
            draft = Mamba2ForCausalLM.from_pretrained(draft_folder, dtype=dtype, report=tell)
    return Loaded(model, tokenizer, settings, draft, _processors(options, model, tokenizer))


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
    model = Mamba2ForCausalLM.from_pretrained(
        folder, dtype=dtype, quantize=options.quantize, report=tell, sharding=sharding
    )
    if options.adapter is not None:
        load_lora(model, options.adapter)
    for note in special_token_ids(tokenizer, model.config).notes:
        tell(f"note: {note}")
    return model, tokenizer


def _processors(options: Any, model: Mamba2ForCausalLM, tokenizer: Any) -> tuple[Processor, ...]:
    """Make the logits processors of the penalties, `--ban`, `--regex` and `--json-schema`."""
    found = []
    presence, frequency = options.presence_penalty or 0.0, options.frequency_penalty or 0.0
    if presence or frequency:
        found.append(penalize_repeats(presence=presence, frequency=frequency))
    if not options.ban and options.regex is None and options.json_schema is None:
        return tuple(found)
    with working("preparing the constraints"):
        if options.ban:
            found.append(ban_words(model, tokenizer, options.ban))
        if options.regex is not None:
            found.append(match_regex(model, tokenizer, options.regex))
        if options.json_schema is not None:
            schema = options.json_schema
            if not schema.lstrip().startswith("{"):
                schema = pathlib.Path(schema).read_text(encoding="utf-8")
            found.append(match_json_schema(model, tokenizer, schema))
    return tuple(found)


def stream_options(options: Any, loaded: Loaded, turn: int = 0) -> dict[str, Any]:
    """Return the options of `stream` for the given turn of a conversation; each turn has its own key."""
    settings, key = loaded.settings, None
    if settings.get("temperature"):
        key = jax.random.fold_in(jax.random.key(options.seed), turn) if turn else jax.random.key(options.seed)
    chosen = {name: settings[name] for name in ("max_new_tokens", *SAMPLING) if name in settings}
    given = {name: getattr(options, name, None) for name in _SEARCH}
    chosen |= {name: value for name, value in given.items() if value is not None}
    return chosen | {"key": key, "draft": loaded.draft, "logits_processors": loaded.processors}


def prepare(options: Any, prompt: str, tell: Callable[[object], None]) -> tuple[Begin, int]:
    """Load the model and its tokenizer, and check the options and the prompt.

    Args:
        options: the options of the command, `cli.commands.Generate`.
        prompt: the text to continue, or with `--chat` the message to answer.
        tell: receives messages for the user.

    Returns:
        A function that starts texts of at most so many tokens, and the maximum number of new tokens.

    Raises:
        ImportError: an option needs a package that is not installed.
        OSError: the checkpoint or the tokenizer does not exist.
        ValueError: invalid options, prompt or checkpoint files; the message names them.
    """
    loaded = load(options, tell)
    if options.chat:
        system = [] if options.system is None else [{"role": "system", "content": options.system}]
        messages = [*system, {"role": "user", "content": prompt}]
        template = chat_template(options, loaded.tokenizer)
        ids = rendered_tokens(loaded.tokenizer, *render_chat(loaded.tokenizer, messages, template))
    else:
        ids = prompt_tokens(loaded.tokenizer, prompt, goes_on=False)

    def begin(max_new_tokens: int) -> list[TextStream]:
        chosen = stream_options(options, loaded) | {"max_new_tokens": max_new_tokens}
        chosen = make_options("generate", chosen)
        return start_streams("generate", loaded.model, loaded.tokenizer, ids, options.stop, chosen)

    begin(1)  # raises the prompt's errors before any text is printed
    return begin, loaded.settings["max_new_tokens"]


def chat_template(options: Any, tokenizer: Any) -> str:
    """Return the template of `--chat-template`, else the tokenizer's.

    Raises:
        OSError: no such file.
        ValueError: there is none.
    """
    if options.chat_template is not None:
        return pathlib.Path(options.chat_template).read_text(encoding="utf-8")
    if not tokenizer.chat_template:
        raise ValueError("the tokenizer has no chat template; give a file of one with --chat-template")
    return tokenizer.chat_template


def chosen_settings(options: Any, folder: pathlib.Path) -> dict[str, Any]:
    """Merge the options of the user over the settings of the checkpoint in `folder`, and check both."""
    settings = _checkpoint_settings(folder / GENERATION_CONFIG)
    ours = {name: getattr(options, name) for name in ("max_new_tokens", *SAMPLING)}
    if ours["temperature"] == 0:
        settings = {name: value for name, value in settings.items() if name not in _FILTERS}
    if (options.num_beams or 1) > 1:  # which do not sample
        settings = {name: value for name, value in settings.items() if name not in (*_FILTERS, "temperature")}
    settings |= {name: value for name, value in ours.items() if value is not None}
    if settings.get("top_k") == 0:
        del settings["top_k"]
    make_sampler("generate", **{name: value for name, value in settings.items() if name in SAMPLING})
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
    make_sampler(str(file), **{name: value for name, value in found.items() if name in SAMPLING})
    return found


def write_and_time(begin: Begin, max_new_tokens: int, tell: Callable[[object], None]) -> None:
    """Stream the texts to stdout, then report tokens per second and the time to the first token."""
    started = time.perf_counter()
    texts = begin(max_new_tokens)
    first, tokens_at_first = None, 0
    for number, pieces in enumerate(texts, 1):
        if len(texts) > 1:
            print(f"--- {number} of {len(texts)} ---", flush=True)
        with working("compiling, and reading the prompt"):
            piece = next(pieces, "")
        if first is None:
            first, tokens_at_first = time.perf_counter(), pieces.num_tokens
        print(piece, end="", flush=True)
        for piece in pieces:
            print(piece, end="", flush=True)
        if not pieces.text.endswith("\n"):
            print(flush=True)
    ended = time.perf_counter()
    tell("\n".join(_report(texts, tokens_at_first, started, first or ended, ended, begin)))


def _report(
    texts: list[TextStream], tokens_at_first: int, started: float, first: float, ended: float, begin: Begin
) -> list[str]:
    """Return the lines about number, end and speed of the texts."""
    pieces = texts[0]
    endings = ", ".join(dict.fromkeys(_ENDINGS[text.finish_reason or "length"] for text in texts))
    lines = [f"{sum(text.num_tokens for text in texts)} tokens, ended by {endings}"]
    if pieces.passes and pieces.num_tokens > 1:
        lines.append(f"draft: {(pieces.num_tokens - 1) / pieces.passes:.1f} tokens per call of the model")
    if pieces.comes_whole:
        return [*lines, f"time: {ended - started:.1f} s, compiling included"]
    if pieces.num_tokens > tokens_at_first:
        speed = (pieces.num_tokens - tokens_at_first) / (ended - first)
        lines.append(f"speed: {speed:.1f} tokens/s after the first, compiling excluded")
    # The first call included compilation; a repeat measures the time to first token without it.
    again = time.perf_counter()
    next(begin(1)[0], None)
    again = time.perf_counter() - again
    including = (first - started) * 1e3
    return [*lines, f"time to first token: {again * 1e3:.0f} ms, with compiling {including:.0f} ms"]
