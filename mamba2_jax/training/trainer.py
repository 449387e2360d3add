"""Run the training loop with evaluation, checkpoints and metrics; interrupted runs resume bit for bit."""

import dataclasses
import json
import pathlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
from flax import nnx

from mamba2_jax.lora import add_lora, load_lora
from mamba2_jax.lora.attach import adapter_names
from mamba2_jax.models.cache import Mamba2Cache
from mamba2_jax.models.mamba2 import Mamba2ForCausalLM
from mamba2_jax.processes import fetch, is_first, meet
from mamba2_jax.training.carry import empty_cache, initial_cache, new_initial_state
from mamba2_jax.training.checkpoint import Checkpoints
from mamba2_jax.training.checks import check_mesh, check_run
from mamba2_jax.training.checksums import fingerprint
from mamba2_jax.training.config import TrainConfig, spacing
from mamba2_jax.training.data import Batch, Documents, Source
from mamba2_jax.training.data.documents import with_template
from mamba2_jax.training.evaluate import Evaluation, evaluate
from mamba2_jax.training.export import base_arrays, describe_model
from mamba2_jax.training.feed import Feed
from mamba2_jax.training.folder import CHECKPOINTS, INITIAL_STATE, TOKENIZER, TOKENS
from mamba2_jax.training.loop import Loop, Plan, in_parts
from mamba2_jax.training.metrics import Metrics, draw_curve
from mamba2_jax.training.on_cpu import on_one_cpu, rows_in_turn, tokens_in_cache
from mamba2_jax.training.optim import learning_rate, make_optimizer
from mamba2_jax.training.options import OPTIONS_FILE, plain
from mamba2_jax.training.progress import training_bar
from mamba2_jax.training.result import save_result, tell_best
from mamba2_jax.training.resume import check_identity, identity, tell_changes
from mamba2_jax.training.signals import StopSignals
from mamba2_jax.training.speed import operations_per_token, peak_operations
from mamba2_jax.training.step import TrainState, eval_piece, eval_step, split_model


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
        options: options to write to `options.json` in the output folder; None: those of `config`.

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
        options: Mapping[str, Any] | None = None,
    ):
        self.model, self.config = model, config
        self.tokenizer = None if tokenizer is None else with_template(tokenizer, config.data)
        self._options = plain(config) if options is None else options
        self._report = report if is_first() else lambda message: None
        self._output = pathlib.Path(config.output).expanduser()
        check_run(config, model, self._output, eval_data)
        self._mesh = config.mesh.make()
        check_mesh(config, self._mesh)
        self._base = fingerprint(base_arrays(model))
        settings = config.lora.config()
        if settings is not None and not adapter_names(model):
            add_lora(model, settings, rngs=nnx.Rngs(config.seed))
        if config.lora.init is not None and not adapter_names(model):
            load_lora(model, config.lora.init)
        if config.steps is not None:
            learning_rate(config.optim, config.steps)  # a warm-up that is too long, before data is read
        meet("mamba2_jax: Trainer")  # every process has checked the output folder before one writes
        self._feed = Feed(config, self.tokenizer, model.config.vocab_size, self._mesh, self._report)
        self._feed.load(data, eval_data, self._output / TOKENS)
        if self._mesh is not None:
            model.to_mesh(self._mesh)
        self.steps = config.steps or self._feed.count_steps()
        self._structure, self._trained, self._frozen = split_model(model)
        if config.train_initial_state:
            self._trained |= new_initial_state(model.config, self._mesh)
        self._optimizer = make_optimizer(config.optim, self._trained, self.steps)

    def fit(self) -> TrainResult:
        """Train for the remaining steps, or until SIGTERM or Ctrl-C, which save a checkpoint first.

        Raises:
            FloatingPointError: too many consecutive steps were not finite; names the first such tensor.
            SaveError: a checkpoint could not be written; earlier ones are intact.
            ValueError: the output folder holds a checkpoint of another run, or only damaged ones.
        """
        self._output.mkdir(parents=True, exist_ok=True)
        options = self.config.checkpoint
        if self._feed.held_out is None:
            options = dataclasses.replace(options, keep_best=False)
        checkpoints = Checkpoints(self._output / CHECKPOINTS, options, self._report)
        state, batches = self._start(checkpoints)
        first = int(state.step)
        if is_first():
            text = json.dumps(plain(self._options), indent=2)
            (self._output / OPTIONS_FILE).write_text(text + "\n", encoding="utf-8")
            if self.tokenizer is not None:
                self.tokenizer.save_pretrained(self._output / TOKENIZER)
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
                loop = Loop(self._plan(), checkpoints, metrics, show)
                with self.model.backbone.on_its_device():
                    state = loop.run(state, batches, stop)
                checkpoints.wait()
        finally:
            metrics.close()
            checkpoints.close()
        self._update_model(state)
        if stop.received is None:
            initial_state = jax.tree.map(fetch, self.initial_state())
            if initial_state is not None and is_first():
                initial_state.save(self._output / INITIAL_STATE, self.model)
            replaced = self.config.data.chat_template is not None
            save_result(self.model, self._output, self.tokenizer, self.config.lora, self._report, replaced)
            if is_first():
                draw_curve(self._output)
                tell_best(self._output, int(state.step), self._report)
        return TrainResult(
            self._output, int(state.step), loop.loss, loop.evaluation, int(state.skipped), stop.received
        )

    def _plan(self) -> Plan:
        config = self.config
        save_every = config.checkpoint.every or spacing(self.steps)
        device = next(iter(self.model.backbone.embeddings.weight[...].sharding.addressable_devices))
        peak = peak_operations(device, self.model.dtype)
        return Plan(
            steps=self.steps,
            curriculum=config.row_lengths,
            max_length=config.data.max_length,
            # the best checkpoint is chosen by its evaluation
            eval_every=config.eval_every
            or (save_every if config.checkpoint.keep_best else spacing(self.steps)),
            save_every=save_every,
            max_skipped=config.max_skipped,
            structure=self._structure,
            frozen=self._frozen,
            optimizer=self._optimizer,
            learning_rate=learning_rate(config.optim, self.steps),
            options={
                "remat": config.remat,
                "tokens_per_slice": config.tokens_per_slice,
                "pass_gradient": config.pass_gradient,
                "balance": config.balance_loss,
            },
            arrange=self._arranged,
            count_tokens=self._feed.tokens_of,
            place=self._feed.placed,
            evaluate=None if self._feed.held_out is None else self.evaluate,
            extra={"run": self._identity(), "model": describe_model(self.model)},
            sharded=self._mesh is not None,
            peak=peak and peak * (1 if self._mesh is None else self._mesh.size),
            operations_per_token=operations_per_token(self.model.config, self._trained, self._frozen),
            report=self._report,
        )

    def evaluate(self, params: dict[str, jax.Array] | None = None) -> Evaluation:
        """Compute the loss on the held-out documents.

        Args:
            params: trained arrays by path; None: the current ones.
        """
        if self._feed.held_out is None:
            raise ValueError("evaluate: there is no evaluation data; give eval_data or data.eval_share")
        params = self._trained if params is None else params
        held_out, config = self._feed.held_out, self.config
        cache = self._empty_cache(held_out)
        options = {"structure": self._structure, "tokens_per_slice": config.tokens_per_slice}

        def score(batch: Batch) -> tuple[Any, Any]:
            nonlocal cache
            with self.model.backbone.on_its_device():
                placed = self._feed.placed(batch)
                if cache is None:
                    return eval_step(params, self._frozen, placed, **options)
                *sums, cache = eval_piece(params, self._frozen, placed, cache, **options)
                return sums[0], sums[1]

        return evaluate(self._feed.eval_batches(), score, int(held_out.num_bytes.sum()))

    def initial_state(self, rows: int = 1) -> Mamba2Cache | None:
        """Return the trained state that documents begin with, as a cache; None if none is trained."""
        return initial_cache(self._trained, self.model.config, rows, self.model.dtype)

    def _arranged(self, batch: Batch) -> Any:
        """Split a batch of the pipeline into microbatches; pieces that carry a state are so already."""
        if self.config.carry_state:
            return batch
        return self._in_turns(in_parts(batch, self.config.accumulate))

    def _in_turns(self, batch: Batch) -> Any:
        """Split a batch `(b, l)` or `(a, b, l)` into microbatches of at most `tokens_per_turn` tokens."""
        tokens = self.config.tokens_per_turn
        if tokens is None and on_one_cpu(self.model):
            tokens = tokens_in_cache(self.model.config.hidden_size)
        return rows_in_turn(batch, tokens) if tokens else batch

    def _empty_cache(self, documents: Documents) -> Mamba2Cache | None:
        """Return the state before the first batch of the documents, if rows carry it on."""
        if not self.config.carry_state:
            return None
        context, longest = self.config.attention_context, documents.longest
        context = longest if context is None else min(context, longest)
        rows = self.config.batch_size
        return empty_cache(self.model.config, rows, self.model.dtype, context, self._mesh)

    def _start(self, checkpoints: Checkpoints) -> tuple[TrainState, Any]:
        """Return the initial state and batch iterator, or those restored from the newest checkpoint."""
        params = {name: array.copy() for name, array in self._trained.items()}  # steps donate the buffers
        key, cache = jax.random.key(self.config.seed), self._empty_cache(self._feed.documents)
        if cache is not None and cache.capacity is not None:
            size = sum(leaf.nbytes for leaf in jax.tree.leaves(cache.attention))
            self._report(
                f"attention layers keep {cache.capacity} tokens of each row, {size / 1e6:.1f} MB in all; "
                "attention_context limits it"
            )
        state = TrainState.start(params, self._optimizer, key, cache)
        if self._mesh is not None:
            state = state.to_mesh(self._mesh)
        batches = iter(self._feed.batches())
        here = self._identity()
        restored = checkpoints.restore(
            state, lambda extra: check_identity(extra["run"], here, self.config, self._output)
        )
        if restored is None:
            return state, batches
        state, extra = restored
        batches.set_state(extra["batches"])
        self._report(f"going on from step {int(state.step)} of {self.steps}")
        updates = int(state.step) - int(state.skipped)
        for line in tell_changes(extra["run"], here, self.config.optim, updates):
            self._report(line)
        return state, batches

    def _identity(self) -> dict[str, Any]:
        return identity(
            self.config,
            data=self._feed.documents.fingerprint(),
            base=self._base,
            dtype=self.model.dtype.name,
            steps=self.steps,
        )

    def _update_model(self, state: TrainState) -> None:
        """Write the trained arrays into the model, cast to its stored dtypes."""
        self._trained = state.params
        leaves = jax.tree.leaves(self.model)
        stored = dict(zip(self._structure.names, leaves, strict=True))
        params = {
            name: array.astype(stored[name].dtype) for name, array in state.params.items() if name in stored
        }
        nnx.update(self.model, nnx.state(self._structure.merge(params, self._frozen)))
