"""What `mamba2-jax info --kernels` prints: which implementation of the scan runs on the devices here."""

from typing import Any

import jax
from rich import box
from rich.console import Console
from rich.table import Table

from mamba2_jax.config import Mamba2Config
from mamba2_jax.hub import resolve_folder
from mamba2_jax.ops import dispatch

LENGTH = 2048  # no kernel depends on the batch or the length
DTYPES = ("bfloat16", "float16", "float32")


def describe_kernels(path: str | None) -> None:
    """Print, per kind of device and dtype, what would run the checkpoint at `path` and why not the others.

    Raises:
        OSError: no such folder, or nothing readable in it.
        ValueError: a broken config.
    """
    config = Mamba2Config.from_pretrained(resolve_folder(path, allow_patterns=["*.json"]))
    console = Console(markup=False, emoji=False, highlight=False)
    kinds = {device.device_kind: device for device in jax.devices()}
    for kind, device in kinds.items():
        capability = dispatch.compute_capability(device)
        where = f"{device.platform}: {kind}"
        if capability is not None:
            where += f", compute capability {capability[0]}.{capability[1]}"
        console.print(_table(f"the scan on {where}; jax {jax.__version__}", _rows(config, device)))


def _rows(config: Mamba2Config, device: Any) -> list[tuple[str, str]]:
    """Return what runs for each dtype, then each kernel's reason not to."""
    sizes = (1, LENGTH, config.num_heads, config.head_dim, config.n_groups, config.state_size)
    problems = {dtype: dispatch.describe(dtype, *sizes, device=device) for dtype in DTYPES}
    rows = [(f"{dtype} runs", dispatch.automatic(problem)) for dtype, problem in problems.items()]
    for name, kernel in dispatch.kernels().items():
        reasons: dict[str, list[str]] = {}
        for dtype, problem in problems.items():
            reason = kernel.unsupported(problem)
            if reason is None:
                asked = dispatch.automatic(problem) == name
                reason = "runs unasked" if asked else f"runs with implementation={name!r}"
            reasons.setdefault(reason, []).append(dtype)
        for reason, dtypes in reasons.items():
            rows.append((name if len(reasons) == 1 else f"{name}, {' and '.join(dtypes)}", reason))
    rows.append(("xla, recurrent", "run everywhere"))
    return rows


def _table(title: str, rows: list[tuple[str, str]]) -> Table:
    table = Table(title=title, title_justify="left", show_header=False, box=box.SIMPLE_HEAD)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for row in rows:
        table.add_row(*row)
    return table
