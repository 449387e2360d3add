"""SiLU gate of gated MLPs, and of Mamba-2 blocks without the gated norm."""

import jax
import jax.numpy as jnp

from mamba2_jax.ops.checks import check_dtype
from mamba2_jax.typing import Array, Float


def silu_gate(value: Float[Array, "*b e"], gate: Float[Array, "*b e"]) -> Float[Array, "*b e"]:
    r"""Compute $\mathrm{value} \cdot \mathrm{silu}(\mathrm{gate})$ elementwise.

    Args:
        value: `(..., e)`.
        gate: `(..., e)`.

    Returns:
        `(..., e)` in the dtype of `value`; computed in float32 (float64 when `value` is).

    Raises:
        ValueError: an invalid shape or dtype; the message names the argument.

    Source: Shazeer 2020, arXiv:2002.05202, section 2 (SwiGLU).
    """
    if value.shape != gate.shape:
        raise ValueError(f"silu_gate: gate has shape {gate.shape}, wants that of value, {value.shape}")
    check_dtype("silu_gate", value=value, gate=gate)
    full = jnp.promote_types(value.dtype, jnp.float32)
    return (value.astype(full) * jax.nn.silu(gate.astype(full))).astype(value.dtype)
