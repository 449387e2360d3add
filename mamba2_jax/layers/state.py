"""Types passed between layers: masks and segment ids of a batch, and the state of each layer."""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp

from mamba2_jax.ops.pieces import mean_over_group
from mamba2_jax.typing import Array, Bool, Float, Int


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class ConvState:
    """The last `k - 1` inputs of a layer's convolution, oldest first."""

    x: Float[Array, "b k-1 e"]
    BC: Float[Array, "b k-1 2 gn"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class AttentionConvState:
    """The last `k - 1` inputs of an attention layer's convolution, oldest first.

    The original's prefill stores the convolution's outputs here, and its decoding reads them as inputs, so
    that its first `k - 1` decoded tokens differ from its own prefill. Here both store and read inputs.
    """

    q: Float[Array, "b k-1 hp"]
    k: Float[Array, "b k-1 kvp"]
    v: Float[Array, "b k-1 kvp"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class KeyValues:
    """Key-value cache of an attention layer: token `i` of the row's document in slot `i`, keys rotated.

    Slots from the row's `position` on are unused.
    """

    keys: Float[Array, "b s kv p"]
    values: Float[Array, "b s kv p"]


@jax.tree_util.register_static
@dataclass(frozen=True)
class EveryState:
    """Mark in `Rows`: return the states after each token, `(b, l, ...)`, to go back to any of them.

    Keys and values stay as they are: slots from a row's position on are unused.
    """


@jax.tree_util.register_static
@dataclass(frozen=True)
class Rolling:
    """Mark in `Rows`: key/value buffers keep the last tokens of a document, as many as their capacity.

    Token `i` overwrites slot `i % capacity`. Each token of a call sees the call's tokens up to itself, and
    the buffer as before the call.
    """


class Rows(NamedTuple):
    """Mask and segment ids of a batch's tokens; None: no padding, and one document per row."""

    mask: Bool[Array, "b l"] | None = None
    segment_ids: Int[Array, "b l"] | None = None  # 0 wherever the mask is false
    past: Int[Array, " b"] | None = None  # for attention: cached tokens of each row's first document,
    positions: Int[Array, "b l"] | None = None  # and each token's position in its document
    every_state: EveryState | None = None  # needs tokens without padding
    rolling: Rolling | None = None

    @property
    def marks(self) -> Array | None:
        """Return the `segment_ids` argument of the ops: the segment ids, or else the boolean mask."""
        return self.mask if self.segment_ids is None else self.segment_ids


class LayerState(NamedTuple):
    """State of one layer in a `Mamba2Cache`."""

    conv: ConvState | AttentionConvState | None = None  # None: attention without a convolution
    ssm: Float[Array, "b h p n"] | None = None  # None: attention
    attention: KeyValues | None = None

    def updated(self, by: "LayerState") -> "LayerState":
        """Return the state with the fields that a mixer has; a layer may have two mixers."""
        return self._replace(**{name: value for name, value in by._asdict().items() if value is not None})


def windows_after_each(
    state: Float[Array, "b reach c"], x: Float[Array, "b l c"]
) -> Float[Array, "b l reach c"]:
    """Return the convolution state after each token `(b, l, k - 1, c)` of the inputs `x`."""
    reach, length = state.shape[1], x.shape[1]
    extended = jnp.concatenate([state, x.astype(state.dtype)], axis=1)
    return jnp.stack([extended[:, tap + 1 : tap + 1 + length] for tap in range(reach)], axis=2)


class Part(NamedTuple):
    """How a mixer is sharded over the devices of a mesh; the defaults are those of one device."""

    num_pieces: int = 1
    """Number of pieces of the token axis, one per device of `sequence`."""
    devices_per_group: int = 1
    """Neighbouring devices of `tensor` whose heads share a group; 1 also when each has several groups."""

    def mean_over_group(self, mean_square: Array, num_groups: int) -> Array:
        """Average a mean square over all devices that hold channels of the same group."""
        if self.devices_per_group == 1:
            return mean_square
        return mean_over_group(mean_square, num_groups, self.devices_per_group)
