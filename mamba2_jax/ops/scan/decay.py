r"""How much of the state is left between two tokens, exact in float32 however fast and slow decays mix.

Between tokens `s` and `q` the state decays by `exp(a[s+1] + ... + a[q])`, with `a = dt * A <= 0`. The short
way to all these sums is the difference of two running sums. But float32 has 24 bits: behind a token that
wipes the state, `a = -320`, the running sum has no digits left for its slow neighbours, `a = -0.016`. Three
things keep the digits.

1. Bounds. Whatever is below `-finfo.maxexp` (-128 in float32) is as good as that: its exp is 0. So a running
   sum cannot grow without limit, and infinity never meets 0 or itself.
2. Two running sums. Each `a` is split into a multiple of a power of two so coarse that no sum over the chunk
   is rounded, and a rest, so small that what its sums are rounded by does not count.
3. Gradients without a difference. In that of `a[t]` there is every pair `s < t <= q`, and no other. As the
   derivative of two running sums the others would be in it twice, with opposite signs, and leave their
   rounding behind; here only those pairs are summed. A token that wipes the state gets exactly 0.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from mamba2_jax.ops.on_cpu.gradients import repeat
from mamba2_jax.typing import Array, Float

LOWEST_A = -1e30
"""A is bounded by this: a step of dt > 1e-27 wipes the state anyhow, and dt = 0 times it is 0, not NaN."""


def finite(A: Float[Array, " *h"]) -> Float[Array, " *h"]:
    """Bound A, which may be -inf; where it is bounded its gradient is 0."""
    return jnp.maximum(A, LOWEST_A)


def log_decay(dt: Float[Array, "..."], A: Float[Array, "..."]) -> Float[Array, "..."]:
    """Return `dt * A`, the natural log of the decay at each token, bounded where its exp is 0.

    A step of 0 leaves the state as it is, also where A is -inf.
    """
    return jnp.maximum(dt * finite(A), -float(jnp.finfo(dt.dtype).maxexp))


class LogDecays(NamedTuple):
    """Sums of `a` in a chunk, all <= 0."""

    from_start: Float[Array, "*b q"]  # through token q
    to_end: Float[Array, "*b s"]  # over the tokens behind s
    between: Float[Array, "*b q s"]  # over the tokens behind s through q; 0 where there is none


@jax.custom_jvp
def log_decays(a: Float[Array, "*b q"]) -> LogDecays:
    """Sum `a`, which comes from `log_decay`, over each stretch of the chunk that the scan asks for."""
    size, finfo = a.shape[-1], jnp.finfo(a.dtype)
    # `size` multiples of the unit, none above `maxexp`, have a sum of no more bits than a mantissa.
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
    """Sum the tangents over each stretch by itself. Transposed: to a token, what stretches around it say."""
    (a,), (da,) = arrays, tangents
    through_q = _triangle(a)  # (q, t)
    behind_s = jnp.tril(through_q, -1)  # (t, s)
    product = partial(jnp.einsum, precision="highest")
    return log_decays(a), LogDecays(
        from_start=product("...t,qt->...q", da, through_q),
        to_end=product("...t,ts->...s", da, behind_s),
        between=product("...qt,ts->...qs", repeat(da, a.shape[-1], axis=-2) * through_q, behind_s),
    )


def _triangle(a: Float[Array, "*b q"]) -> Float[Array, "q q"]:
    return jnp.tril(jnp.ones((a.shape[-1],) * 2, a.dtype))
