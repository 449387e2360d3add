"""Run `mamba2-jax finetune`: training options from the command line and from a file."""

import dataclasses
import itertools
import json
import pathlib
import signal
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, cast

import tyro
from tyro.conf import arg

from mamba2_jax import Mamba2ForCausalLM, load_tokenizer
from mamba2_jax.cli.waiting import keep_compiled, working
from mamba2_jax.hub import resolve_folder
from mamba2_jax.processes import is_first, start_processes
from mamba2_jax.training import LoraOptions, TrainConfig, Trainer, TrainResult, keep_freed_memory
from mamba2_jax.training.checks import check_output
from mamba2_jax.training.config import MeshOptions
from mamba2_jax.training.options import build, plain, read_fields


@dataclass(frozen=True)
class ProcessOptions:
    """Multi-process training, on one or several hosts; every process runs the same command."""

    coordinator: Annotated[str | None, arg(metavar="HOST:PORT")] = None
    """Address of process 0; auto: detected from SLURM, Open MPI or Kubernetes (None: one process)."""
    count: int | None = None
    """Number of processes; not needed with auto."""
    index: int | None = None
    """Index of this process, from 0; not needed with auto."""
    timeout: int = 100
    """Seconds without a heartbeat of one process after which all others end with an error."""

    def start(self) -> None:
        """Connect to the other processes, if `coordinator` is set."""
        if self.coordinator is not None:
            start_processes(self.coordinator, self.count, self.index, timeout=self.timeout)
            return
        given = [f.name for f in dataclasses.fields(self) if getattr(self, f.name) != f.default]
        if given:
            raise ValueError(f"processes.{given[0]} needs processes.coordinator: host:port, or auto")


@dataclass(frozen=True)
class Finetune:
    """Train all weights of a model, or LoRA adapters (`--lora.rank 8`), on texts, and save for transformers.

    The file of `--config`, JSON or YAML, may set the same options (`lora: {rank: 8}`; `data` is a file, a
    list of files, or the options of `--data.*` with `files`); the command line overrides the file. SIGTERM
    and Ctrl-C save a checkpoint, from which `--resume` continues to the same weights.
    """

    data: Annotated[tuple[str, ...], arg(metavar="PATH...")]
    """Training files (JSON lines, a JSON array, CSV or Parquet with text, prompt and completion, messages,
    ShareGPT's or Alpaca's fields; else plain text; also .gz), folders of them, or the id of a hub dataset."""
    train: Annotated[TrainConfig, arg(name="")]
    model: Annotated[str | None, arg(metavar="PATH")] = None
    """Folder or hub id of the checkpoint (None: the embedded Python-writing model)."""
    tokenizer: Annotated[str | None, arg(metavar="PATH")] = None
    """Folder or hub id of the tokenizer, for a checkpoint without one (None: the checkpoint's)."""
    from_config: Annotated[str | None, arg(metavar="CONFIG")] = None
    """Instead of `--model`, a new model with random weights: a preset, a config file in JSON or YAML, or a
    JSON object of fields of `Mamba2Config`."""
    tokenizer_vocab: int | None = None
    """With `--from-config`: train a tokenizer of this many tokens on the data."""
    revision: str | None = None
    """Branch, tag or commit of a checkpoint on the hub."""
    eval_data: Annotated[tuple[str, ...], arg(metavar="PATH...")] = ()
    """Evaluation files, as for `data` (none: the fraction `--data.eval-share` of `data`)."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Compute dtype; auto is bfloat16 if the weights are stored in bfloat16. Trained weights are float32."""
    processes: ProcessOptions = field(default_factory=ProcessOptions)
    config: Annotated[str | None, arg(metavar="FILE")] = None
    """Options file, in JSON or YAML."""

    def run(self, tell: Callable[[str], None]) -> TrainResult:
        """Train and return the result; `tell` receives messages for the user, one line each."""
        self._check()
        self.processes.start()
        keep_compiled()
        if self.processes.coordinator is None and self.train.mesh == MeshOptions():
            keep_freed_memory()
        if not is_first():
            tell = _say_nothing
        model, tokenizer = self._new(tell) if self.from_config else self._loaded(tell)
        trainer = Trainer(
            model,
            self.train,
            self.data,
            tokenizer=tokenizer,
            eval_data=self.eval_data or None,
            report=tell,
            options=_written(self),
        )
        return trainer.fit()

    def _check(self) -> None:
        """Refuse options that contradict one another, before anything is read or made."""
        if not self.data:
            raise ValueError("data is missing; name a file (--data)")
        new = self.from_config is not None
        if new and self.model is not None:
            raise ValueError(f"from_config={self.from_config} is a new model; leave model={self.model} out")
        if self.tokenizer_vocab is not None and not new:
            raise ValueError(f"tokenizer_vocab={self.tokenizer_vocab} needs from_config: a model has its own")
        if new and (self.tokenizer is None) == (self.tokenizer_vocab is None):
            raise ValueError(
                f"from_config={self.from_config}: a new model has no tokenizer: name one (--tokenizer) or "
                "train one on the data (--tokenizer-vocab 4096)"
            )
        if new and self.train.lora != LoraOptions():
            raise ValueError(
                f"from_config={self.from_config}: lora.* adapts a trained model; a new one is trained whole"
            )

    def _loaded(self, tell: Callable[[str], None]) -> tuple[Mamba2ForCausalLM, Any]:
        """Load the model and its tokenizer."""
        folder = resolve_folder(self.model, self.revision)
        dtype = None if self.dtype == "auto" else self.dtype
        with working("loading the model"):
            tokenizer = load_tokenizer(folder if self.tokenizer is None else self.tokenizer)
            model = Mamba2ForCausalLM.from_pretrained(
                folder, dtype=dtype, sharding=self.train.mesh.make(), report=lambda report: tell(str(report))
            )
        return model, tokenizer

    def _new(self, tell: Callable[[str], None]) -> tuple[Mamba2ForCausalLM, Any]:
        """Initialise a model; load or train its tokenizer."""
        from mamba2_jax.cli.architecture import new_model, read_architecture, tokenizer_of_data

        value = self.from_config or ""
        read_architecture(value)  # a mistake in it, before data is read
        check_output(self.train, pathlib.Path(self.train.output).expanduser())
        if self.tokenizer_vocab is None:
            tokenizer = load_tokenizer(self.tokenizer)
        else:
            tokenizer = tokenizer_of_data(self.data, self.train, self.tokenizer_vocab, tell)
        dtype = None if self.dtype == "auto" else self.dtype
        return new_model(value, tokenizer, self.train.seed, dtype, tell), tokenizer


def finetune(arguments: Sequence[str], program: str, tell: Callable[[str], None]) -> int:
    """Parse the options and run the training; as for `run_command`."""
    return run_command(Finetune, arguments, program, tell)


def run_command(
    kind: type[Finetune], arguments: Sequence[str], program: str, tell: Callable[[str], None]
) -> int:
    """Parse the options of a command and run the training.

    Args:
        kind: the command.
        arguments: the arguments after the command's name.
        program: name of the command in messages.
        tell: receives messages for the user, one line each.

    Returns:
        The exit code: 0; 128 plus the signal number if a signal ended the run early.

    Raises:
        ValueError, OSError, ImportError, FloatingPointError: errors whose message is meant for the user.
    """
    file = value_of("--config", arguments)
    default = None if file is None else _read_config(kind, file, value_of("--output", arguments))
    with warnings.catch_warnings():
        # tyro warns of a default instance for options that are not required
        warnings.simplefilter("ignore", UserWarning)
        command = cast(Finetune, tyro.cli(kind, prog=program, args=list(arguments), default=default))
    result = command.run(tell)
    if result.stopped_by is not None:
        name = signal.Signals(result.stopped_by).name
        tell(f"stopped by {name} after step {result.step}; --resume goes on from there")
        return 128 + result.stopped_by
    loss = "" if result.loss is None else f", loss {result.loss:.4f}"
    tell(f"{result.step} steps{loss}; metrics and the curve are in {result.output}")
    return 0


def _say_nothing(line: str) -> None:
    """Discard a message, in all processes but the first."""


def value_of(option: str, arguments: Sequence[str]) -> str | None:
    """Return the value of an option, `--option VALUE` or `--option=VALUE`; None if it is not given."""
    for this, following in itertools.pairwise([*arguments, ""]):
        if this == option:
            return following
        if this.startswith(f"{option}="):
            return this.removeprefix(f"{option}=")
    return None


def _written(command: Finetune) -> dict[str, Any]:
    """Return the options in the form of an options file, from which `--config` starts or resumes the run."""
    fields = plain(command)
    train = fields.pop("train")
    files, data = fields.pop("data"), train.pop("data")
    for name in ("config", "processes"):  # of this start alone
        del fields[name]
    for name in ("resume", "new_learning_rate"):
        del train[name]
    return {**fields, **train, "data": {"files": files, **data}}


def _read_config(kind: type[Finetune], file: str, output: str | None) -> Finetune:
    """Read the command from an options file; `output` is that of the command line, if any.

    `data` is files, or the options of `--data.*` with `files`; `from_config` may be a mapping of fields.
    """
    fields: dict[str, Any] = read_fields(file)
    if isinstance(fields.get("from_config"), dict):
        fields["from_config"] = json.dumps(fields["from_config"])
    data = fields.pop("data", None)
    if isinstance(data, dict):
        files = data.pop("files", None)
        fields["data"] = data
    else:
        files = data
    files = () if files is None else files  # `--data` may name them
    if output is not None:
        fields["output"] = output
    own = {option.name for option in dataclasses.fields(Finetune)} - {"data", "train", "config"}
    ours = {name: fields.pop(name) for name in own & fields.keys()}
    for name in ("files", "eval_data"):
        value = files if name == "files" else ours.get("eval_data", [])
        value = [value] if isinstance(value, str) else value
        if not isinstance(value, list | tuple) or not all(isinstance(item, str) for item in value):
            raise ValueError(f"{file}: {name}={value!r} must be a file or a list of files")
        ours["data" if name == "files" else name] = value
    return build(kind, {**ours, "train": fields, "config": file}, file)
