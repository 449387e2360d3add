"""Several processes that train as one: how they find each other, and what goes between them.

Every process runs the same program and sees the devices of all. An array on a mesh of these devices lies in
pieces in several processes; what looks at a whole one, or waits, must be called by all of them.
"""

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Sharding

AUTO = "auto"


def start_processes(
    coordinator: str = AUTO, count: int | None = None, index: int | None = None, *, timeout: int = 100
) -> None:
    """Join the other processes; call it before anything else of JAX.

    Args:
        coordinator: `host:port` of the first process, the same for all; "auto": as the launcher says, SLURM
            or Open MPI with a process for each GPU, or Kubernetes' indexed jobs (needs `jax[k8s]`).
        count: how many there are; not needed with "auto".
        index: which one this is, from 0; not needed with "auto".
        timeout: seconds without a sign of life after which a process counts as dead, and all others end
            with an error.

    Raises:
        ValueError: arguments that do not say enough, or no launcher that is known.
    """
    if coordinator != AUTO and (count is None or index is None or not 0 <= index < count):
        raise ValueError(
            f"start_processes: coordinator={coordinator!r} with count={count} and index={index}; say how "
            "many processes there are, and which one, from 0, this is"
        )
    if timeout < 1:
        raise ValueError(f"start_processes: timeout={timeout} must be at least 1 second")
    address = None if coordinator == AUTO else coordinator
    try:
        jax.distributed.initialize(address, count, index, heartbeat_timeout_seconds=timeout)
    except ValueError as error:  # no launcher whose variables JAX knows
        raise ValueError(
            f"start_processes: {error}; give coordinator (host:port of the first process), count and index"
        ) from error


def is_first() -> bool:
    """Whether this process is the one that writes files and talks to the user."""
    return jax.process_index() == 0


def meet(where: str) -> None:
    """Wait until all processes are here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(where)


def stop_together(step: int) -> bool:
    """Whether a process got SIGTERM, and this is the step after which all stop. Call it at every step."""
    return multihost_utils.reached_preemption_sync_point(step)


def fetch(array: jax.Array | np.ndarray) -> np.ndarray:
    """Copy a whole array to the host; one that lies in several processes, to the hosts of all."""
    if isinstance(array, np.ndarray) or array.is_fully_addressable or array.is_fully_replicated:
        return np.asarray(array)
    return multihost_utils.process_allgather(array, tiled=True)


def place(array: np.ndarray, sharding: Sharding) -> jax.Array:
    """Put an array that every process has on the devices of all; each takes its own part."""
    return jax.make_array_from_callback(array.shape, sharding, array.__getitem__)
