"""Run a Mamba-2 mixer on one token per row, and on a few tokens with the states after each."""

from functools import partial
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

from mamba2_jax.layers.parts import Projection, value_of
from mamba2_jax.layers.state import ConvState, LayerState, Part
from mamba2_jax.ops import MixerOptions, MixerState, MixerWeights, mixer_step
from mamba2_jax.ops.pieces import own_group
from mamba2_jax.typing import Array

if TYPE_CHECKING:
    from mamba2_jax.layers.mamba2 import InProjection, Mamba2Mixer

Matrices = tuple[tuple[Array, Array, Array], Array]
"""Those of the input projection and of the output projection."""


def matrices_alone(into: "InProjection", out: Projection) -> Matrices | None:
    """Return the matrices of both projections if these are nothing but products with them; None otherwise."""
    if into.adapters_in_use() or out.adapters_in_use() or out.bias is not None:
        return None
    if into.weight_z0x0 is not None or any(factor != 1 for factor in into.multipliers):
        return None
    return (into.weight_zx[...], into.weight_BC[...], into.weight_dt[...]), out.weight[...]


def one_token(
    mixer: "Mamba2Mixer",
    inputs: Array | tuple[Array, Array, Array],
    state: LayerState,
    mask: Array | None,
    part: Part,
    matrices: Matrices | None = None,
) -> tuple[Array, LayerState]:
    """Run `ops.mixer_step`.

    Args:
        mixer: the mixer.
        inputs: hidden states `(b, d)` if there are `matrices`, otherwise the results of the input projection.
        state: state after the preceding tokens.
        mask: `(b,)`, or None.
        part: how the mixer is sharded.
        matrices: from `matrices_alone`; None: the caller projects.

    Returns:
        The result of `ops.mixer_step`, and the state after the token.
    """
    conv, ssm = state.conv, state.ssm
    if not isinstance(conv, ConvState) or ssm is None:
        raise ValueError("Mamba2Mixer: state is not that of a Mamba-2 layer; give that of the model")
    options = MixerOptions(mixer.time_step_limit, norm_before_gate=mixer.norm_before_gate)
    norm = None
    if mixer.norm is not None:
        norm, options = mixer.norm.weight[...], options._replace(eps=mixer.norm.eps)
    if part.devices_per_group > 1:
        options = options._replace(
            own_groups=partial(own_group, devices_per_group=part.devices_per_group, axis=2),
            combine=partial(part.mean_over_group, num_groups=mixer.num_groups),
        )
    weights = MixerWeights(
        taps_x=mixer.conv1d.taps("weight_x"),
        taps_BC=mixer.conv1d.taps("weight_BC"),
        bias_x=value_of(mixer.conv1d.bias_x),
        bias_BC=value_of(mixer.conv1d.bias_BC),
        dt_bias=mixer.dt_bias[...],
        A_log=mixer.A_log[...],
        D=mixer.D[...],
        norm=norm,
    )
    if matrices is not None:
        inputs = jnp.asarray(inputs, mixer.dtype)
        weights = weights._replace(input=matrices[0], output=matrices[1])
    y, after = mixer_step(
        inputs,
        MixerState(conv.x, conv.BC, ssm),
        weights,
        mask=mask,
        options=options,
        preferred=mixer.ssd_implementation,
    )
    return y, LayerState(ConvState(x=after.conv_x, BC=after.conv_BC), after.ssm, None)


def each_token(
    mixer: "Mamba2Mixer", leaves: tuple[Array, Array, Array], state: LayerState, part: Part
) -> tuple[Array, LayerState]:
    """Run `one_token` over a few tokens `(b, l, ...)`; return y, and the states after each of them."""

    def step(state, token):
        y, state = one_token(mixer, token, state, None, part)
        return state, (y, state)

    tokens = jax.tree.map(lambda a: jnp.moveaxis(a, 1, 0), leaves)
    _, after = jax.lax.scan(step, state._replace(attention=None), tokens)
    return jax.tree.map(lambda a: jnp.moveaxis(a, 0, 1), after)
