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


def triangle(size: int, dtype: jnp.dtype) -> Float[Array, "q s"]:
    """Ones where `s <= q`."""
    return jnp.tril(jnp.ones((size, size), dtype))


def through(a: Float[Array, "*b s"]) -> Float[Array, "*b q"]:
    """Sum `a` from the first token through each.

    A triangular product, because XLA's cumsum on CPU is quadratic too, and slower.
    """
    ones = triangle(a.shape[-1], a.dtype)
    return jnp.einsum("...s,qs->...q", a, ones, precision="highest")


def after(a: Float[Array, "*b q"]) -> Float[Array, "*b s"]:
    """Sum `a` over the tokens behind each."""
    ones = jnp.triu(jnp.ones((a.shape[-1],) * 2, a.dtype), 1)  # (s, q)
    return jnp.einsum("...q,sq->...s", a, ones, precision="highest")


@jax.custom_jvp
def between(a: Float[Array, "*b q"]) -> Float[Array, "*b q s"]:
    """Sum `a` from `log_decay` over the tokens behind `s` through `q`: <= 0, and 0 where `q < s`."""
    finfo = jnp.finfo(a.dtype)
    # Sums of `size` multiples of the unit, each at most `maxexp`, take no more than a mantissa's bits.
    size = a.shape[-1]
    unit = 2.0 ** ((finfo.maxexp * size - 1).bit_length() - finfo.nmant - 1)
    coarse = jnp.round(a / unit) * unit
    coarse, rest = through(coarse), through(a - coarse)
    sums = (coarse[..., :, None] - coarse[..., None, :]) + (rest[..., :, None] - rest[..., None, :])
    return jnp.minimum(sums, 0.0)


@between.defjvp
def _between_jvp(arrays: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    """Sum the tangents over the tokens behind `s` through `q`; transposed, the pairs around each token."""
    (a,), (da,) = arrays, tangents
    size = a.shape[-1]
    through_q = triangle(size, a.dtype)  # (q, t)
    behind_s = jnp.tril(through_q, -1)  # (t, s)
    da = repeat(da, size, axis=-2) * through_q  # (*b, q, t)
    return between(a), jnp.einsum("...qt,ts->...qs", da, behind_s, precision="highest")
