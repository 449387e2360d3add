"""Metrics logging to a JSON-lines file, TensorBoard and Weights & Biases, and the final loss plot."""

import json
import pathlib
import resource
import sys
import time
from typing import Any

import jax

METRICS_FILE = "metrics.jsonl"
CURVE_FILE = "loss.png"


class Metrics:
    """Logger of the metrics of each step.

    Args:
        folder: folder of the run.
        after: step from which the run resumes; metrics of later steps are dropped.
        tensorboard: also write event files, in `folder/tensorboard`.
        wandb: also log to this Weights & Biases project.
        settings: run config for Weights & Biases.
        silent: write nothing, because another process does.
    """

    def __init__(
        self,
        folder: pathlib.Path,
        *,
        after: int,
        tensorboard: bool,
        wandb: str | None,
        settings: dict[str, Any],
        silent: bool = False,
    ):
        self._file = self._events = self._wandb = None
        if silent:
            return
        path = folder / METRICS_FILE
        kept = [line for line in read_metrics(path) if line["step"] <= after] if after else []
        path.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
        self._file = path.open("a", encoding="utf-8")
        self._events = _EventFile(folder / "tensorboard", after) if tensorboard else None
        if wandb is not None:
            self._wandb = _start_wandb(folder, wandb, settings)

    def write(self, step: int, values: dict[str, float | int]) -> None:
        """Log the metrics of one step."""
        if self._file is not None:
            self._file.write(json.dumps({"step": step, **values}) + "\n")
            self._file.flush()
        if self._events is not None:
            self._events.write(step, values)
        if self._wandb is not None:
            self._wandb.log(values, step=step)

    def close(self) -> None:
        """Flush and close all logs."""
        if self._file is not None:
            self._file.close()
        if self._events is not None:
            self._events.close()
        if self._wandb is not None:
            self._wandb.finish()


class _EventFile:
    """Writer of a TensorBoard event file without TensorFlow."""

    def __init__(self, folder: pathlib.Path, after: int):
        writer = _import("tensorboard.summary.writer.event_file_writer", "train")
        self._event = _import("tensorboard.compat.proto.event_pb2", "train")
        self._summary = _import("tensorboard.compat.proto.summary_pb2", "train").Summary
        self._file = writer.EventFileWriter(str(folder))
        if after:  # makes TensorBoard drop later steps, logged before the interruption
            log = self._event.SessionLog(status=self._event.SessionLog.START)
            self._file.add_event(self._event.Event(wall_time=time.time(), step=after + 1, session_log=log))

    def write(self, step: int, values: dict[str, float | int]) -> None:
        summary = self._summary(
            value=[self._summary.Value(tag=tag, simple_value=value) for tag, value in values.items()]
        )
        self._file.add_event(self._event.Event(wall_time=time.time(), step=step, summary=summary))

    def close(self) -> None:
        self._file.close()


def _start_wandb(folder: pathlib.Path, project: str, settings: dict[str, Any]) -> Any:
    """Start a Weights & Biases run, or resume the run of this folder."""
    path = folder / "wandb-id"
    known = path.read_text(encoding="utf-8") if path.exists() else None
    run = _import("wandb", "wandb").init(
        project=project, id=known, resume="allow", config=settings, dir=str(folder)
    )
    path.write_text(run.id, encoding="utf-8")
    return run


def read_metrics(path: pathlib.Path) -> list[dict[str, Any]]:
    """Read a metrics file up to the first line that is not JSON, such as a truncated last line."""
    lines = []
    if path.exists():
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                lines.append(json.loads(line))
            except ValueError:
                break
    return lines


def draw_curve(folder: pathlib.Path) -> pathlib.Path:
    """Plot training loss, evaluation loss and learning rate over steps; return the image path."""
    Figure = _import("matplotlib.figure", "train").Figure
    lines = read_metrics(folder / METRICS_FILE)
    train = [(line["step"], line["loss"], line["learning_rate"]) for line in lines if "loss" in line]
    held_out = [(line["step"], line["eval_loss"]) for line in lines if "eval_loss" in line]
    figure = Figure(figsize=(8, 5), layout="constrained")
    axis = figure.subplots()
    if train:
        steps, losses, rates = zip(*train, strict=True)
        axis.plot(steps, losses, color="tab:blue", alpha=0.3, linewidth=1)
        axis.plot(steps, _smooth(losses), color="tab:blue", label="training, smoothed")
        right = axis.twinx()
        right.plot(steps, rates, color="tab:gray", linestyle=":", linewidth=1)
        right.set_ylabel("learning rate (dotted)")
        right.set_ylim(bottom=0)
    if held_out:
        axis.plot(
            *zip(*held_out, strict=True), color="tab:orange", marker="o", markersize=4, label="held out"
        )
    axis.set_xlabel("step")
    axis.set_ylabel("loss, nats per token")
    axis.grid(alpha=0.3)
    axis.legend(loc="upper right")
    path = folder / CURVE_FILE
    figure.savefig(path, dpi=120)
    return path


def _smooth(values: tuple[float, ...]) -> list[float]:
    """Return a bias-corrected exponential moving average, with a window of a twentieth of the run."""
    keep = 1 - 1 / max(1.0, len(values) / 20)
    smoothed, total, weight = [], 0.0, 0.0
    for value in values:
        total, weight = keep * total + value, keep * weight + 1
        smoothed.append(total / weight)
    return smoothed


def peak_memory() -> int:
    """Return the peak memory in bytes of the first device if it reports one, else of this process."""
    stats = jax.local_devices()[0].memory_stats() or {}
    if "peak_bytes_in_use" in stats:
        return stats["peak_bytes_in_use"]
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _import(module: str, extra: str) -> Any:
    import importlib

    try:
        return importlib.import_module(module)
    except ImportError as error:
        name = module.partition(".")[0]
        raise ImportError(f"{name} is missing: pip install 'mamba2-jax-flax[{extra}]'") from error
