"""Progress bar of a training run: step, loss, speed, remaining time and memory."""

import contextlib
from collections.abc import Callable, Iterator

from rich import progress
from rich.console import Console

Show = Callable[[int, dict[str, float]], None]


@contextlib.contextmanager
def training_bar(total: int, done: int, shown: bool) -> Iterator[Show]:
    """Yield a function (step, {`loss`, `tokens_per_second`, `memory`}) that updates the progress bar."""
    if not shown:
        yield lambda step, values: None
        return
    columns = (
        progress.TextColumn("step {task.completed:,}/{task.total:,}"),
        progress.BarColumn(),
        progress.TextColumn("{task.fields[numbers]}"),
        progress.TimeElapsedColumn(),
        progress.TextColumn("left"),
        progress.TimeRemainingColumn(),
    )
    with progress.Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("", total=total, completed=done, numbers="compiling")

        def show(step: int, values: dict[str, float]) -> None:
            numbers = f"loss {values['loss']:.4f}"
            if "tokens_per_second" in values:
                numbers += f"  {values['tokens_per_second']:,.0f} tokens/s"
            bar.update(task, completed=step, numbers=f"{numbers}  {values['memory'] / 1e9:.1f} GB")

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
