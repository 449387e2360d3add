"""Provide GPU kernels of the SSD scan, installed as `mamba2_jax.pallas`; imports only jax and siblings.

- `"mosaic_gpu"`: Hopper (H100, H200), Pallas Mosaic GPU; forward and backward.
- `"triton"`: Ampere and Ada (A100, RTX 30, L4, RTX 4090), Triton kernels through jax_triton.

`KERNELS` maps each op of `mamba2_jax.ops` to its kernels in order of preference;
`mamba2_jax.ops.scan.dispatch` is its only reader. A kernel's module defines a function named like the op, and
`unsupported`:

- `ssd(x, dt, A, B, C, D, initial_state, segment_ids) -> (y, final_state)`: differentiable, shapes as in
  `mamba2_jax.ops.ssd`. `x`, `B` and `C` share a dtype; `dt`, `A`, `D` and `initial_state` are float32;
  `D` may be None. `segment_ids` is None or int32 document numbers 1, 2, 3, ... along each row (from
  `ops.segments.document_index`): where the number changes, the state is reset. Padding has its left
  neighbour's number and dt = 0.
- `ssd_step(x, dt, A, B, C, state, D) -> (y, state)`: one token of the scan, shapes as in
  `mamba2_jax.ops.ssd_step`, dtypes as above; the new state has the dtype of `state`.
- `mixer_step(inputs, state, weights, mask, *, dt_limits, eps) -> (result, state)`: as in
  `mamba2_jax.ops.mixer_step`, a float32 SSM state, and the norm after the gate. Not differentiable.
- `unsupported(problem: Problem) -> str | None`: why the kernel cannot run `problem` on this device, and which
  implementation can; None if it can run.
"""

import importlib
from collections.abc import Callable
from typing import NamedTuple

import jax
from mamba2_jax.pallas.problem import Problem

__all__ = ["KERNELS", "Kernel", "Problem"]

MINIMAL_JAX = (0, 11, 2)


class Kernel(NamedTuple):
    """One kernel in `KERNELS`; its module, which needs a newer jax, is imported on first use."""

    module: str
    op: str
    automatic: tuple[tuple[int, int], ...]  # compute capabilities that select it by default

    @property
    def run(self) -> Callable:
        """The function that computes the op."""
        return getattr(importlib.import_module(self.module), self.op)

    def unsupported(self, problem: Problem) -> str | None:
        """Return why this kernel cannot run `problem` on this device, or None if it can."""
        if problem.platform != "gpu" or problem.compute_capability is None:
            return f"it needs an NVIDIA GPU, this runs on {problem.platform}"
        if jax.__version_info__ < MINIMAL_JAX:
            wanted = ".".join(map(str, MINIMAL_JAX))
            return f"it needs jax >= {wanted} (Python >= 3.12), this is jax {jax.__version__}"
        return importlib.import_module(self.module).unsupported(problem)


KERNELS: dict[str, dict[str, Kernel]] = {
    "ssd": {
        "mosaic_gpu": Kernel("mamba2_jax.pallas.mosaic_gpu.scan", "ssd", automatic=((9, 0),)),
        # Never selected by default: benchmarks/results has no run on an Ampere or Ada card yet.
        "triton": Kernel("mamba2_jax.pallas.triton_gpu.scan", "ssd", automatic=()),
    },
    "ssd_step": {},
    # Never selected by default: benchmarks/results has no run of it on a GPU yet.
    "mixer_step": {"mosaic_gpu": Kernel("mamba2_jax.pallas.mosaic_gpu.mixer", "mixer_step", automatic=())},
}
