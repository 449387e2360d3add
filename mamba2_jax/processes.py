"""Multi-process JAX: start-up, barriers, coordinated stopping, and global arrays.

Every process runs the same program and sees the devices of all processes. An array on a mesh of these
devices is sharded over several processes. `meet`, `stop_together` and `fetch` are collective: every process
must call them.
"""

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Sharding

AUTO = "auto"


def start_processes(
    coordinator: str = AUTO, count: int | None = None, index: int | None = None, *, timeout: int = 100
) -> None:
    """Connect this process to the others (`jax.distributed`); must precede any other use of JAX.

    Args:
        coordinator: `host:port` of process 0, the same in every process; "auto": detected from the launcher,
            SLURM or Open MPI with one process per GPU, or a Kubernetes indexed job (needs `jax[k8s]`).
        count: number of processes; not needed with "auto".
        index: index of this process, from 0; not needed with "auto".
        timeout: seconds without a heartbeat after which a process counts as dead and all others end with an
            error.

    Raises:
        ValueError: missing or inconsistent arguments, or "auto" without a known launcher.
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
    """Return whether this is process 0, the only one that writes files and prints messages."""
    return jax.process_index() == 0


def meet(where: str) -> None:
    """Wait at the barrier named `where` until every process reaches it."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(where)


def stop_together(step: int) -> bool:
    """Return whether all processes stop after `step`, because one got SIGTERM. Call it at every step."""
    return multihost_utils.reached_preemption_sync_point(step)


def fetch(array: jax.Array | np.ndarray) -> np.ndarray:
    """Copy a whole array to host memory; all-gather an array that is sharded over processes."""
    if isinstance(array, np.ndarray) or array.is_fully_addressable or array.is_fully_replicated:
        return np.asarray(array)
    return multihost_utils.process_allgather(array, tiled=True)


def place(array: np.ndarray, sharding: Sharding) -> jax.Array:
    """Shard a host array, equal in every process, over the devices of all processes."""
    return jax.make_array_from_callback(array.shape, sharding, array.__getitem__)
