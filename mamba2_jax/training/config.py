"""Options of a training run as frozen dataclasses, and reading them from a JSON or YAML file."""

import dataclasses
import math
import pathlib
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

from jax.sharding import Mesh

from mamba2_jax.lora import LoraConfig
from mamba2_jax.mesh import make_mesh
from mamba2_jax.ops.checks import check_choice
from mamba2_jax.training.checkpoint import CheckpointConfig
from mamba2_jax.training.data import DataConfig
from mamba2_jax.training.loss import REMAT, TOKENS_PER_SLICE
from mamba2_jax.training.optim import OptimConfig

_T = TypeVar("_T")


@dataclass(frozen=True)
class LoraOptions:
    """Options of LoRA training, named as in `LoraConfig`; without a rank, all weights are trained.

    Raises:
        ValueError: an invalid value; the message names it.
    """

    rank: int | None = None
    """Rank of the adapters (None: train all weights)."""
    alpha: float | None = None
    """The adapters are scaled by alpha / rank (None: alpha = rank)."""
    targets: tuple[str, ...] = ("in_proj", "out_proj")
    """Modules to adapt: embeddings, in_proj, conv1d, out_proj, lm_head, or longer path suffixes."""
    dropout: float = 0.0
    use_rslora: bool = False
    """Scale by alpha / sqrt(rank) instead."""
    merge: bool = False
    """Also save the model with the adapter merged into its weights."""

    def __post_init__(self):
        self.config()

    def config(self) -> LoraConfig | None:
        """Return the settings for `add_lora`, or None without a rank."""
        if self.rank is None:
            return None
        return LoraConfig(self.rank, self.alpha, self.targets, self.dropout, self.use_rslora)


@dataclass(frozen=True)
class MeshOptions:
    """Number of devices along each mesh axis, as in `sharding.make_mesh`; all 1: train on one device."""

    data: int = 1
    """Splits the rows of a batch. At most one axis may be -1: all remaining devices."""
    fsdp: int = 1
    """Splits rows too, and shards weights, gradients and optimizer moments."""
    sequence: int = 1
    """Splits the tokens of a row into pieces."""
    tensor: int = 1
    """Splits the heads."""

    def make(self) -> Mesh | None:
        """Create the mesh over all devices, or return None if every axis is 1.

        Raises:
            ValueError: the product of the sizes is not the number of devices; the message suggests sizes.
        """
        sizes = dataclasses.asdict(self)
        return None if set(sizes.values()) == {1} else make_mesh(**sizes)


@dataclass(frozen=True)
class TrainConfig:
    """All options of a training run.

    Raises:
        ValueError: an invalid value; the message names it.
    """

    output: str | pathlib.Path
    """Folder for checkpoints, metrics and the trained model."""
    resume: bool = False
    """Resume from the newest checkpoint in `output`, or start if there is none."""
    steps: int | None = None
    """Number of optimizer steps (None: derived from `epochs`)."""
    epochs: int = 1
    """Passes over the data, if `steps` is not given."""
    batch_size: int = 8
    """Rows per batch."""
    accumulate: int = 1
    """Batches whose gradients are accumulated per optimizer step."""
    remat: Literal["none", "dots", "block"] = "none"
    """Remat policy, what each block stores for the backward pass: all, products with weights, its input."""
    tokens_per_slice: int = TOKENS_PER_SLICE
    """Tokens whose logits are in memory at the same time."""
    balance_loss: float = 0.0
    """Factor of the auxiliary loss of an uneven load of the experts (0: none); transformers'
    router_aux_loss_coef."""
    tokens_per_turn: int | None = None
    """Most tokens of a batch, in whole rows, that one device runs at the same time; dropout is drawn for each
    turn (None: on a CPU as many as its cache holds, elsewhere all; 0: all)."""
    seed: int = 0
    """Seed of the data order, new adapters and dropout."""
    max_skipped: int = 5
    """Abort after this many consecutive steps with a non-finite loss or gradient."""
    eval_every: int = 500
    """Steps between evaluations, if there is evaluation data; one more runs at the end."""
    tensorboard: bool = True
    """Also write TensorBoard event files."""
    wandb: str | None = None
    """Also log to this Weights & Biases project."""
    progress: bool = True
    """Show a progress bar on stderr."""
    data: DataConfig = field(default_factory=DataConfig)
    lora: LoraOptions = field(default_factory=LoraOptions)
    optim: OptimConfig = field(default_factory=OptimConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    mesh: MeshOptions = field(default_factory=MeshOptions)

    def __post_init__(self):
        check_choice("TrainConfig", "remat", self.remat, REMAT)
        if not str(self.output):
            raise ValueError("TrainConfig: output is empty; name a folder")
        counts = ("epochs", "batch_size", "accumulate", "tokens_per_slice", "max_skipped", "eval_every")
        for name in (*counts, *(["steps"] if self.steps is not None else [])):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"TrainConfig: {name}={value!r} must be an integer of at least 1")
        turn = self.tokens_per_turn
        if turn is not None and (isinstance(turn, bool) or not isinstance(turn, int) or turn < 0):
            raise ValueError(
                f"TrainConfig: tokens_per_turn={turn!r} must be an integer of at least 0, where 0 is all"
            )
        if not 0 <= self.balance_loss < math.inf:
            raise ValueError(f"TrainConfig: balance_loss={self.balance_loss} must be finite and at least 0")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"TrainConfig: seed={self.seed} must lie in 0..{2**32 - 1}")


def read_fields(path: str | pathlib.Path) -> dict[str, Any]:
    """Read options from a JSON or YAML file into a dict.

    Raises:
        ValueError: not JSON or YAML, or not a mapping.
    """
    path = pathlib.Path(path)
    import yaml  # YAML includes JSON

    try:
        fields = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: cannot be read as JSON or YAML ({error})") from error
    if not isinstance(fields, dict):
        raise ValueError(f"{path}: wants names and values of options, got a {type(fields).__name__}")
    return fields


def build(kind: type[_T], fields: Mapping[str, Any], where: str) -> _T:
    """Build a dataclass from plain values, recursively; converts integers to floats and lists to tuples.

    Args:
        kind: the dataclass.
        fields: values by field name; missing fields keep their defaults.
        where: source of the values, for error messages.

    Raises:
        ValueError: an unknown name, a value of the wrong type, or a missing field without a default.
    """
    hints = typing.get_type_hints(kind)
    known = {f.name: f for f in dataclasses.fields(kind)}  # pyright: ignore[reportArgumentType]
    unknown = [name for name in fields if name not in known]
    if unknown:
        raise ValueError(f"{where}: there is no option {unknown[0]!r}; there are {', '.join(known)}")
    values = {name: _value(hints[name], value, f"{where}: {name}") for name, value in fields.items()}
    for name, option in known.items():
        if name not in values and option.default is option.default_factory is dataclasses.MISSING:
            raise ValueError(f"{where}: {name} is missing")
    return kind(**values)


def _value(hint: Any, value: Any, where: str) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Annotated:
        return _value(arguments[0], value, where)
    if origin in (typing.Union, types.UnionType):
        for choice in sorted(arguments, key=lambda choice: choice is not type(value)):
            try:
                return _value(choice, value, where)
            except ValueError:
                continue
        raise ValueError(f"{where}={value!r} is none of {', '.join(map(_written, arguments))}")
    if dataclasses.is_dataclass(hint) and isinstance(value, Mapping):
        return build(typing.cast(type, hint), value, where)
    if origin is tuple and isinstance(value, list | tuple):
        return tuple(_value(arguments[0], item, where) for item in value)
    if origin is Literal and value in arguments:
        return value
    if hint is float and isinstance(value, str):  # YAML parses 1e-4 as text
        try:
            return float(value)
        except ValueError:
            pass
    fits = (
        isinstance(value, int | float)
        if hint is float
        else isinstance(hint, type) and isinstance(value, hint)
    )
    if not fits or (isinstance(value, bool) and hint is not bool):
        raise ValueError(f"{where}={value!r} is not {_written(hint)}")
    return hint(value) if hint is float else value


def _written(hint: Any) -> str:
    if typing.get_origin(hint) is Literal:
        return "one of " + ", ".join(map(repr, typing.get_args(hint)))
    return "nothing" if hint is type(None) else getattr(hint, "__name__", str(hint))
