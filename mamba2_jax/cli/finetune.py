"""`mamba2-jax finetune`: the options of a training run on the command line or in a file."""

import dataclasses
import signal
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, cast

import tyro
from tyro.conf import arg

from mamba2_jax import Mamba2ForCausalLM, load_tokenizer
from mamba2_jax.hub import resolve_folder
from mamba2_jax.processes import is_first, start_processes
from mamba2_jax.training import TrainConfig, Trainer, TrainResult, keep_freed_memory
from mamba2_jax.training.config import MeshOptions, build, read_fields


@dataclass(frozen=True)
class ProcessOptions:
    """Several processes that train as one, on one host or many: the same command in each."""

    coordinator: Annotated[str | None, arg(metavar="HOST:PORT")] = None
    """Of the first process; auto: as SLURM, Open MPI or Kubernetes say (None: one process)."""
    count: int | None = None
    """How many; not needed with auto."""
    index: int | None = None
    """Which one this is, from 0; not needed with auto."""
    timeout: int = 100
    """Seconds without a sign of life of one process after which all others end with an error."""

    def start(self) -> None:
        """Join the others, if there are any."""
        if self.coordinator is not None:
            start_processes(self.coordinator, self.count, self.index, timeout=self.timeout)
        elif self.count is not None or self.index is not None:
            raise ValueError("processes.count and processes.index need processes.coordinator: host:port")


@dataclass(frozen=True)
class Finetune:
    """Train a model on texts, all its weights or adapters (`--lora.rank 8`), and save it for transformers.

    A file of `--config`, JSON or YAML, may carry the same options (`lora: {rank: 8}`; `data` is a file, a
    list of files, or the options of `--data.*` with `files`); what is given on the command line wins.
    SIGTERM and Ctrl-C leave a checkpoint, and `--resume` goes on from it to the same weights.
    """

    data: Annotated[tuple[str, ...], arg(metavar="PATH...")]
    """Files (JSON lines with text, prompt and completion, or messages; Parquet; all others plain text),
    folders of them, or the id of a hub dataset."""
    train: Annotated[TrainConfig, arg(name="")]
    model: Annotated[str | None, arg(metavar="PATH")] = None
    """A checkpoint's folder or hub id (None: the small Python-writing model in the package)."""
    eval_data: Annotated[tuple[str, ...], arg(metavar="PATH...")] = ()
    """Likewise, never trained on (none: the share of `--data.eval-share`)."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Compute dtype; auto is bfloat16 where the weights are stored so. What is trained is float32."""
    processes: ProcessOptions = field(default_factory=ProcessOptions)
    config: Annotated[str | None, arg(metavar="FILE")] = None
    """Options in JSON or YAML."""

    def run(self, tell: Callable[[str], None]) -> TrainResult:
        """Train; `tell` is given lines for the user."""
        self.processes.start()
        if self.processes.coordinator is None and self.train.mesh == MeshOptions():
            keep_freed_memory()
        if not is_first():
            tell = _say_nothing
        folder = resolve_folder(self.model)
        dtype = None if self.dtype == "auto" else self.dtype
        model = Mamba2ForCausalLM.from_pretrained(
            folder, dtype=dtype, sharding=self.train.mesh.make(), report=lambda report: tell(str(report))
        )
        trainer = Trainer(
            model,
            self.train,
            self.data,
            tokenizer=load_tokenizer(folder),
            eval_data=self.eval_data or None,
            report=tell,
        )
        return trainer.fit()


def finetune(arguments: Sequence[str], program: str, tell: Callable[[str], None]) -> int:
    """Run the command.

    Args:
        arguments: behind `finetune`.
        program: its name in messages.
        tell: given lines for the user.

    Returns:
        The exit code: 0; 128 and the signal's number when one ended the run early.

    Raises:
        ValueError, OSError, ImportError, FloatingPointError: what was wrong, to be told.
    """
    file = _config_file(arguments)
    default = None if file is None else _read_config(file)
    with warnings.catch_warnings():
        # tyro: a default instance given for options that are not required
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
    """In all processes but the first."""


def _config_file(arguments: Sequence[str]) -> str | None:
    for this, following in zip(arguments, [*arguments[1:], None], strict=True):
        if this == "--config" and following is not None:
            return following
        if this.startswith("--config="):
            return this.removeprefix("--config=")
    return None


def _read_config(file: str) -> Finetune:
    """Build the command from a file; `data` may be files, or the options of `--data.*` with `files`."""
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
