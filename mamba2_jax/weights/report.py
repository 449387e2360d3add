"""What a load tells the user: a bar while it runs, a summary when it is done."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from rich import progress
from rich.console import Console


@dataclass(frozen=True)
class LoadReport:
    """What a load did; `str()` is its one-line summary, followed by the notes.

    Args:
        source: the folder.
        files: the files read.
        tensors: how many stored tensors the model took.
        parameters: how many numbers they hold; a tied head counts once.
        bytes: their size in the files.
        dtypes: parameters by stored type.
        stored_dtypes: type of each stored tensor, by its canonical name.
        param_dtypes: parameters by the type they have now.
        seconds: from opening to the last array in place.
        notes: what a user may want to know, one line each.
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
        """Summarise: tensors, parameters, bytes, dtype, seconds, speed, source."""
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
    """Yield a function that advances a bar of `total` bytes, or does nothing."""
    if not shown:
        yield lambda count: None
        return
    columns = (progress.TextColumn(label), progress.BarColumn(), progress.DownloadColumn())
    with progress.Progress(*columns, progress.TransferSpeedColumn(), console=Console(stderr=True)) as bar:
        task = bar.add_task("", total=total)
        yield lambda count: bar.advance(task, count)


def _scaled(number: float) -> str:
    """Write a count with a decimal prefix: 1.9 M, 3.8 G."""
    for prefix, unit in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= unit:
            return f"{number / unit:.1f} {prefix}"
    return f"{number:.0f} "
