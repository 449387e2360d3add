"""Run the steps of a training: steps, evaluations, checkpoints and metrics in their order."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

from mamba2_jax.training.checkpoint import Checkpoints
from mamba2_jax.training.data import Batch
from mamba2_jax.training.diagnosis import first_not_finite
from mamba2_jax.training.evaluate import Evaluation
from mamba2_jax.training.lanes import Curriculum, length_of_step, steps_left
from mamba2_jax.training.metrics import Metrics, peak_memory
from mamba2_jax.training.progress import Show
from mamba2_jax.training.signals import StopSignals
from mamba2_jax.training.speed import Speed
from mamba2_jax.training.step import (
    Params,
    StepMetrics,
    Structure,
    TrainState,
    sharded_train_step,
    train_step,
)


@dataclass(frozen=True)
class Plan:
    """What the steps of a run need, and when it evaluates and saves."""

    steps: int
    """Steps of the whole run."""
    curriculum: Curriculum
    max_length: int
    """Tokens of a row after the curriculum."""
    eval_every: int
    save_every: int
    max_skipped: int
    structure: Structure
    frozen: Params
    optimizer: optax.GradientTransformation
    learning_rate: Callable[[Any], Any]
    options: Mapping[str, Any]
    """Options of `train_step`."""
    arrange: Callable[[Batch], Any]
    """Split a batch of the pipeline into microbatches."""
    count_tokens: Callable[[Any], int]
    """Count the tokens of a batch, padding excluded."""
    place: Callable[[Any], Any]
    """Transfer a batch to the devices."""
    evaluate: Callable[[Params], Evaluation] | None
    """Evaluate parameters; None without evaluation data."""
    extra: Mapping[str, Any]
    """JSON values saved with every checkpoint."""
    sharded: bool
    peak: float | None
    """Operations per second that all devices can do; None where it is not known."""
    operations_per_token: float
    report: Callable[[str], None]


class _Pending(NamedTuple):
    """A step whose metrics have not been fetched from the device yet."""

    step: int
    metrics: StepMetrics
    batch: Any


class Loop:
    """The step loop of one `fit`, with the host state between steps."""

    def __init__(self, plan: Plan, checkpoints: Checkpoints, metrics: Metrics, show: Show):
        self._plan, self._checkpoints, self._metrics, self._show = plan, checkpoints, metrics, show
        self._pending: _Pending | None = None
        self._speed = Speed()
        self.loss: float | None = None
        self.evaluation: Evaluation | None = None
        self._eval_losses: dict[int, float] = {}  # by step

    def run(self, state: TrainState, batches: Any, stop: StopSignals) -> TrainState:
        """Run steps until the end or a signal, and save a checkpoint after the last one.

        Evaluates before the first step of a new run too.
        """
        plan = self._plan
        step = saved = int(state.step)
        update = sharded_train_step(state) if plan.sharded else train_step
        if step == 0 < plan.steps:
            self._evaluate(step, state)
        while step < plan.steps and not stop.asked(step):
            lengths = [length_of_step(i, plan.curriculum, plan.max_length) for i in (step - 1, step)]
            if lengths[0] != lengths[1]:  # another shape to compile for
                self._settle(state)
                self._speed.restart()
            batch = plan.arrange(next(batches))
            state, metrics = update(
                state,
                plan.frozen,
                plan.place(batch),
                structure=plan.structure,
                optimizer=plan.optimizer,
                **plan.options,
            )
            step += 1
            self._settle(state)
            self._pending = _Pending(step, metrics, batch)
            saves = _is_due(step, plan.save_every, plan.steps)
            evaluates = plan.evaluate is not None and _is_due(step, plan.eval_every, plan.steps)
            if saves or evaluates or _is_ready(metrics.loss):  # at once where dispatch is synchronous
                self._settle(state)
            if evaluates:
                self._evaluate(step, state)
            if saves:
                self._save(state, batches)
                saved = step
        self._settle(state)
        if saved != step:
            self._save(state, batches)
        return state

    def _settle(self, state: TrainState) -> None:
        """Fetch and write the metrics of the pending step, while the device computes the next one."""
        if self._pending is None:
            return
        (step, metrics, batch), self._pending = self._pending, None
        plan = self._plan
        numbers: Any = jax.device_get(metrics)
        self._speed.step_done(plan.count_tokens(batch))
        values: dict[str, float | int] = {
            "loss": float(numbers.loss),
            "learning_rate": float(plan.learning_rate(step - 1 - int(numbers.skipped))),
            "grad_norm": float(numbers.grad_norm),
            "tokens": int(numbers.tokens),
            "skipped": int(numbers.skipped),
            "memory": peak_memory(),
        }
        rate = self._speed.tokens_per_second()
        if rate is not None:
            values["tokens_per_second"] = round(rate, 1)
            if plan.peak is not None:
                values["mfu"] = round(rate * plan.operations_per_token / plan.peak, 4)
        self.loss = values["loss"]
        self._metrics.write(step, values)
        self._show(step, values, self._seconds_left(step))
        in_a_row = int(numbers.skipped_in_a_row)
        if in_a_row >= plan.max_skipped:
            bad = first_not_finite(state.params, plan.frozen, plan.place(batch), plan.structure)
            raise FloatingPointError(
                f"step {step}: {in_a_row} steps in a row were not finite; the first such tensor is "
                f"{bad or 'not to be found any more'}. A lower learning rate or a longer warm-up may help"
            )

    def _seconds_left(self, step: int) -> float | None:
        plan = self._plan
        left = {"save": _count_due(step, plan.save_every, plan.steps)}
        if plan.evaluate is not None:
            left["evaluate"] = _count_due(step, plan.eval_every, plan.steps)
        steps = steps_left(step, plan.steps, plan.curriculum, plan.max_length)
        return self._speed.seconds_left(steps, left)

    def _evaluate(self, step: int, state: TrainState) -> None:
        if self._plan.evaluate is None:
            return
        with self._speed.aside("evaluate"):
            self.evaluation = result = self._plan.evaluate(state.params)
        self._eval_losses[step] = result.loss
        self._metrics.write(
            step,
            {
                "eval_loss": result.loss,
                "eval_perplexity": result.perplexity,
                "eval_bits_per_byte": result.bits_per_byte,
            },
        )
        self._plan.report(f"step {step}: {result}")

    def _save(self, state: TrainState, batches: Any) -> None:
        with self._speed.aside("save"):
            extra = {**self._plan.extra, "batches": batches.get_state()}
            self._checkpoints.save(state, extra, self._eval_losses.get(int(state.step)))


def _is_ready(array: Any) -> bool:
    return array.is_ready()


def _is_due(step: int, every: int, steps: int) -> bool:
    return step == steps or step % every == 0


def _count_due(step: int, every: int, steps: int) -> int:
    """Count the steps after `step` that are due."""
    if step >= steps:
        return 0
    return steps // every - step // every + bool(steps % every)


def in_parts(batch: Batch, parts: int) -> Batch:
    """Reshape `(a * b, l)` to `(a, b, l)`; unchanged for one part."""
    if parts == 1:
        return batch
    return {name: np.reshape(array, (parts, -1, array.shape[-1])) for name, array in batch.items()}
