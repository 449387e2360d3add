"""All options of a training run, as one frozen dataclass; a JSON or YAML file may carry them."""

import dataclasses
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
    """Adapters to train instead of the weights; none without a rank. The names are those of `LoraConfig`.

    Raises:
        ValueError: a value that makes no sense, named.
    """

    rank: int | None = None
    """Inner size of the adapters (None: train all weights)."""
    alpha: float | None = None
    """They are multiplied by alpha / rank (None: alpha = rank)."""
    targets: tuple[str, ...] = ("in_proj", "out_proj")
    """Of embeddings, in_proj, conv1d, out_proj, lm_head, or longer ends of paths."""
    dropout: float = 0.0
    use_rslora: bool = False
    """Multiply by alpha / sqrt(rank) instead."""
    merge: bool = False
    """Beside the adapter, also save the model with the adapter merged into it."""

    def __post_init__(self):
        self.config()

    def config(self) -> LoraConfig | None:
        """What `add_lora` takes."""
        if self.rank is None:
            return None
        return LoraConfig(self.rank, self.alpha, self.targets, self.dropout, self.use_rslora)


@dataclass(frozen=True)
class MeshOptions:
    """Devices along each axis of the mesh, as for `sharding.make_mesh`; with 1 each, one device trains."""

    data: int = 1
    """Rows of a batch; -1, for at most one axis: all devices that the others leave."""
    fsdp: int = 1
    """Rows too; weights, gradients and moments are split."""
    sequence: int = 1
    """Tokens of a row."""
    tensor: int = 1
    """Heads."""

    def make(self) -> Mesh | None:
        """Return the mesh over all devices, or None for one device.

        Raises:
            ValueError: sizes that do not multiply to the number of devices; says what would fit.
        """
        sizes = dataclasses.asdict(self)
        return None if set(sizes.values()) == {1} else make_mesh(**sizes)


@dataclass(frozen=True)
class TrainConfig:
    """A training run.

    Raises:
        ValueError: a value that makes no sense, named.
    """

    output: str | pathlib.Path
    """The folder for checkpoints, metrics and the result."""
    resume: bool = False
    """Go on from the newest checkpoint in `output`, or begin when there is none."""
    steps: int | None = None
    """Updates to make (None: as many as `epochs` takes)."""
    epochs: int = 1
    """How often the data is read, when `steps` is not given."""
    batch_size: int = 8
    """Rows at once."""
    accumulate: int = 1
    """Batches to an update."""
    remat: Literal["none", "dots", "block"] = "none"
    """What is kept of a block for the backward pass: all, products with weights, its input."""
    tokens_per_slice: int = TOKENS_PER_SLICE
    """Tokens whose logits exist at once."""
    tokens_per_turn: int | None = None
    """At most so many tokens of a batch, but whole rows, run at once on one device; dropout is drawn for each
    turn (None: on a CPU as many as its cache holds, elsewhere all; 0: all)."""
    seed: int = 0
    """Of the order of the data, of new adapters and of dropout."""
    max_skipped: int = 5
    """Give up after so many steps in a row that are not finite."""
    eval_every: int = 500
    """Steps between evaluations, when there is evaluation data; one more at the end."""
    tensorboard: bool = True
    """Also write the metrics for TensorBoard."""
    wandb: str | None = None
    """Also send them to this Weights & Biases project."""
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
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"TrainConfig: seed={self.seed} must lie in 0..{2**32 - 1}")


def read_fields(path: str | pathlib.Path) -> dict[str, Any]:
    """Read the options in a JSON or YAML file.

    Raises:
        ValueError: not JSON or YAML, or not a mapping.
    """
    path = pathlib.Path(path)
    import yaml  # of what YAML is, JSON is a part

    try:
        fields = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: cannot be read as JSON or YAML ({error})") from error
    if not isinstance(fields, dict):
        raise ValueError(f"{path}: wants names and values of options, got a {type(fields).__name__}")
    return fields


def build(kind: type[_T], fields: Mapping[str, Any], where: str) -> _T:
    """Make a dataclass from plain values, nested ones too; integers pass for floats, lists for tuples.

    Args:
        kind: the dataclass.
        fields: its fields by name; those left out keep their defaults.
        where: what an error names.

    Raises:
        ValueError: a name or a value that does not fit; a field that has no default and is left out.
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
    if hint is float and isinstance(value, str):  # YAML takes 1e-4 for text
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
