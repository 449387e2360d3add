"""Find the device on which a computation will run, while that computation is traced."""

import contextlib
from typing import Any

import jax
from jax.core import Tracer


def platform() -> str:
    """Return the platform that a computation traced now will run on: `"cpu"`, `"gpu"` or `"tpu"`."""
    return default_device().platform


def default_device() -> Any:
    """Return the device, or one of the devices, that a computation traced now will use.

    This is JAX's default device: inside a `jit` a tracer does not know the device of its array. Public
    functions therefore enter the context `on_device_of(*arrays)` before they trace.
    """
    device = jax.config.jax_default_device  # pyright: ignore[reportAttributeAccessIssue]
    if device is None or isinstance(device, str):
        return jax.devices(device)[0]
    return device


def on_device_of(*arrays: Any) -> contextlib.AbstractContextManager:
    """Return a context in which `default_device` is the device that a computation on `arrays` will use.

    That device differs from JAX's default when an array is committed to another kind of device: a model on
    the CPU of a machine with a GPU. Inside a `jit`, where arrays are tracers, the context has no effect.

    >>> with on_device_of(jax.device_put(1.0, jax.devices("cpu")[0])):
    ...     platform()
    'cpu'
    """
    device, default = committed_device(*arrays), default_device()
    if device is None or (device.platform, device.device_kind) == (default.platform, default.device_kind):
        return contextlib.nullcontext()
    return jax.default_device(device)


def committed_device(*arrays: Any) -> Any:
    """Return a device of this process that an array is committed to; None without one, or for tracers."""
    for array in arrays:
        if not isinstance(array, Tracer) and getattr(array, "committed", False):
            for device in array.sharding.addressable_devices:
                return device
    return None


def compute_capability(device: Any) -> tuple[int, int] | None:
    """Return the compute capability of an NVIDIA GPU, such as `(8, 9)`; None for any other device."""
    major, _, minor = str(getattr(device, "compute_capability", "")).partition(".")
    return (int(major), int(minor)) if major.isdigit() and minor.isdigit() else None
