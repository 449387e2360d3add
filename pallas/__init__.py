"""GPU kernels of the SSD scan, installed as `mamba2_jax.pallas`. Imports only jax and siblings.

Two kernels are meant for this room, and neither is here yet:

- `"mosaic_gpu"`: Hopper (H100, H200), Pallas Mosaic GPU, jax >= 0.11.2; forward and backward.
- `"triton"`: Ampere and Ada (A100, L4, RTX 4090), a Triton kernel through jax_triton.

Each enters `KERNELS` under its name, as a function of
`(x, dt, A, B, C, D, initial_state, segment_ids)` with shapes as in `mamba2_jax.ops.ssd`;
`mamba2_jax.ops.dispatch` is its only reader. Until then XLA runs everywhere.
"""

from collections.abc import Callable

KERNELS: dict[str, Callable] = {}
