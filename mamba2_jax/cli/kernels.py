"""Print `mamba2-jax info --kernels`: which implementation of the scan runs on each device, and why."""

from collections.abc import Iterable
from typing import Any

import jax
from rich import box
from rich.console import Console
from rich.table import Table

from mamba2_jax.config import Mamba2Config
from mamba2_jax.hub import resolve_folder
from mamba2_jax.ops.scan import dispatch

TYPICAL = (
    ("mamba2-130m", "bfloat16"),
    ("mamba2-2.7b", "bfloat16"),
    ("codestral-7b", "bfloat16"),
    ("mamba2-2.7b", "float16"),
    ("mamba2-2.7b", "float32"),
)
LENGTH = 2048


def describe_kernels(path: str | None, devices: Iterable[Any] | None = None) -> None:
    """Print tables for each kind of device, for published models and the checkpoint at `path`.

    Args:
        path: a folder or a hub id; None: the embedded model.
        devices: the devices to describe; None: `jax.devices()`.

    Raises:
        OSError: the folder or its config does not exist.
        ValueError: the config is broken.
    """
    folder = resolve_folder(path, allow_patterns=["*.json"])
    configs = {f"{name}, {dtype}": (Mamba2Config.preset(name), dtype) for name, dtype in TYPICAL}
    configs |= {
        f"{folder.name}, {dtype}": (Mamba2Config.from_pretrained(folder), dtype)
        for dtype in ("bfloat16", "float32")
    }
    console = Console(markup=False, emoji=False, highlight=False)
    kinds = {device.device_kind: device for device in (jax.devices() if devices is None else devices)}
    for device in kinds.values():
        verdicts = {name: _verdicts(config, dtype, device) for name, (config, dtype) in configs.items()}
        console.print(_heading(device), style="bold")
        for verdict in dict.fromkeys(verdicts.values()):
            console.print(_table([name for name, its in verdicts.items() if its == verdict], verdict))


def _verdicts(config: Mamba2Config, dtype: str, device: Any) -> tuple[tuple[str, str], ...]:
    """Return the automatic choice, and for each kernel whether it can run, on one row of `LENGTH` tokens."""
    problem = dispatch.describe(
        dtype,
        1,
        LENGTH,
        config.num_heads,
        config.head_dim,
        config.n_groups,
        config.state_size,
        D_per_channel=config.D_has_hdim,
        device=device,
    )
    verdicts = [("runs unasked", dispatch.automatic(problem))]
    for name, kernel in dispatch.kernels().items():
        reason = kernel.unsupported(problem)
        verdicts.append((name, "can run" if reason is None else f"no: {reason}"))
    return tuple(verdicts)


def _heading(device: Any) -> str:
    capability = dispatch.compute_capability(device)
    known = "" if capability is None else f", compute capability {capability[0]}.{capability[1]}"
    return f"the scan on {device.device_kind}{known}, with jax {jax.__version__}"


def _table(names: list[str], verdict: tuple[tuple[str, str], ...]) -> Table:
    """Build the table of one verdict, titled with the models that share it."""
    table = Table(title="\n".join(names), title_justify="left", show_header=False, box=box.SIMPLE_HEAD)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for row in verdict:
        table.add_row(*row)
    return table
