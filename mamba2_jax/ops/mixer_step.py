"""One token of a Mamba-2 mixer, with or without its projections, as one function of arrays."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mamba2_jax.ops.checks import check_choice, check_dtype, check_shape
from mamba2_jax.ops.conv.causal_conv1d import causal_conv1d_step
from mamba2_jax.ops.device import on_device_of, platform
from mamba2_jax.ops.gate import silu_gate
from mamba2_jax.ops.linear import linear
from mamba2_jax.ops.rms_norm import gated_rms_norm
from mamba2_jax.ops.scan.api import ssd_step
from mamba2_jax.ops.scan.dispatch import IMPLEMENTATIONS, choose_mixer_step, describe
from mamba2_jax.typing import Array, Bool, DTypeLike, Float


class MixerState(NamedTuple):
    """State of a mixer: the last `k - 1` inputs of its convolution, oldest first, and that of the SSD."""

    conv_x: Float[Array, "b k-1 e"]
    conv_BC: Float[Array, "b k-1 2 gn"]
    ssm: Float[Array, "b h p n"]


class MixerWeights(NamedTuple):
    """Parameters of a mixer; without `input` and `output`, those between its projections."""

    taps_x: Float[Array, "k e"]
    taps_BC: Float[Array, "k 2 gn"]
    bias_x: Float[Array, " e"] | None
    bias_BC: Float[Array, "2 gn"] | None
    dt_bias: Float[Array, " h"]
    A_log: Float[Array, " h"]  # A = -exp(A_log)
    D: Float[Array, "h *p"]  # (h,) or (h, p)
    norm: Float[Array, " e"] | None  # None: the gate alone
    input: tuple[Float[Array, "d 2 e"], Float[Array, "d 2 gn"], Float[Array, "d h"]] | None = None
    output: Float[Array, "e d"] | None = None


class MixerOptions(NamedTuple):
    """Static options of a mixer between its projections."""

    dt_limits: tuple[float, float] = (0.0, float("inf"))
    eps: float = 1e-5
    norm_before_gate: bool = False
    own_groups: Callable[[Array], Array] | None = None  # of `(b, 2, g, n)`; on a mesh, where a group spans
    combine: Callable[[Array], Array] | None = None  # devices; as in `gated_rms_norm`


def decay_rate(A_log: Float[Array, " h"], dtype: DTypeLike) -> Float[Array, " h"]:
    """Return A, finite: above `exp(88)` float32 overflows to inf, with the gradient inf * 0."""
    return -jnp.exp(jnp.minimum(A_log.astype(dtype), 88.0))


def step_sizes(
    dt: Float[Array, "*b h"],
    bias: Float[Array, " h"],
    limits: tuple[float, float],
    mask: Bool[Array, "*b"] | None = None,
) -> Float[Array, "*b h"]:
    """Compute `clip(softplus(dt + bias))`; 0 where the mask is false, which leaves the state unchanged."""
    dt = jnp.clip(jax.nn.softplus(dt + bias.astype(dt.dtype)), *limits)
    return dt if mask is None else jnp.where(mask[..., None], dt, 0.0)


def mixer_step(
    inputs: Array | tuple[Array, Array, Array],
    state: MixerState,
    weights: MixerWeights,
    *,
    mask: Bool[Array, " b"] | None = None,
    options: MixerOptions = MixerOptions(),  # noqa: B008 (immutable)
    implementation: str | None = None,
    preferred: str | None = None,
) -> tuple[Float[Array, "b *c"], MixerState]:
    r"""Advance a mixer by one token: projections, convolutions, `ssd_step`, gate and norm.

    Args:
        inputs: normed hidden states `(b, d)` if there is `weights.input`, whose dtype is the compute dtype.
            Otherwise its results: gate z and input x `(b, 2, e)`, B and C `(b, 2, g * n)`, float32 dt
            `(b, h)`, before the convolution and before bias and softplus.
        state: state after the preceding tokens.
        weights: parameters of the mixer; both projections are optional.
        mask: `(b,)`; a row where it is false keeps its state, and its result is unspecified. None: all count.
        options: bounds of dt, and options of the norm.
        implementation: None for the default, `"xla"`, or a kernel: `"mosaic_gpu"`. All are differentiable;
            the derivatives are those of `"xla"`.
        preferred: an implementation to take as the default if it has this op and can run here.

    Returns:
        result: with `weights.output`, the update of the residual stream `(b, d)` float32; otherwise the
            normed output `(b, e)` in the compute dtype, the operand of the output projection.
        state: state after the token.

    Raises:
        ValueError: an invalid shape, dtype or option; the message names the argument.
        NotImplementedError: the named implementation cannot run here; the message says what can.

    Source: Dao & Gu 2024, arXiv:2405.21060, section 7.

    >>> import jax.numpy as jnp
    >>> state = MixerState(jnp.zeros((1, 3, 32)), jnp.zeros((1, 3, 2, 16)), jnp.zeros((1, 4, 8, 16)))
    >>> taps = jnp.ones((4, 32)), jnp.ones((4, 2, 16))
    >>> weights = MixerWeights(*taps, None, None, jnp.zeros(4), jnp.zeros(4), jnp.ones(4), jnp.ones(32))
    >>> inputs = jnp.ones((1, 2, 32)), jnp.ones((1, 2, 16)), jnp.ones((1, 4))
    >>> y, state = mixer_step(inputs, state, weights)
    >>> y.shape, state.ssm.shape
    ((1, 32), (1, 4, 8, 16))
    """
    _check(inputs, state, weights, mask, implementation, preferred)
    batch, heads, head_dim, state_dim = state.ssm.shape
    leaves = jax.tree.leaves((inputs, state.ssm))
    with on_device_of(*leaves):
        sizes = batch, 1, heads, head_dim, state.conv_BC.shape[3] // state_dim, state_dim
        problem = describe(leaves[0].dtype, *sizes, D_per_channel=weights.D.ndim == 2)
        plain = partial(_plain, options)
        run = choose_mixer_step(implementation, preferred, problem, plain, options, state.ssm.dtype)
        return run(inputs, state, weights, mask)


def _plain(
    options: MixerOptions, inputs: Any, state: MixerState, weights: MixerWeights, mask: Array | None
) -> tuple[Array, MixerState]:
    """Compose `mixer_step` from the ops of its parts."""
    zx, BC, dt = inputs if weights.input is None else project(inputs, weights.input)
    y, state = _between(options, zx, BC, dt, state, weights, mask)
    return (y if weights.output is None else linear(y, weights.output, dtype=y.dtype)), state


def project(
    hidden: Float[Array, "b d"], weights: tuple[Array, Array, Array]
) -> tuple[Float[Array, "b 2 e"], Float[Array, "b 2 gn"], Float[Array, "b h"]]:
    """Apply the input projection; dt is float32, the others have the dtype of `hidden`.

    XLA on a GPU turns the product of one row into a multiplication and a sum. For the narrow matrices of B, C
    and dt it keeps a transposed copy (17 MB a layer of Codestral's width), or writes all products in float32
    (2 MB). Two rows make matrix products, without either.
    """
    zx = linear(hidden, weights[0], dtype=hidden.dtype)
    count = hidden.shape[0]
    if count == 1 and platform() == "gpu":
        hidden = jnp.pad(hidden, ((0, 1), (0, 0)))
    BC, dt = (linear(hidden, weight, dtype=hidden.dtype)[:count] for weight in weights[1:])
    return zx.astype(hidden.dtype), BC.astype(hidden.dtype), dt


def _between(
    options: MixerOptions,
    zx: Array,
    BC: Array,
    dt: Array,
    state: MixerState,
    weights: MixerWeights,
    mask: Array | None,
) -> tuple[Array, MixerState]:
    """Run what lies between the projections."""
    z, x = zx[:, 0], zx[:, 1]
    x, conv_x = causal_conv1d_step(x, weights.taps_x, weights.bias_x, state.conv_x)
    BC, conv_BC = causal_conv1d_step(BC, weights.taps_BC, weights.bias_BC, state.conv_BC)
    if mask is not None:
        conv_x = jnp.where(mask[:, None, None], conv_x, state.conv_x)
        conv_BC = jnp.where(mask[:, None, None, None], conv_BC, state.conv_BC)

    batch, heads, head_dim, state_dim = state.ssm.shape
    BC = BC.reshape(batch, 2, -1, state_dim)
    num_groups = BC.shape[2]
    if options.own_groups is not None:
        BC = options.own_groups(BC)
    dt = step_sizes(dt, weights.dt_bias, options.dt_limits, mask)
    x = x.reshape(batch, heads, head_dim)
    A = decay_rate(weights.A_log, jnp.promote_types(zx.dtype, jnp.float32))
    y, ssm = ssd_step(x, dt, A, BC[:, 0], BC[:, 1], state.ssm, D=weights.D)
    y, after = y.reshape(z.shape), MixerState(conv_x, conv_BC, ssm)
    if weights.norm is None:
        return silu_gate(y, z), after
    combine = {} if options.combine is None else {"combine": options.combine, "num_groups": 1}
    norm = {"eps": options.eps, "num_groups": num_groups, "norm_before_gate": options.norm_before_gate}
    return gated_rms_norm(y, z, weights.norm, **(norm | combine)), after


def _check(inputs, state, weights, mask, implementation, preferred) -> None:
    """Raise ValueError unless the shapes agree; the ops of the parts check their own arguments."""
    op = "mixer_step"
    check_choice(op, "implementation", implementation, (None, *IMPLEMENTATIONS))
    check_choice(op, "preferred", preferred, (None, *IMPLEMENTATIONS))
    check_shape(op, "state.ssm", state.ssm, "b h p n")
    batch, heads, head_dim, state_dim = state.ssm.shape
    check_shape(op, "state.conv_BC", state.conv_BC, "b k t c", b=batch, t=2)
    sizes = {"b": batch, "h": heads, "e": heads * head_dim, "t": 2, "c": state.conv_BC.shape[3]}
    if sizes["c"] % state_dim:
        raise ValueError(f"{op}: B has {sizes['c']} columns, wants a multiple of state_dim={state_dim}")
    if weights.input is None:
        for name, array, axes in zip(("zx", "BC", "dt"), inputs, ("b t e", "b t c", "b h"), strict=True):
            check_shape(op, name, array, axes, **sizes)
            check_dtype(op, **{name: array})
    else:
        check_shape(op, "hidden", inputs, "b d", b=batch)
        check_dtype(op, hidden=inputs)
        sizes["d"] = inputs.shape[1]
        for name, array, axes in zip(
            ("zx", "BC", "dt"), weights.input, ("d t e", "d t c", "d h"), strict=True
        ):
            check_shape(op, f"weights.input of {name}", array, axes, **sizes)
    if weights.output is not None:
        check_shape(op, "weights.output", weights.output, "e d", e=sizes["e"])
    check_shape(op, "weights.dt_bias", weights.dt_bias, "h", **sizes)
    if mask is not None:
        check_shape(op, "mask", mask, "b", **sizes)
