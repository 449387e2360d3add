"""The device that a computation traced now will use."""

from typing import Any

import jax


def platform() -> str:
    """Where a computation traced now will run: `"cpu"`, `"gpu"` or `"tpu"`."""
    return default_device().platform


def default_device() -> Any:
    """Return the device, or one of the devices, that a computation traced now will use."""
    device = jax.config.jax_default_device  # pyright: ignore[reportAttributeAccessIssue]
    if device is None or isinstance(device, str):
        return jax.devices(device)[0]
    return device


def compute_capability(device: Any) -> tuple[int, int] | None:
    """Return `(8, 9)` and the like for an NVIDIA GPU, None for anything else."""
    major, _, minor = str(getattr(device, "compute_capability", "")).partition(".")
    return (int(major), int(minor)) if major.isdigit() and minor.isdigit() else None
