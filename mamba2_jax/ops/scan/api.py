"""Public functions `ssd` and `ssd_step`: check the arguments, choose an implementation, run it."""

import jax.numpy as jnp

from mamba2_jax.ops.checks import check_choice, check_dtype, check_groups, check_integer, check_shape
from mamba2_jax.ops.device import on_device_of
from mamba2_jax.ops.scan.dispatch import IMPLEMENTATIONS, choose_scan, choose_step, describe
from mamba2_jax.typing import Array, Float, Int


def ssd(
    x: Float[Array, "b l h p"],
    dt: Float[Array, "b l h"],
    A: Float[Array, " h"],
    B: Float[Array, "b l g n"],
    C: Float[Array, "b l g n"],
    *,
    D: Float[Array, "h *p"] | None = None,
    initial_state: Float[Array, "b h p n"] | None = None,
    segment_ids: Int[Array, "b l"] | None = None,
    chunk_size: int | None = None,
    implementation: str | None = None,
) -> tuple[Float[Array, "b l h p"], Float[Array, "b h p n"]]:
    r"""Run the SSD scan (state space duality), Mamba-2's sequence mixing, over a whole sequence.

    $$h_t = e^{dt_t A} h_{t-1} + dt_t\, x_t B_t^\top, \qquad y_t = h_t C_t + D x_t$$

    Args:
        x: inputs `(b, l, h, p)`; their dtype is the compute dtype of the matrix products.
        dt: step sizes `(b, l, h)` after softplus and clamp; a token with dt = 0 leaves the state unchanged.
        A: `(h,)`, negative: natural-log decay per unit of dt. Below -1e30, also -inf, it counts as -1e30 and
            has gradient 0: any dt above 1e-27 wipes the state, and dt = 0 leaves it.
        B: `(b, l, g, n)`; `g` divides `h`, head `i` uses group `i // (h // g)`.
        C: `(b, l, g, n)`.
        D: skip weights `(h,)` or `(h, p)`.
        initial_state: `(b, h, p, n)`, state before the row's first document; None: zeros.
        segment_ids: `(b, l)` integers; 0 is padding (its dt counts as 0, its `y` is unspecified), any
            change starts a document with a fresh state.
        chunk_size: tokens per chunk of `"xla"`, which pads any length; None: the platform's default.
        implementation: `"recurrent"`, `"xla"`, `"mosaic_gpu"` or `"triton"`, never replaced by another; None:
            `"mosaic_gpu"` on Hopper in 16 bits where that kernel supports the sizes, else `"xla"`. It pads
            a `p` of 32 to 128 with zeros to 64 or 128, which is exact: states have the size of the caller's.
            `"recurrent"` and `"xla"` have forward and reverse mode of any order; the two kernels have
            first-order reverse mode only. None reads the device from the arrays. Inside your own `jit`
            tracers have no device: for arrays off JAX's default device, name an implementation, or call the
            jitted function under `with jax.default_device(...)`.

    Returns:
        y: `(b, l, h, p)` in the dtype of `x`.
        final_state: `(b, h, p, n)` float32, after the row's last document (float64 when `x` is).

    Raises:
        ValueError: an invalid shape, dtype or option; the message names the argument.
        NotImplementedError: the named implementation cannot run here; the message says what can.

    Source: Dao & Gu 2024, arXiv:2405.21060, sections 2 and 6.

    >>> import jax, jax.numpy as jnp
    >>> key = jax.random.key(0)
    >>> x = jax.random.normal(key, (1, 100, 4, 8))
    >>> dt = jnp.full((1, 100, 4), 0.1)
    >>> B = C = jax.random.normal(key, (1, 100, 2, 16))
    >>> y, state = ssd(x, dt, -jnp.ones(4), B, C)
    >>> y.shape, state.shape
    ((1, 100, 4, 8), (1, 4, 8, 16))
    """
    check_arguments("ssd", x, dt, A, B, C, D, initial_state, segment_ids, chunk_size, implementation)

    full = jnp.promote_types(x.dtype, jnp.float32)
    dt, A = dt.astype(full), A.astype(full)
    B, C = B.astype(x.dtype), C.astype(x.dtype)
    if segment_ids is not None:
        segment_ids = segment_ids.astype(jnp.int32)
        dt = jnp.where(segment_ids[..., None] != 0, dt, 0.0)
    if initial_state is None:
        initial_state = jnp.zeros((x.shape[0], *x.shape[2:], B.shape[3]), full)
    else:
        initial_state = initial_state.astype(full)
    D_per_channel = D is not None and D.ndim == 2
    with on_device_of(x, dt, A, B, C, D, initial_state, segment_ids):
        problem = describe(x.dtype, *x.shape, *B.shape[2:], D_per_channel=D_per_channel)
        run = choose_scan(implementation, chunk_size, problem)
        return run(x, dt, A, B, C, D, initial_state, segment_ids)


def ssd_step(
    x: Float[Array, "b h p"],
    dt: Float[Array, "b h"],
    A: Float[Array, " h"],
    B: Float[Array, "b g n"],
    C: Float[Array, "b g n"],
    state: Float[Array, "b h p n"],
    *,
    D: Float[Array, "h *p"] | None = None,
    implementation: str | None = None,
) -> tuple[Float[Array, "b h p"], Float[Array, "b h p n"]]:
    r"""Advance the state by one token and compute the output: `ssd` on rows of one token.

    $$h \leftarrow e^{dt A} h + dt\, x B^\top, \qquad y = h C + D x$$

    Args:
        x: inputs `(b, h, p)`; B and C are cast to their dtype.
        dt: step sizes `(b, h)`, after softplus and clamp; 0 leaves the state unchanged.
        A: `(h,)`, negative.
        B: `(b, g, n)`; `g` divides `h`, head `i` uses group `i // (h // g)`.
        C: `(b, g, n)`.
        state: `(b, h, p, n)`, usually float32.
        D: skip weights `(h,)` or `(h, p)`.
        implementation: None or `"xla"`, the only implementation, which has forward and reverse mode.

    Returns:
        y: `(b, h, p)` in the dtype of `x`.
        state: `(b, h, p, n)` in the dtype of `state`.

    Raises:
        ValueError: an invalid shape, dtype or option; the message names the argument.
        NotImplementedError: the named implementation cannot run here; the message says what can.

    Source: Dao & Gu 2024, arXiv:2405.21060, section 2.

    >>> import jax.numpy as jnp
    >>> B = C = jnp.ones((1, 2, 16))
    >>> y, state = ssd_step(
    ...     jnp.ones((1, 4, 8)), jnp.full((1, 4), 0.1), -jnp.ones(4), B, C, jnp.zeros((1, 4, 8, 16))
    ... )
    >>> y.shape, state.shape
    ((1, 4, 8), (1, 4, 8, 16))
    """
    op = "ssd_step"
    check_shape(op, "x", x, "b h p")
    batch, num_heads, head_dim = x.shape
    check_shape(op, "B", B, "b g n", b=batch)
    sizes = {"b": batch, "h": num_heads, "p": head_dim, "g": B.shape[1], "n": B.shape[2]}
    check_shape(op, "C", C, "b g n", **sizes)
    check_shape(op, "dt", dt, "b h", **sizes)
    check_shape(op, "A", A, "h", **sizes)
    check_shape(op, "state", state, "b h p n", **sizes)
    check_groups(op, num_heads, B.shape[1])
    check_dtype(op, x=x, dt=dt, A=A, B=B, C=C, D=D, state=state)
    check_choice(op, "implementation", implementation, (None, *IMPLEMENTATIONS))
    if D is not None:
        check_shape(op, "D", D, "h" if D.ndim == 1 else "h p", **sizes)

    full = jnp.promote_types(x.dtype, jnp.float32)
    dt, A = dt.astype(full), A.astype(full)
    B, C = B.astype(x.dtype), C.astype(x.dtype)
    D_per_channel = D is not None and D.ndim == 2
    with on_device_of(x, dt, A, B, C, state, D):
        problem = describe(x.dtype, batch, 1, *x.shape[1:], *B.shape[1:], D_per_channel=D_per_channel)
        return choose_step(implementation, problem)(x, dt, A, B, C, state, D)


def check_arguments(op, x, dt, A, B, C, D, initial_state, segment_ids, chunk_size, implementation) -> None:
    """Raise ValueError unless the arguments of `ssd` are valid and their shapes agree."""
    check_shape(op, "x", x, "b l h p")
    batch, length, num_heads, head_dim = x.shape
    check_shape(op, "B", B, "b l g n", b=batch, l=length)
    sizes = {"b": batch, "l": length, "h": num_heads, "p": head_dim, "g": B.shape[2], "n": B.shape[3]}
    check_shape(op, "C", C, "b l g n", **sizes)
    check_shape(op, "dt", dt, "b l h", **sizes)
    check_shape(op, "A", A, "h", **sizes)
    check_groups(op, num_heads, B.shape[2])
    check_dtype(op, x=x, dt=dt, A=A, B=B, C=C, D=D, initial_state=initial_state)
    check_choice(op, "implementation", implementation, (None, *IMPLEMENTATIONS))
    if D is not None:
        check_shape(op, "D", D, "h" if D.ndim == 1 else "h p", **sizes)
    if initial_state is not None:
        check_shape(op, "initial_state", initial_state, "b h p n", **sizes)
    if segment_ids is not None:
        check_shape(op, "segment_ids", segment_ids, "b l", **sizes)
        check_integer(op, segment_ids=segment_ids)
    if chunk_size is not None and (
        isinstance(chunk_size, bool) or int(chunk_size) != chunk_size or chunk_size < 1
    ):
        raise ValueError(
            f"{op}: chunk_size={chunk_size!r} must be a positive integer, or None for the platform's own"
        )
