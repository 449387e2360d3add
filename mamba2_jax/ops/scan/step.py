"""SSD for one token, which decoding runs once per layer and token."""

import jax.numpy as jnp

from mamba2_jax.ops.scan.decay import log_decay
from mamba2_jax.typing import Array, Float


def ssd_one_token(
    x: Float[Array, "b h p"],
    dt: Float[Array, "b h"],
    A: Float[Array, " h"],
    B: Float[Array, "b g n"],
    C: Float[Array, "b g n"],
    state: Float[Array, "b h p n"],
    D: Float[Array, "h *p"] | None,
) -> tuple[Float[Array, "b h p"], Float[Array, "b h p n"]]:
    """Advance the state by one token. Arguments and results as in `ops.ssd_step`."""
    batch, num_heads, head_dim = x.shape
    num_groups, state_dim = B.shape[1:]
    full = jnp.promote_types(x.dtype, jnp.float32)
    heads = num_heads // num_groups
    dt, A = dt.astype(full), A.astype(full)
    x_dt = (x.astype(full) * dt[..., None]).reshape(batch, num_groups, heads * head_dim)
    decay = jnp.exp(log_decay(dt, A))  # (b, h), in [0, 1]
    B, C = B.astype(full), C.astype(full)

    new = jnp.einsum("bgk,bgn->bgkn", x_dt, B).reshape(state.shape)
    new_state = state.astype(full) * decay[..., None, None] + new
    # The heads of a group are folded into the matrix rows, so that each group is one matrix-vector product.
    rows = new_state.reshape(batch, num_groups, heads * head_dim, state_dim)
    y = jnp.einsum("bgkn,bgn->bgk", rows, C).reshape(x.shape)
    if D is not None:
        y = y + D.astype(full).reshape(num_heads, -1) * x.astype(full)
    return y.astype(x.dtype), new_state.astype(state.dtype)
