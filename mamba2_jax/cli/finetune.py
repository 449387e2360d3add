"""Run `mamba2-jax finetune`: training options from the command line and from a file."""

import dataclasses
import itertools
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
from mamba2_jax.training import TrainConfig, Trainer, TrainResult, keep_freed_memory
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
        self.processes.start()
        keep_compiled()
        if self.processes.coordinator is None and self.train.mesh == MeshOptions():
            keep_freed_memory()
        if not is_first():
            tell = _say_nothing
        folder = resolve_folder(self.model, self.revision)
        dtype = None if self.dtype == "auto" else self.dtype
        with working("loading the model"):
            tokenizer = load_tokenizer(folder if self.tokenizer is None else self.tokenizer)
            model = Mamba2ForCausalLM.from_pretrained(
                folder, dtype=dtype, sharding=self.train.mesh.make(), report=lambda report: tell(str(report))
            )
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


def finetune(arguments: Sequence[str], program: str, tell: Callable[[str], None]) -> int:
    """Parse the options and run the training.

    Args:
        arguments: the arguments after `finetune`.
        program: name of the command in messages.
        tell: receives messages for the user, one line each.

    Returns:
        The exit code: 0; 128 plus the signal number if a signal ended the run early.

    Raises:
        ValueError, OSError, ImportError, FloatingPointError: errors whose message is meant for the user.
    """
    file = _config_file(arguments)
    default = None if file is None else _read_config(file)
    with warnings.catch_warnings():
        # tyro warns of a default instance for options that are not required
        warnings.simplefilter("ignore", UserWarning)
        command = cast(Finetune, tyro.cli(Finetune, prog=program, args=list(arguments), default=default))
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


def _config_file(arguments: Sequence[str]) -> str | None:
    for this, following in itertools.pairwise([*arguments, ""]):
        if this == "--config":
            return following
        if this.startswith("--config="):
            return this.removeprefix("--config=")
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


def _read_config(file: str) -> Finetune:
    """Read the command from an options file; `data` is files, or the options of `--data.*` with `files`."""
    fields: dict[str, Any] = read_fields(file)
    data = fields.pop("data", None)
    if isinstance(data, dict):
        files = data.pop("files", None)
        fields["data"] = data
    else:
        files = data
    if files is None:
        raise ValueError(f"{file}: data is missing; name a file")
    own = {option.name for option in dataclasses.fields(Finetune)} - {"data", "train", "config"}
    ours = {name: fields.pop(name) for name in own & fields.keys()}
    for name in ("files", "eval_data"):
        value = files if name == "files" else ours.get("eval_data", [])
        value = [value] if isinstance(value, str) else value
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise ValueError(f"{file}: {name}={value!r} must be a file or a list of files")
        ours["data" if name == "files" else name] = value
    return build(Finetune, {**ours, "train": fields, "config": file}, file)
