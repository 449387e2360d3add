"""RMSNorm, and gated RMSNorm over channel groups, computed in float32."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from mamba2_jax.ops.checks import check_dtype, check_shape
from mamba2_jax.ops.on_cpu.gradients import for_every
from mamba2_jax.typing import Array, Float


def rms_norm(
    x: Float[Array, "*b d"], weight: Float[Array, " d"], *, eps: float = 1e-5
) -> Float[Array, "*b d"]:
    r"""Compute $x / \sqrt{\mathrm{mean}(x^2) + \epsilon} \cdot w$ over the last axis.

    Args:
        x: `(..., d)`.
        weight: `(d,)`.
        eps: added to the mean square.

    Returns:
        `(..., d)` in the dtype of `x`; computed in float32 (float64 when `x` is).

    Raises:
        ValueError: an invalid shape or dtype; the message names the argument.

    Source: Zhang & Sennrich 2019, arXiv:1910.07467.
    """
    _check("rms_norm", x, weight)
    full = jnp.promote_types(x.dtype, jnp.float32)
    return _normalize(x.astype(full), weight.astype(full), eps, num_groups=1).astype(x.dtype)


def gated_rms_norm(
    y: Float[Array, "*b e"],
    z: Float[Array, "*b e"],
    weight: Float[Array, " e"],
    *,
    eps: float = 1e-5,
    num_groups: int = 1,
    norm_before_gate: bool = False,
    combine: Callable[[Array], Array] = lambda mean_square: mean_square,
) -> Float[Array, "*b e"]:
    r"""Compute the RMSNorm of `y * silu(z)` separately for each of `num_groups` equal channel groups.

    Args:
        y: output of the scan with heads flattened `(..., e)`.
        z: gate `(..., e)`.
        weight: `(e,)`.
        eps: added to the mean square of each group.
        num_groups: number of groups of `e / num_groups` adjacent channels; the model's `n_groups`.
        norm_before_gate: normalise `y` first, then gate the result. False in every published model.
        combine: function on the mean squares `(..., num_groups, 1)` without size-1 axes before the last.
            Inside `shard_map`, where a group's channels lie on several devices, it averages over them.

    Returns:
        `(..., e)` in the dtype of `y`; computed in float32 (float64 when `y` is).

    Raises:
        ValueError: an invalid shape or dtype; the message names the argument.

    Source: Dao & Gu 2024, arXiv:2405.21060, section 7.
    """
    _check("gated_rms_norm", y, weight)
    if z.shape != y.shape:
        raise ValueError(f"gated_rms_norm: z has shape {z.shape}, wants that of y, {y.shape}")
    if num_groups < 1 or y.shape[-1] % num_groups:
        raise ValueError(
            f"gated_rms_norm: {y.shape[-1]} channels do not split into num_groups={num_groups}; "
            "check n_groups in the config"
        )
    full = jnp.promote_types(y.dtype, jnp.float32)

    # Remat: save y and z instead of four float32 arrays of their size; and the result of the collective.
    @partial(jax.checkpoint, policy=jax.checkpoint_policies.save_only_these_names("mean_square"))
    def run(y, z, weight):
        gate, weight, value = jax.nn.silu(z.astype(full)), weight.astype(full), y.astype(full)
        if norm_before_gate:
            out = _normalize(value, weight, eps, num_groups, combine) * gate
        else:
            out = _normalize(value * gate, weight, eps, num_groups, combine)
        return out.astype(y.dtype)

    return run(y, z, weight)


def _normalize(
    x: Array,
    weight: Array,
    eps: float,
    num_groups: int,
    combine: Callable[[Array], Array] = lambda mean_square: mean_square,
) -> Array:
    # XLA on CPU computes the gradient's sums five times slower next to an axis of size 1.
    grouped = x.reshape(*(size for size in (*x.shape[:-1], num_groups) if size != 1), -1)
    mean_square = combine(jnp.mean(jnp.square(grouped), axis=-1, keepdims=True))
    mean_square = checkpoint_name(mean_square, "mean_square")
    normal = (grouped * jax.lax.rsqrt(mean_square + eps)).reshape(x.shape)
    return normal * for_every(x.shape[:-1], weight)


def _check(op: str, x: Array, weight: Array) -> None:
    if not hasattr(x, "ndim") or x.ndim == 0 or x.size == 0:
        raise ValueError(
            f"{op}: wants a non-empty array (..., channels), got shape {getattr(x, 'shape', None)}"
        )
    check_shape(op, "weight", weight, "d", d=x.shape[-1])
    check_dtype(op, x=x, weight=weight)
