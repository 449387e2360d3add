"""SSD for one token: what decoding runs once per layer."""

import jax.numpy as jnp

from mamba2_jax.ops.checks import check_dtype, check_groups, check_shape
from mamba2_jax.ops.scan.decay import log_decay
from mamba2_jax.typing import Array, Float


def ssd_step(
    x: Float[Array, "b h p"],
    dt: Float[Array, "b h"],
    A: Float[Array, " h"],
    B: Float[Array, "b g n"],
    C: Float[Array, "b g n"],
    state: Float[Array, "b h p n"],
    *,
    D: Float[Array, "h *p"] | None = None,
) -> tuple[Float[Array, "b h p"], Float[Array, "b h p n"]]:
    r"""Advance the state by one token and read it out.

    $$h \leftarrow e^{dt A} h + dt\, x B^\top, \qquad y = h C + D x$$

    Args:
        x: inputs `(b, h, p)`.
        dt: step sizes `(b, h)`, after softplus and clamp; 0 leaves the state as it is.
        A: `(h,)`, negative.
        B: `(b, g, n)`; `g` divides `h`, head `i` uses group `i // (h // g)`.
        C: `(b, g, n)`.
        state: `(b, h, p, n)`, float32 as a rule.
        D: skip weights `(h,)` or `(h, p)`.

    Returns:
        y: `(b, h, p)` in the dtype of `x`.
        state: `(b, h, p, n)` in the dtype of `state`.

    Raises:
        ValueError: shapes or dtypes that do not fit, named.

    Source: Dao & Gu 2024, arXiv:2405.21060, section 2.
    """
    check_shape("ssd_step", "x", x, "b h p")
    batch, num_heads, head_dim = x.shape
    check_shape("ssd_step", "B", B, "b g n", b=batch)
    num_groups, state_dim = B.shape[1:]
    sizes = {"b": batch, "h": num_heads, "p": head_dim, "g": num_groups, "n": state_dim}
    check_shape("ssd_step", "dt", dt, "b h", **sizes)
    check_shape("ssd_step", "A", A, "h", **sizes)
    check_shape("ssd_step", "C", C, "b g n", **sizes)
    check_shape("ssd_step", "state", state, "b h p n", **sizes)
    check_groups("ssd_step", num_heads, num_groups)
    check_dtype("ssd_step", x=x, dt=dt, A=A, B=B, C=C, state=state)

    full = jnp.promote_types(x.dtype, jnp.float32)
    heads = num_heads // num_groups
    dt, A = dt.astype(full), A.astype(full)
    x_dt = (x.astype(full) * dt[..., None]).reshape(batch, num_groups, heads * head_dim)
    decay = jnp.exp(log_decay(dt, A))  # (b, h), in [0, 1]
    B, C = B.astype(full), C.astype(full)

    new = jnp.einsum("bgk,bgn->bgkn", x_dt, B).reshape(state.shape)
    new_state = state.astype(full) * decay[..., None, None] + new
    # Heads fold into rows, so that each group is one matrix-vector product.
    rows = new_state.reshape(batch, num_groups, heads * head_dim, state_dim)
    y = jnp.einsum("bgkn,bgn->bgk", rows, C).reshape(x.shape)
    if D is not None:
        check_shape("ssd_step", "D", D, "h" if D.ndim == 1 else "h p", **sizes)
        y = y + D.astype(full).reshape(num_heads, -1) * x.astype(full)
    return y.astype(x.dtype), new_state.astype(state.dtype)
