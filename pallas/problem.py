"""What is asked of a kernel, as far as it decides whether the kernel can run. No array, no tracer."""

from typing import Any, NamedTuple


class Problem(NamedTuple):
    """One call of the scan or of its step: where it runs, its dtype and its sizes."""

    platform: str  # "cpu", "gpu" or "tpu"
    compute_capability: tuple[int, int] | None  # (major, minor) of an NVIDIA GPU, else None
    dtype: Any  # of x, B and C: a numpy dtype or what names one
    batch: int
    length: int  # 1 for `ssd_step`
    num_heads: int
    head_dim: int
    num_groups: int
    state_dim: int
    D_per_channel: bool  # D is (h, p), not (h,) or None
