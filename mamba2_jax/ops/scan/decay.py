r"""Decay of the state between two tokens, accurate in float32 for any mix of fast and slow decays.

Between tokens `s` and `q` the state decays by `exp(a[s+1] + ... + a[q])`, with `a = dt * A <= 0`. A cheap
way to all these sums is the difference of two running sums. But float32 has 24 bits: after a token that
wipes the state, `a = -320`, the running sum has no bits left for slow neighbours, `a = -0.016`. Three
measures keep the precision.

1. Bounds. Each `a` is clamped to `-finfo.maxexp` (-128 in float32), where its exp is already 0. So a running
   sum is bounded, and `inf - inf` and `0 * inf` cannot occur.
2. Two running sums. Each `a` is split into a multiple of a power of two so coarse that no sum over the chunk
   is rounded, and a remainder so small that the rounding of its sums is negligible.
3. Gradients without a difference. The gradient of `a[t]` is a sum over the pairs `s < t <= q`. The derivative
   of two running sums would also add and subtract all other pairs, whose rounding errors remain; here only
   those pairs are summed. A token that wipes the state gets a gradient of exactly 0.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from mamba2_jax.typing import Array, Float

LOWEST_A = -1e30
"""Lower bound of A: with it a step of dt > 1e-27 still wipes the state, and dt = 0 gives 0, not NaN."""


def finite(A: Float[Array, " *h"]) -> Float[Array, " *h"]:
    """Clamp A, which may be -inf, to at least `LOWEST_A`; the gradient of a clamped value is 0."""
    return jnp.maximum(A, LOWEST_A)


def log_decay(dt: Float[Array, "..."], A: Float[Array, "..."]) -> Float[Array, "..."]:
    """Return `dt * A`, the natural log of the decay at each token, clamped where its exp is 0.

    A step of dt = 0 leaves the state unchanged, also where A is -inf.
    """
    return jnp.maximum(dt * finite(A), -float(jnp.finfo(dt.dtype).maxexp))


class LogDecays(NamedTuple):
    """Sums of `a` over ranges of tokens in a chunk, all <= 0."""

    from_start: Float[Array, "*b q"]  # through token q
    to_end: Float[Array, "*b s"]  # over the tokens after s
    between: Float[Array, "*b q s"]  # over the tokens after s through q; 0 for q <= s


@jax.custom_jvp
def log_decays(a: Float[Array, "*b q"]) -> LogDecays:
    """Sum `a (..., q)`, a result of `log_decay`, over each token range of the chunk that the scan needs."""
    size, finfo = a.shape[-1], jnp.finfo(a.dtype)
    # The sum of `size` multiples of the unit, each at most `maxexp`, fits in the mantissa.
    unit = 2.0 ** ((finfo.maxexp * size - 1).bit_length() - finfo.nmant - 1)
    coarse = jnp.round(a / unit) * unit
    # A triangular product, because XLA's cumsum on CPU is quadratic too, and slower.
    both = jnp.stack([coarse, a - coarse])
    coarse, rest = jnp.einsum("...s,qs->...q", both, _triangle(a), precision="highest")

    def difference(one, other):
        return jnp.minimum((one(coarse) - other(coarse)) + (one(rest) - other(rest)), 0.0)

    return LogDecays(
        from_start=coarse + rest,
        to_end=difference(lambda sums: sums[..., -1:], lambda sums: sums),
        between=difference(lambda sums: sums[..., :, None], lambda sums: sums[..., None, :]),
    )


@log_decays.defjvp
def _log_decays_jvp(arrays: tuple[Array], tangents: tuple[Array]) -> tuple[LogDecays, LogDecays]:
    """Sum the tangents over each range directly; transposed, a token sums only the ranges that contain it."""
    (a,), (da,) = arrays, tangents
    through_q = _triangle(a)  # (q, t)
    behind_s = jnp.tril(through_q, -1)  # (t, s)
    product = partial(jnp.einsum, precision="highest")
    return log_decays(a), LogDecays(
        from_start=product("...t,qt->...q", da, through_q),
        to_end=product("...t,ts->...s", da, behind_s),
        between=product("...qt,ts->...qs", da[..., None, :] * through_q, behind_s),
    )


def _triangle(a: Float[Array, "*b q"]) -> Float[Array, "q q"]:
    return jnp.tril(jnp.ones((a.shape[-1],) * 2, a.dtype))
