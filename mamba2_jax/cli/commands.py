"""The command line: `mamba2-jax generate` writes text, `info` describes a model, `convert` rewrites one.

What a command needs is imported when it runs, so that `--help` and a mistyped option answer at once.
"""

import dataclasses
import importlib.metadata
import io
import os
import sys
from collections.abc import Sequence
from typing import Annotated, Literal, TypeAlias

import tyro
from tyro.conf import Positional, UseAppendAction, arg, subcommand

PROGRAM = "mamba2-jax"
DESCRIPTION = (
    "Mamba-2 in JAX: text from a checkpoint, what is in one, and one form of it made into another. "
    "`mamba2-jax --version` prints the version."
)

_Path: TypeAlias = Annotated[str | None, arg(metavar="PATH")]
_Number: TypeAlias = Annotated[float | None, arg(metavar="FLOAT")]
_Count: TypeAlias = Annotated[int | None, arg(metavar="INT")]


@dataclasses.dataclass(frozen=True)
class Generate:
    """Continue a prompt; the text appears as it is made.

    Options that are not given come from the checkpoint's generation_config.json, if it has one; without
    it the likeliest token is taken (greedy). A prompt that begins with a dash goes after `--`.
    """

    prompt: Positional[str]
    """The text to continue; `-` reads it from stdin, as it is."""
    model: _Path = None
    """A checkpoint's folder or hub id (None: the small Python-writing model in the package)."""
    tokenizer: _Path = None
    """Folder or hub id of the tokenizer (None: the checkpoint's own)."""
    max_new_tokens: _Count = None
    """How many tokens at most (None: 128)."""
    temperature: _Number = None
    """0 is greedy; above 0 draws."""
    top_k: _Count = None
    """Draw from the k likeliest tokens; 0 is no limit."""
    top_p: _Number = None
    """Draw from the likeliest tokens that together reach this probability."""
    min_p: _Number = None
    """Draw from tokens with at least this share of the likeliest one's probability."""
    repetition_penalty: _Number = None
    """Above 1 discourages tokens that are in the text already."""
    seed: int = 0
    """The same seed gives the same text."""
    stop: UseAppendAction[tuple[str, ...]] = ()
    """End at this string, which is not printed; may be given several times."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Compute dtype; auto is bfloat16 where the weights are stored so."""
    echo: bool = False
    """Print the prompt before the text."""

    def run(self) -> None:
        """Stream the text to stdout; all else goes to stderr."""
        prompt = _read_prompt(self.prompt)
        if not 0 <= self.seed < 2**32:
            raise CommandError(f"--seed {self.seed} must lie in 0..{2**32 - 1}")
        if "" in self.stop:
            raise CommandError("--stop is empty; give it at least one character")

        from mamba2_jax.cli.generate import prepare, write_and_time

        try:
            begin, max_new_tokens = prepare(self, prompt, _tell)
        except _MISTAKES as error:
            raise CommandError(str(error)) from error
        if self.echo:
            print(prompt, end="", flush=True)
        write_and_time(begin, max_new_tokens, _tell)


@dataclasses.dataclass(frozen=True)
class Info:
    """Describe a checkpoint: config, parameters, files, memory. Reads no weights."""

    path: Positional[_Path] = None
    """A folder or a hub id (None: the small Python-writing model in the package)."""
    kernels: bool = False
    """Tell instead which implementation of the scan would run on the devices here, and why."""

    def run(self) -> None:
        """Print the tables."""
        from mamba2_jax.cli.info import describe
        from mamba2_jax.cli.kernels import describe_kernels

        try:
            (describe_kernels if self.kernels else describe)(self.path)
        except _MISTAKES as error:
            raise CommandError(str(error)) from error


@dataclasses.dataclass(frozen=True)
class Convert:
    """Write a checkpoint in another form, or with another dtype. Never holds the model in memory.

    Reads transformers', state-spaces' and Mistral's form. The target appears when all is written.
    """

    source: Annotated[Positional[str], arg(metavar="SRC")]
    """A folder or a hub id."""
    target: Annotated[Positional[str], arg(metavar="DST")]
    """The folder to make."""
    to: Literal["transformers", "state-spaces"] = "transformers"
    """The form to write; state-spaces' needs PyTorch."""
    dtype: Literal["stored", "float32", "bfloat16", "float16"] = "stored"
    """What to store; A_log, dt_bias and D are never narrowed."""
    max_shard_size: Annotated[str, arg(metavar="SIZE")] = "5GB"
    """Bytes per file of transformers' form."""
    tokenizer: _Path = None
    """Folder or hub id whose tokenizer goes along (None: the source's, if it has one)."""
    allow_non_finite: bool = False
    """Take weights that hold NaN or infinity."""
    overwrite: bool = False
    """Replace the checkpoint in a folder that is not empty; other files in it stay."""

    def run(self) -> None:
        """Convert, with a progress bar on stderr."""
        from mamba2_jax.weights.convert import convert

        options = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        options["dtype"] = None if self.dtype == "stored" else self.dtype
        try:
            convert(**options, show_progress=True)
        except _MISTAKES as error:
            raise CommandError(str(error)) from error
        _tell(f"wrote {self.target}")


@dataclasses.dataclass(frozen=True)
class Finetune:
    """Train a model on texts, all its weights or adapters, and save it for transformers."""

    # Stands here for the list of commands: the options are in `cli.finetune`, which imports JAX.

    def run(self) -> None:
        """Say which options are missing; `main` takes those that are given to where they are known."""
        _finetune([])


class CommandError(Exception):
    """A mistake of the user's, to be told in one message."""


_MISTAKES = (OSError, ValueError, NotImplementedError, ImportError)

Command = (
    Annotated[Generate, subcommand("generate")]
    | Annotated[Info, subcommand("info")]
    | Annotated[Convert, subcommand("convert")]
    | Annotated[Finetune, subcommand("finetune")]
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        arguments: without the program's name; None: the process's own.

    Returns:
        The exit code: 0; 1 when the output cannot be written; 2 for a mistake in the arguments or the
        checkpoint; 130 after Ctrl-C; 141 when nobody reads the output any more; 128 and its number when a
        signal ended training early, after a checkpoint.
    """
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal that cannot show a character shows a mark
    try:
        if arguments == ["--version"]:
            print(PROGRAM, importlib.metadata.version("mamba2-jax-flax"), flush=True)
            return 0
        # without PyTorch beside it, transformers advises to install it at each start
        os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
        if arguments[:1] == ["finetune"]:
            return _finetune(arguments[1:])
        tyro.cli(Command, prog=PROGRAM, description=DESCRIPTION, args=arguments).run()
        sys.stdout.flush()
    except CommandError as error:
        _tell(f"{PROGRAM}: {error}")
        return 2
    except KeyboardInterrupt:
        return 130
    except OSError as error:  # of writing: what is read is checked in the commands
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes once more at exit
        if isinstance(error, BrokenPipeError):
            return 141
        _tell(f"{PROGRAM}: cannot write: {error}")
        return 1
    return 0


def _finetune(arguments: list[str]) -> int:
    from mamba2_jax.cli.finetune import finetune

    try:
        return finetune(arguments, f"{PROGRAM} finetune", _tell)
    except (*_MISTAKES, FloatingPointError) as error:
        raise CommandError(str(error)) from error


def _read_prompt(prompt: str) -> str:
    if prompt != "-":
        if not prompt:
            raise CommandError("the prompt is empty; give it at least one character, or - to read stdin")
        return prompt
    try:
        text = sys.stdin.buffer.read().decode("utf-8")
    except UnicodeDecodeError as error:
        raise CommandError(f"the prompt on stdin is not UTF-8 ({error})") from error
    if not text:
        raise CommandError("the prompt on stdin is empty; give it at least one character")
    return text


def _tell(message: object) -> None:
    print(message, file=sys.stderr, flush=True)
