"""Run the training loop with evaluation, checkpoints and metrics; interrupted runs resume bit for bit."""

import dataclasses
import math
import pathlib
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from mamba2_jax.lora import add_lora
from mamba2_jax.lora.attach import adapter_names
from mamba2_jax.mesh import BATCH, axis_size
from mamba2_jax.models.mamba2 import Mamba2ForCausalLM
from mamba2_jax.processes import is_first, meet, place
from mamba2_jax.sharding import splits_batch, token_sharding
from mamba2_jax.training.checkpoint import Checkpoints
from mamba2_jax.training.config import TrainConfig
from mamba2_jax.training.data import Batch, Documents, eval_batches, load_documents, make_pipeline
from mamba2_jax.training.diagnosis import first_not_finite
from mamba2_jax.training.metrics import Metrics, draw_curve, peak_memory
from mamba2_jax.training.on_cpu import on_one_cpu, rows_in_turn, tokens_in_cache
from mamba2_jax.training.optim import learning_rate, make_optimizer
from mamba2_jax.training.progress import training_bar
from mamba2_jax.training.records import Source
from mamba2_jax.training.result import save_result
from mamba2_jax.training.signals import StopSignals
from mamba2_jax.training.step import (
    StepMetrics,
    TrainState,
    eval_step,
    sharded_train_step,
    split_model,
    train_step,
)


@dataclass(frozen=True)
class Evaluation:
    """Metrics on held-out text."""

    loss: float
    """Mean cross entropy in nats per token."""
    perplexity: float
    bits_per_byte: float
    """Comparable across tokenizers."""


@dataclass(frozen=True)
class TrainResult:
    """Result of a training run."""

    output: pathlib.Path
    step: int
    loss: float | None
    """Loss of the last step; None if no step was left to run."""
    evaluation: Evaluation | None
    skipped: int
    """Steps skipped because the loss or a gradient was not finite."""
    stopped_by: int | None
    """Number of the signal that ended the run early, after a checkpoint; None if the run is complete."""


class _Pending(NamedTuple):
    """A step whose metrics have not been fetched from the device yet."""

    step: int
    metrics: StepMetrics
    batch: Batch


class Trainer:
    """Train a model on texts.

    `fit` updates the model's weights in place when it ends; until then they are unchanged.

    With several processes (`mamba2_jax.processes`), each creates a Trainer with the same arguments; the first
    process writes the files and reports.

    Args:
        model: trained in its adapters if it has any or `config.lora` adds some, else in all parameters; moved
            onto the mesh of `config.mesh`, if any.
        config: the options.
        data: files, folders, a hub dataset's id, records, or `Documents`.
        tokenizer: the model's tokenizer; not needed for `Documents`.
        eval_data: held-out data, in the same forms as `data`; None: a share `config.data.eval_share` of it.
        report: called with each line of progress text, e.g. `print`.

    Raises:
        FileExistsError: the output folder is not empty and `resume` is not set, or it is a file.
        FileNotFoundError: a data file does not exist.
        ValueError: no usable data, or options that do not fit the data or the devices.
    """

    def __init__(
        self,
        model: Mamba2ForCausalLM,
        config: TrainConfig,
        data: Iterable[Source] | Source | Documents,
        *,
        tokenizer: Any = None,
        eval_data: Iterable[Source] | Source | Documents | None = None,
        report: Callable[[str], None] = lambda message: None,
    ):
        self.model, self.config, self.tokenizer = model, config, tokenizer
        self._report = report if is_first() else lambda message: None
        self._output = pathlib.Path(config.output).expanduser()
        if self._output.exists() and not self._output.is_dir():
            raise FileExistsError(f"{self._output}: is a file; name a folder")
        if not config.resume and self._output.is_dir() and any(self._output.iterdir()):
            raise FileExistsError(
                f"{self._output}: is not empty; go on from what is in it with resume, or name another folder"
            )
        self._documents = self._load("data", data)
        self._held_out = None if eval_data is None else self._load("evaluation data", eval_data)
        if self._held_out is None and config.data.eval_share:
            self._documents, self._held_out = self._documents.hold_out(config.data.eval_share, config.seed)
        settings = config.lora.config()
        if settings is not None and not adapter_names(model):
            add_lora(model, settings, rngs=nnx.Rngs(config.seed))
        self._mesh = config.mesh.make()
        if self._mesh is None and jax.process_count() > 1:
            raise ValueError(
                f"Trainer: {jax.process_count()} processes, and no mesh of their devices; "
                "set mesh.data or mesh.fsdp to -1, which is all of them"
            )
        if self._mesh is not None:
            if not splits_batch(self._mesh, config.batch_size):
                raise ValueError(
                    f"Trainer: batch_size={config.batch_size} is no multiple of mesh.data x mesh.fsdp = "
                    f"{axis_size(self._mesh, *BATCH)}"
                )
            if config.tokens_per_turn:
                raise ValueError(
                    f"Trainer: tokens_per_turn={config.tokens_per_turn} is for one device; on a mesh, make "
                    "batch_size smaller and accumulate larger"
                )
            model.to_mesh(self._mesh)
        self.steps = config.steps or self._count_steps()
        self._structure, self._trained, self._frozen = split_model(model)
        self._optimizer = make_optimizer(config.optim, self._trained, self.steps)
        self._learning_rate = learning_rate(config.optim, self.steps)
        meet("mamba2_jax: Trainer")  # every process has checked the output folder before one writes

    def fit(self) -> TrainResult:
        """Train for the remaining steps, or until SIGTERM or Ctrl-C, which save a checkpoint first.

        Raises:
            FloatingPointError: too many consecutive steps were not finite; names the first such tensor.
            SaveError: a checkpoint could not be written; earlier ones are intact.
            ValueError: the output folder holds a checkpoint of another run, or only damaged ones.
        """
        self._output.mkdir(parents=True, exist_ok=True)
        checkpoints = Checkpoints(self._output / "checkpoints", self.config.checkpoint, self._report)
        state, batches = self._start(checkpoints)
        first = int(state.step)
        metrics = Metrics(
            self._output,
            after=first,
            tensorboard=self.config.tensorboard,
            wandb=self.config.wandb,
            settings=dataclasses.asdict(self.config),
            silent=not is_first(),
        )
        shown = self.config.progress and is_first()
        try:
            with training_bar(self.steps, first, shown) as show, StopSignals() as stop:
                run = _Run(self, checkpoints, metrics, show)
                with self.model.backbone.on_its_device():
                    state = run.steps(state, batches, stop)
                checkpoints.wait()
        finally:
            metrics.close()
            checkpoints.close()
        self._update_model(state)
        if stop.received is None:
            save_result(self.model, self._output, self.tokenizer, self.config.lora.merge, self._report)
            if is_first():
                draw_curve(self._output)
        return TrainResult(
            self._output, int(state.step), run.loss, run.evaluation, int(state.skipped), stop.received
        )

    def evaluate(self, params: dict[str, jax.Array] | None = None) -> Evaluation:
        """Compute the loss on the held-out documents.

        Args:
            params: trained arrays by path; None: the current ones.
        """
        if self._held_out is None:
            raise ValueError("evaluate: there is no evaluation data; give eval_data or data.eval_share")
        params = self._trained if params is None else params
        nats, tokens = 0.0, 0
        for batch in eval_batches(self._held_out, self.config.data, self.config.batch_size):
            with self.model.backbone.on_its_device():
                sums = eval_step(
                    params,
                    self._frozen,
                    self._placed(batch),
                    structure=self._structure,
                    tokens_per_slice=self.config.tokens_per_slice,
                )
            nats, tokens = nats + float(sums[0]), tokens + int(sums[1])
        loss = nats / max(tokens, 1)
        bits_per_byte = nats / math.log(2) / max(int(self._held_out.num_bytes.sum()), 1)
        return Evaluation(loss, math.exp(min(loss, 700.0)), bits_per_byte)

    def _in_turns(self, batch: Batch) -> Any:
        """Split a batch `(b, l)` or `(a, b, l)` into microbatches of at most `tokens_per_turn` tokens."""
        tokens = self.config.tokens_per_turn
        if tokens is None and on_one_cpu(self.model):
            tokens = tokens_in_cache(self.model.config.hidden_size)
        return rows_in_turn(batch, tokens) if tokens else batch

    def _placed(self, batch: Batch) -> dict[str, Any]:
        """Shard a batch `(b, l)` or `(a, b, l)` over the mesh, if there is one."""
        if self._mesh is None:
            return batch
        *parts, rows, tokens = batch["input_ids"].shape
        sharding = token_sharding(self._mesh, rows, tokens)
        sharding = NamedSharding(self._mesh, PartitionSpec(*(None for _ in parts), *sharding.spec))
        return {name: place(array, sharding) for name, array in batch.items()}

    def _load(self, what: str, data: Any) -> Documents:
        if isinstance(data, Documents):
            return data
        if self.tokenizer is None:
            raise ValueError("Trainer: give the model's tokenizer, or Documents")
        documents = load_documents(data, self.tokenizer, self.config.data)
        highest = int(documents.tokens.max())
        if highest >= self.model.config.vocab_size:
            raise ValueError(
                f"Trainer: token {highest} lies outside the model's vocabulary of "
                f"{self.model.config.vocab_size}; was another model's tokenizer used?"
            )
        self._report(f"{what}: {documents.report}")
        return documents

    def _pipeline(self) -> Any:
        config = self.config
        epochs = config.epochs if config.steps is None else None
        rows = config.batch_size * config.accumulate
        return make_pipeline(self._documents, config.data, rows, seed=config.seed, epochs=epochs)

    def _count_steps(self) -> int:
        """Count the batches by reading the whole pipeline once: packing makes their number unpredictable."""
        return sum(1 for _ in self._pipeline())

    def _start(self, checkpoints: Checkpoints) -> tuple[TrainState, Any]:
        """Return the initial state and batch iterator, or those restored from the newest checkpoint."""
        params = {name: array.copy() for name, array in self._trained.items()}  # steps donate the buffers
        state = TrainState.start(params, self._optimizer, jax.random.key(self.config.seed))
        if self._mesh is not None:
            state = state.to_mesh(self._mesh)
        batches = iter(self._pipeline())
        restored = checkpoints.restore(state)
        if restored is None:
            return state, batches
        state, extra = restored
        here = self._identity()
        for name, value in extra["run"].items():
            if here.get(name) != value:
                raise ValueError(
                    f"{self._output}: the run there has {name}={value}, this one {here.get(name)}; a run "
                    "goes on only with the data and the options it began with"
                )
        batches.set_state(extra["batches"])
        self._report(f"going on from step {int(state.step)} of {self.steps}")
        return state, batches

    def _identity(self) -> dict[str, Any]:
        """Return the settings that must not change between the start of a run and its resumption."""
        config = self.config
        return {
            "data": self._documents.fingerprint(),
            "seed": config.seed,
            "batch_size": config.batch_size,
            "accumulate": config.accumulate,
            "max_length": config.data.max_length,
            "rows": config.data.rows,
            "shuffle": config.data.shuffle,
            "steps": self.steps,
        }

    def _update_model(self, state: TrainState) -> None:
        """Write the trained arrays into the model, cast to its stored dtypes."""
        self._trained = state.params
        leaves = jax.tree.leaves(self.model)
        stored = dict(zip(self._structure.names, leaves, strict=True))
        params = {name: array.astype(stored[name].dtype) for name, array in state.params.items()}
        nnx.update(self.model, nnx.state(self._structure.merge(params, self._frozen)))


class _Run:
    """The step loop of one `fit`, with the host state between steps."""

    def __init__(self, trainer: Trainer, checkpoints: Checkpoints, metrics: Metrics, show):
        self._trainer, self._checkpoints, self._metrics, self._show = trainer, checkpoints, metrics, show
        self._identity = trainer._identity()
        self._pending: _Pending | None = None
        self._clock: float | None = None  # when the previous step's metrics arrived
        self.loss: float | None = None
        self.evaluation: Evaluation | None = None
        self._eval_losses: dict[int, float] = {}  # by step

    def steps(self, state: TrainState, batches: Any, stop: StopSignals) -> TrainState:
        """Run steps until the end or a signal, and save a checkpoint after the last one."""
        trainer, config = self._trainer, self._trainer.config
        step, saved = int(state.step), int(state.step)
        update = train_step if trainer._mesh is None else sharded_train_step(state)
        while step < trainer.steps and not stop.asked(step):
            batch = trainer._in_turns(_in_parts(next(batches), config.accumulate))
            state, metrics = update(
                state,
                trainer._frozen,
                trainer._placed(batch),
                structure=trainer._structure,
                optimizer=trainer._optimizer,
                remat=config.remat,
                tokens_per_slice=config.tokens_per_slice,
                balance=config.balance_loss,
            )
            step += 1
            self._settle(state)
            self._pending = _Pending(step, metrics, batch)
            last = step == trainer.steps
            if trainer._held_out is not None and (last or step % config.eval_every == 0):
                self._settle(state)
                self._evaluate(step, state)
            if last or step % config.checkpoint.every == 0:
                self._settle(state)
                self._save(state, batches)
                saved = step
        self._settle(state)
        if saved != step:
            self._save(state, batches)
        return state

    def _settle(self, state: TrainState) -> None:
        """Fetch and write the previous step's metrics while the device computes the current step."""
        if self._pending is None:
            return
        (step, metrics, batch), self._pending = self._pending, None
        trainer = self._trainer
        numbers: Any = jax.device_get(metrics)
        now = time.perf_counter()
        values: dict[str, float | int] = {
            "loss": float(numbers.loss),
            "learning_rate": float(trainer._learning_rate(step - 1 - int(numbers.skipped))),
            "grad_norm": float(numbers.grad_norm),
            "tokens": int(numbers.tokens),
            "skipped": int(numbers.skipped),
            "memory": peak_memory(),
        }
        if self._clock is not None:  # not the first step, which compiles
            values["tokens_per_second"] = round(
                int((batch["segment_ids"] != 0).sum()) / (now - self._clock), 1
            )
        self._clock = now
        self.loss = values["loss"]
        self._metrics.write(step, values)
        self._show(step, values)
        in_a_row = int(numbers.skipped_in_a_row)
        if in_a_row >= trainer.config.max_skipped:
            bad = first_not_finite(state.params, trainer._frozen, batch, trainer._structure)
            raise FloatingPointError(
                f"step {step}: {in_a_row} steps in a row were not finite; the first such tensor is "
                f"{bad or 'not to be found any more'}. A lower learning rate or a longer warm-up may help"
            )

    def _evaluate(self, step: int, state: TrainState) -> None:
        self.evaluation = result = self._trainer.evaluate(state.params)
        values = {
            "eval_loss": result.loss,
            "eval_perplexity": result.perplexity,
            "eval_bits_per_byte": result.bits_per_byte,
        }
        self._eval_losses[step] = result.loss
        self._metrics.write(step, values)
        self._trainer._report(
            f"step {step}: held out {result.loss:.4f} nats per token, perplexity {result.perplexity:.2f}, "
            f"{result.bits_per_byte:.4f} bits per byte"
        )
        self._clock = None

    def _save(self, state: TrainState, batches: Any) -> None:
        extra = {"run": self._identity, "batches": batches.get_state()}
        self._checkpoints.save(state, extra, self._eval_losses.get(int(state.step)))
        self._clock = None


def _in_parts(batch: Batch, parts: int) -> Batch:
    """Reshape `(a * b, l)` to `(a, b, l)`; unchanged for one part."""
    if parts == 1:
        return batch
    return {name: np.reshape(array, (parts, -1, array.shape[-1])) for name, array in batch.items()}
