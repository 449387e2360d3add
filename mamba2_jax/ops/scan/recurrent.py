r"""SSD token by token: the definition, and the reference that every other implementation is tested against.

$$h_t = e^{dt_t A} h_{t-1} + dt_t\, x_t B_t^\top, \qquad y_t = h_t C_t + D x_t$$
"""

import jax
import jax.numpy as jnp

from mamba2_jax.ops.scan.step import ssd_one_token
from mamba2_jax.ops.segments import document_starts
from mamba2_jax.typing import Array, Float, Int


def ssd_recurrent(
    x: Float[Array, "b l h p"],
    dt: Float[Array, "b l h"],
    A: Float[Array, " h"],
    B: Float[Array, "b l g n"],
    C: Float[Array, "b l g n"],
    D: Float[Array, "h *p"] | None,
    initial_state: Float[Array, "b h p n"],
    segment_ids: Int[Array, "b l"] | None,
) -> tuple[Float[Array, "b l h p"], Float[Array, "b h p n"]]:
    """Scan over the tokens. Arguments and results as in `ops.ssd`. Source: arXiv:2405.21060, section 2."""
    if segment_ids is None:
        resets = jnp.zeros(x.shape[:2], bool)
    else:
        resets = document_starts(segment_ids)

    def token(state, inputs):
        x_t, dt_t, B_t, C_t, reset = inputs
        state = jnp.where(reset[:, None, None, None], 0.0, state)
        y_t, state = ssd_one_token(x_t, dt_t, A, B_t, C_t, state, D)
        return state, y_t

    over_tokens = jax.tree.map(lambda a: jnp.moveaxis(a, 1, 0), (x, dt, B, C, resets))
    state, y = jax.lax.scan(token, initial_state, over_tokens)
    return jnp.moveaxis(y, 0, 1), state
