"""The device that a computation traced now will use."""

import contextlib
from typing import Any

import jax
from jax.core import Tracer


def platform() -> str:
    """Where a computation traced now will run: `"cpu"`, `"gpu"` or `"tpu"`."""
    return default_device().platform


def default_device() -> Any:
    """Return the device, or one of the devices, that a computation traced now will use.

    JAX has no more to tell inside a `jit`: a tracer does not know where its array lies. Public doors enter
    `on_device_of` their arrays first.
    """
    device = jax.config.jax_default_device  # pyright: ignore[reportAttributeAccessIssue]
    if device is None or isinstance(device, str):
        return jax.devices(device)[0]
    return device


def on_device_of(*arrays: Any) -> contextlib.AbstractContextManager:
    """Return a context in which `default_device` is where a computation on `arrays` will run.

    It differs from JAX's default where an array is committed to another kind of device: a model on the CPU of
    a machine with a GPU. Inside a `jit`, where arrays are tracers, the context changes nothing.

    >>> with on_device_of(jax.device_put(1.0, jax.devices("cpu")[0])):
    ...     platform()
    'cpu'
    """
    device, default = committed_device(*arrays), default_device()
    if device is None or (device.platform, device.device_kind) == (default.platform, default.device_kind):
        return contextlib.nullcontext()
    return jax.default_device(device)


def committed_device(*arrays: Any) -> Any:
    """Return a device of this process that an array is committed to; None if none is, or can be known."""
    for array in arrays:
        if not isinstance(array, Tracer) and getattr(array, "committed", False):
            for device in array.sharding.addressable_devices:
                return device
    return None


def compute_capability(device: Any) -> tuple[int, int] | None:
    """Return `(8, 9)` and the like for an NVIDIA GPU, None for anything else."""
    major, _, minor = str(getattr(device, "compute_capability", "")).partition(".")
    return (int(major), int(minor)) if major.isdigit() and minor.isdigit() else None
