"""Options of a training run as frozen dataclasses."""

import dataclasses
import math
import pathlib
from dataclasses import dataclass, field
from typing import Literal

from jax.sharding import Mesh

from mamba2_jax.files import refuse_remote
from mamba2_jax.lora import LoraConfig
from mamba2_jax.mesh import make_mesh
from mamba2_jax.ops.checks import check_choice
from mamba2_jax.training.checkpoint import CheckpointConfig
from mamba2_jax.training.data import DataConfig
from mamba2_jax.training.lanes import Curriculum
from mamba2_jax.training.loss import REMAT, TOKENS_PER_SLICE
from mamba2_jax.training.optim import OptimConfig


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
    use_dora: bool = False
    """Train the norm of each output channel's weights apart from their direction (DoRA)."""
    modules_to_save: tuple[str, ...] = ()
    """Modules and parameters to train in full beside the adapters: embeddings, lm_head, A_log, D, dt_bias."""
    merge: bool = False
    """Also save the model with the adapter merged into its weights."""
    merge_dtype: Literal["stored", "float32", "bfloat16", "float16"] = "stored"
    """Dtype of the merged model; what rounding takes away of the training is told."""
    init: str | None = None
    """Folder or hub id of an adapter to begin from, with its own rank, targets, alpha and dropout."""

    def __post_init__(self):
        given = {
            f.name: value for f in dataclasses.fields(self) if (value := getattr(self, f.name)) != f.default
        }
        no_adapter = [name for name in given if name != "init"] if self.init is None else []
        if self.rank is None and no_adapter:
            raise ValueError(
                f"LoraOptions: {no_adapter[0]}={given[no_adapter[0]]!r} needs a rank; without lora.rank no "
                "adapter is made and all weights are trained"
            )
        own = [name for name in given if name not in ("init", "merge", "merge_dtype")]
        if self.init is not None and own:
            raise ValueError(
                f"LoraOptions: {own[0]}={given[own[0]]} is set beside init, whose adapter has its own"
            )
        if self.merge_dtype != "stored" and not self.merge:
            raise ValueError(f"LoraOptions: merge_dtype={self.merge_dtype!r} needs merge")
        self.config()

    def config(self) -> LoraConfig | None:
        """Return the settings for `add_lora`, or None without a rank."""
        if self.rank is None:
            return None
        return LoraConfig(
            self.rank,
            self.alpha,
            self.targets,
            self.dropout,
            self.use_rslora,
            use_dora=self.use_dora,
            modules_to_save=self.modules_to_save,
        )


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
    """Resume from the newest checkpoint in `output`, or start if there is none. More steps or epochs than the
    run had are added to it."""
    new_learning_rate: bool = False
    """With `resume`: go on with this `optim.learning_rate`, whatever that of the run was."""
    steps: int | None = None
    """Number of optimizer steps (None: derived from `epochs`)."""
    epochs: int | None = None
    """Passes over the data (None: 1, or as many as `steps` take)."""
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
    carry_state: bool = False
    """Rows go on in the next batch from the state that they ended in (truncated backpropagation through
    time), so that documents may be of any length; with `accumulate`, a step takes that many pieces of each
    row."""
    pass_gradient: bool = False
    """With `carry_state` and `accumulate`: let the gradient flow from piece to piece of one step."""
    curriculum: tuple[str, ...] = ()
    """With `carry_state`: shorter rows at first, as LENGTH:STEPS, e.g. 64:500 128:500; then rows of
    `data.max_length`. Rows go on over the changes."""
    attention_context: int | None = None
    """With `carry_state` in a model with attention: tokens before a piece that attention layers see, beside
    those of the piece (None: the whole document, exact; 0: none). The buffers take memory of this length."""
    train_initial_state: bool = False
    """Also train the state that a document begins with, of the Mamba-2 layers; needs `data.rows` pad."""
    seed: int = 0
    """Seed of the data order, new adapters and dropout."""
    max_skipped: int = 5
    """Abort after this many consecutive steps with a non-finite loss or gradient."""
    eval_every: int | None = None
    """Steps between evaluations, if there is evaluation data. None: as between checkpoints, if the best of
    these is kept, else a fifth of the run, at most 500. The first is before step 1, the last at the end."""
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
        refuse_remote(self.output)
        counts = ("batch_size", "accumulate", "tokens_per_slice", "max_skipped")
        optional = [name for name in ("steps", "epochs", "eval_every") if getattr(self, name) is not None]
        for name in (*counts, *optional):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"TrainConfig: {name}={value!r} must be an integer of at least 1")
        if self.steps is not None and self.epochs is not None:
            raise ValueError(
                f"TrainConfig: steps={self.steps} and epochs={self.epochs} both say how long the run is; "
                "give one of them"
            )
        if self.new_learning_rate and not self.resume:
            raise ValueError("TrainConfig: new_learning_rate needs resume; a new run has no other rate")
        self._check_states()
        if self.wandb == "":
            raise ValueError("TrainConfig: wandb is empty; name a project of Weights & Biases")
        turn = self.tokens_per_turn
        if turn is not None and (isinstance(turn, bool) or not isinstance(turn, int) or turn < 0):
            raise ValueError(
                f"TrainConfig: tokens_per_turn={turn!r} must be an integer of at least 0, where 0 is all"
            )
        if not 0 <= self.balance_loss < math.inf:
            raise ValueError(f"TrainConfig: balance_loss={self.balance_loss} must be finite and at least 0")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"TrainConfig: seed={self.seed} must lie in 0..{2**32 - 1}")

    @property
    def row_lengths(self) -> Curriculum:
        """Return the curriculum as pairs of tokens and steps."""
        pairs = [text.split(":") for text in self.curriculum]
        for text, pair in zip(self.curriculum, pairs, strict=True):
            if len(pair) != 2 or not all(n.isdecimal() for n in pair) or int(pair[0]) < 2 or int(pair[1]) < 1:
                raise ValueError(
                    f"TrainConfig: curriculum: {text!r} must be LENGTH:STEPS, at least 2 tokens and 1 step"
                )
        return tuple((int(length), int(steps)) for length, steps in pairs)

    def _check_states(self) -> None:
        if self.pass_gradient and not (self.carry_state and self.accumulate > 1):
            raise ValueError("TrainConfig: pass_gradient needs carry_state and accumulate above 1")
        if self.curriculum and not self.carry_state:
            raise ValueError(
                "TrainConfig: curriculum needs carry_state, so that short rows go on in the next batch"
            )
        lengths = [*(length for length, _ in self.row_lengths), self.data.max_length]
        if lengths != sorted(set(lengths)):
            raise ValueError(
                f"TrainConfig: curriculum={' '.join(self.curriculum)} with data.max_length="
                f"{self.data.max_length}: each length must be above the one before"
            )
        if self.attention_context is not None and not (self.carry_state and self.attention_context >= 0):
            raise ValueError(
                f"TrainConfig: attention_context={self.attention_context} needs carry_state, and 0 or more "
                "tokens"
            )
        if self.train_initial_state and self.data.rows != "pad":
            raise ValueError(
                f"TrainConfig: train_initial_state needs data.rows='pad', not {self.data.rows!r}: packed "
                "documents begin inside a row, with zeros"
            )
        if self.carry_state and self.tokens_per_turn:
            raise ValueError(
                f"TrainConfig: tokens_per_turn={self.tokens_per_turn} splits the rows that carry_state keeps "
                "together; leave one out"
            )


def spacing(steps: int) -> int:
    """Return the steps between evaluations, and between checkpoints, of a run that does not say it.

    >>> spacing(3), spacing(60), spacing(100_000)
    (1, 12, 500)
    """
    return max(1, min(500, round(steps / 5)))
