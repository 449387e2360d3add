"""Report the loading of weights: a progress bar and a summary."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from rich import progress
from rich.console import Console


@dataclass(frozen=True)
class LoadReport:
    """Summary of a `load_weights` call; `str()` gives one line, followed by the notes.

    Args:
        source: the checkpoint folder.
        files: the files read.
        tensors: number of stored tensors loaded.
        parameters: number of elements in these tensors; a tied head counts once.
        bytes: size of these tensors in the files.
        dtypes: number of parameters by stored dtype.
        stored_dtypes: stored dtype by canonical tensor name.
        param_dtypes: number of parameters by dtype in memory.
        seconds: time from opening the files until the last array is on its devices.
        notes: messages for the user, one line each.
    """

    source: Path
    files: tuple[Path, ...]
    tensors: int
    parameters: int
    bytes: int
    dtypes: dict[str, int]
    stored_dtypes: dict[str, str]
    param_dtypes: dict[str, int]
    seconds: float
    notes: tuple[str, ...] = field(default=())

    def __str__(self) -> str:
        """Format tensors, parameters, bytes, dtypes, seconds, speed and source in a line, then the notes."""
        dtype = " + ".join(self.dtypes)
        if self.param_dtypes.keys() != self.dtypes.keys():
            dtype += f" as {' + '.join(self.param_dtypes)}"
        source = self.files[0] if len(self.files) == 1 else f"{len(self.files)} files in {self.source}"
        speed = _scaled(self.bytes / max(self.seconds, 1e-9))
        summary = (
            f"loaded {self.tensors} tensors, {_scaled(self.parameters).rstrip()} parameters, "
            f"{_scaled(self.bytes)}B {dtype} in {self.seconds:.2f} s ({speed}B/s) from {source}"
        )
        return "\n".join([summary, *(f"note: {note}" for note in self.notes)])


@contextlib.contextmanager
def progress_bar(label: str, total: int, shown: bool) -> Iterator[Callable[[int], object]]:
    """Yield a function that advances a progress bar of `total` bytes; it does nothing unless `shown`."""
    if not shown:
        yield lambda count: None
        return
    columns = (progress.TextColumn(label), progress.BarColumn(), progress.DownloadColumn())
    with progress.Progress(*columns, progress.TransferSpeedColumn(), console=Console(stderr=True)) as bar:
        task = bar.add_task("", total=total)
        yield lambda count: bar.advance(task, count)


def _scaled(number: float) -> str:
    """Format a count with a decimal prefix: 1.9 M, 3.8 G."""
    for prefix, unit in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= unit:
            return f"{number / unit:.1f} {prefix}"
    return f"{number:.0f} "
