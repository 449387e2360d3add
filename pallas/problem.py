"""Static description of a scan call, by which a kernel is chosen: device, dtype and sizes; no arrays."""

from typing import Any, NamedTuple


class Problem(NamedTuple):
    """Device, dtype and sizes of one call of the scan."""

    platform: str  # "cpu", "gpu" or "tpu"
    compute_capability: tuple[int, int] | None  # (major, minor) of an NVIDIA GPU, else None
    dtype: Any  # of x, B and C: anything that `jnp.dtype` accepts
    batch: int
    length: int
    num_heads: int
    head_dim: int
    num_groups: int
    state_dim: int
    D_per_channel: bool  # D is (h, p), not (h,) or None
