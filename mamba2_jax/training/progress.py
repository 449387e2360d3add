"""Progress bar of a training run: step, loss, speed, remaining time and memory."""

import contextlib
import datetime
from collections.abc import Callable, Iterator

from rich import progress
from rich.console import Console

Show = Callable[[int, dict[str, float], float | None], None]


@contextlib.contextmanager
def training_bar(total: int, done: int, shown: bool) -> Iterator[Show]:
    """Yield a function (step, metrics, seconds left) that updates the progress bar.

    Of the metrics, `loss` and `memory` are required, `tokens_per_second` and `mfu` are shown if given.
    """
    if not shown:
        yield lambda step, values, left: None
        return
    columns = (
        progress.TextColumn("step {task.completed:,}/{task.total:,}"),
        progress.BarColumn(),
        progress.TextColumn("{task.fields[numbers]}"),
        progress.TimeElapsedColumn(),
        progress.TextColumn("left"),
        progress.TextColumn("{task.fields[left]}"),
    )
    with progress.Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("", total=total, completed=done, numbers="compiling", left=_duration(None))

        def show(step: int, values: dict[str, float], left: float | None) -> None:
            numbers = f"loss {values['loss']:.4f}"
            if "tokens_per_second" in values:
                numbers += f"  {values['tokens_per_second']:,.0f} tokens/s"
            if "mfu" in values:
                numbers += f"  MFU {values['mfu']:.1%}"
            numbers += f"  {values['memory'] / 1e9:.1f} GB"
            bar.update(task, completed=step, numbers=numbers, left=_duration(left))

        yield show


@contextlib.contextmanager
def reading_bar(total: int | None, shown: bool) -> Iterator[Callable[[int], None]]:
    """Yield a function (bytes read) that advances the progress bar of tokenisation.

    Args:
        total: bytes to read; None if unknown.
        shown: whether to show the bar.
    """
    if not shown:
        yield lambda count: None
        return
    columns = (
        progress.TextColumn("tokenising"),
        progress.BarColumn(),
        progress.DownloadColumn(),
        progress.TransferSpeedColumn(),
        progress.TimeElapsedColumn(),
        progress.TextColumn("left"),
        progress.TimeRemainingColumn(),
    )
    with progress.Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("", total=total)
        yield lambda count: bar.advance(task, count)


def _duration(seconds: float | None) -> str:
    return "-:--:--" if seconds is None else str(datetime.timedelta(seconds=round(seconds)))
