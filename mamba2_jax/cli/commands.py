"""Define the commands of `mamba2-jax`; `evaluate` and `perplexity` are in `cli.evaluate_options`.

Each command imports its dependencies when it runs, so that `--help` and a mistyped option answer at once.
"""

import dataclasses
import importlib.metadata
import io
import os
import sys
from collections.abc import Sequence
from typing import Annotated, Literal

import tyro
from tyro.conf import Positional, arg, subcommand

from mamba2_jax.cli.errors import MISTAKES as _MISTAKES
from mamba2_jax.cli.errors import CommandError
from mamba2_jax.cli.errors import tell as _tell
from mamba2_jax.cli.evaluate_options import Evaluate, Perplexity
from mamba2_jax.cli.text_options import Count, Path, TextOptions
from mamba2_jax.cli.waiting import working

PROGRAM = "mamba2-jax"
DESCRIPTION = (
    "Mamba-2 in JAX: generate text from a checkpoint, or chat with it; describe, convert, fine-tune or "
    "evaluate it, or train a new one. `mamba2-jax --version` prints the version."
)


@dataclasses.dataclass(frozen=True)
class Generate(TextOptions):
    """Continue a prompt and stream the text to stdout.

    Options that are not given default to the checkpoint's generation_config.json, if it has one, else to
    greedy decoding. Put a prompt that begins with a dash after `--`.
    """

    prompt: Positional[str]
    """Text to continue; `-` reads stdin, unchanged."""
    chat: bool = False
    """Answer the prompt as a message, under the chat template."""
    echo: bool = False
    """Print the prompt before the text."""
    num_return_sequences: Count = None
    """Print so many texts, sampled or of as many beams, each under a line with its number."""

    def run(self) -> None:
        """Stream the text to stdout; notes and timings go to stderr."""
        prompt = _read_prompt(self.prompt)
        self.check()
        for option, value in (("--system", self.system), ("--chat-template", self.chat_template)):
            if value is not None and not self.chat:
                raise CommandError(f"{option} needs --chat")

        with working("starting"):
            from mamba2_jax.cli.generate import prepare, write_and_time

        try:
            begin, max_new_tokens = prepare(self, prompt, _tell)
        except _MISTAKES as error:
            raise CommandError(str(error)) from error
        if self.echo:
            print(prompt, end="", flush=True)
        write_and_time(begin, max_new_tokens, _tell)


@dataclasses.dataclass(frozen=True)
class Chat(TextOptions):
    """Chat with a model: a line is a message, and `/help` lists the commands.

    The history is kept as a state, so that each turn reads only what is new; `/save` keeps it for another
    day. Ctrl-C ends an answer, not the chat.
    """

    load: Annotated[str | None, arg(metavar="FILE")] = None
    """Go on with a conversation that `/save` wrote."""

    def run(self) -> None:
        """Answer lines of stdin on stdout; notes go to stderr."""
        self.check()

        with working("starting"):
            from mamba2_jax.cli.chat import start_chat

        try:
            run = start_chat(self, _tell)
        except _MISTAKES as error:
            raise CommandError(str(error)) from error
        run()


@dataclasses.dataclass(frozen=True)
class Info:
    """Describe a checkpoint: config, number of parameters, memory and files. Reads no weights."""

    path: Positional[Path] = None
    """Folder or hub id of a checkpoint or an adapter (None: the embedded Python-writing model)."""
    adapter: Path = None
    """Folder or hub id of a LoRA adapter, described too."""
    kernels: bool = False
    """Show instead which implementation of the scan runs on the devices of this machine, and why."""

    def run(self) -> None:
        """Print the tables to stdout."""
        from mamba2_jax.cli.info import describe
        from mamba2_jax.cli.kernels import describe_kernels

        if self.kernels and self.adapter is not None:
            raise CommandError("--adapter and --kernels: an adapter runs on no other kernel; leave one out")
        try:
            if self.kernels:
                describe_kernels(self.path)
            else:
                describe(self.path, self.adapter)
        except _MISTAKES as error:
            raise CommandError(str(error)) from error


@dataclasses.dataclass(frozen=True)
class Convert:
    """Convert a checkpoint to another form or dtype, without holding the model in memory.

    Reads the forms of transformers, state-spaces and Mistral, and the checkpoints of a training run. The
    write is atomic: the target is complete or absent.
    """

    source: Annotated[Positional[str], arg(metavar="SRC")]
    """Folder or hub id of the source; or a checkpoint of a run, run/checkpoints/500, or the run, for its best
    checkpoint. An adapter is merged into its base."""
    target: Annotated[Positional[str], arg(metavar="DST")]
    """Folder to write."""
    to: Literal["transformers", "state-spaces"] = "transformers"
    """Form to write; state-spaces needs PyTorch."""
    dtype: Literal["stored", "float32", "bfloat16", "float16"] = "stored"
    """Stored dtype; A_log, dt_bias and D are never narrowed."""
    max_shard_size: Annotated[str, arg(metavar="SIZE")] = "5GB"
    """Maximum bytes per weight file, for the form transformers."""
    tokenizer: Path = None
    """Folder or hub id whose tokenizer is copied (None: the source's, if it has one)."""
    allow_non_finite: bool = False
    """Accept weights that hold NaN or infinity."""
    overwrite: bool = False
    """Replace the checkpoint in a non-empty folder; its other files are kept."""
    adapter: Path = None
    """Folder or hub id of a LoRA adapter to merge into the source; this holds the model in memory."""
    base: Path = None
    """Folder or hub id of the model below the adapter in SRC (None: the one that it was trained on)."""

    def run(self) -> None:
        """Convert the checkpoint, with a progress bar on stderr."""
        from mamba2_jax.cli.convert import convert_command

        try:
            convert_command(self, _tell)
        except _MISTAKES as error:
            raise CommandError(str(error)) from error
        _tell(f"wrote {self.target}")


@dataclasses.dataclass(frozen=True)
class Finetune:
    """Train all weights of a model, or LoRA adapters, on texts, and save it for transformers."""

    # A stub for `--help`: the options are defined in `cli.finetune`, which imports JAX.

    def run(self) -> None:
        """Report the missing options; `main` passes given options to `cli.finetune` directly."""
        _train("finetune", [])


@dataclasses.dataclass(frozen=True)
class Pretrain:
    """Train a new model on texts, from random weights, with a tokenizer of its own if wanted."""

    # A stub for `--help`, as `Finetune`.

    def run(self) -> None:
        """Report the missing options; `main` passes given options to `cli.pretrain` directly."""
        _train("pretrain", [])


Command = (
    Annotated[Generate, subcommand("generate")]
    | Annotated[Chat, subcommand("chat")]
    | Annotated[Info, subcommand("info")]
    | Annotated[Convert, subcommand("convert")]
    | Annotated[Finetune, subcommand("finetune")]
    | Annotated[Pretrain, subcommand("pretrain")]
    | Annotated[Evaluate, subcommand("evaluate")]
    | Annotated[Perplexity, subcommand("perplexity")]
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the command line and run the command.

    Args:
        arguments: without the program name; None: `sys.argv[1:]`.

    Returns:
        The exit code: 0; 1 if the output cannot be written; 2 for an error in the arguments or the
        checkpoint; 130 after Ctrl-C; 141 if the output pipe is closed; 128 plus the signal number if a signal
        ended training early, after a checkpoint.
    """
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # characters that the terminal cannot encode become "?"
    try:
        if arguments == ["--version"]:
            print(PROGRAM, importlib.metadata.version("mamba2-jax-flax"), flush=True)
            return 0
        if arguments[:1] in (["finetune"], ["pretrain"]):
            return _train(arguments[0], arguments[1:])
        tyro.cli(Command, prog=PROGRAM, description=DESCRIPTION, args=arguments).run()
        sys.stdout.flush()
    except CommandError as error:
        _tell(f"{PROGRAM}: {error}")
        return 2
    except KeyboardInterrupt:
        return 130
    except OSError as error:  # from writing: the commands turn errors of reading into CommandError
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes once more at exit
        if isinstance(error, BrokenPipeError):
            return 141
        _tell(f"{PROGRAM}: cannot write: {error}")
        return 1
    return 0


def _train(name: str, arguments: list[str]) -> int:
    with working("starting"):
        if name == "finetune":
            from mamba2_jax.cli.finetune import finetune as run
        else:
            from mamba2_jax.cli.pretrain import pretrain as run

    try:
        return run(arguments, f"{PROGRAM} {name}", _tell)
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
