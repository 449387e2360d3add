"""What passes between layers: the marks of a batch's tokens, and what each layer remembers."""

from dataclasses import dataclass
from typing import NamedTuple

import jax

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
    """The last `k - 1` inputs of the convolution of an attention layer, oldest first.

    The original's prefill keeps the convolution's outputs here and its decoding takes them for inputs, so
    that its first `k - 1` decoded tokens differ from its own prefill. These are the inputs in both.
    """

    q: Float[Array, "b k-1 hp"]
    k: Float[Array, "b k-1 kvp"]
    v: Float[Array, "b k-1 kvp"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class KeyValues:
    """Keys, rotated, and values of an attention layer: token `i` of the row's document in slot `i`.

    Slots from the row's `position` on hold nothing that counts.
    """

    keys: Float[Array, "b s kv p"]
    values: Float[Array, "b s kv p"]


class Rows(NamedTuple):
    """Which tokens of a batch count, and where documents begin. None: all of them, one document a row."""

    mask: Bool[Array, "b l"] | None = None
    segment_ids: Int[Array, "b l"] | None = None  # 0 wherever the mask is false
    past: Int[Array, " b"] | None = None  # for attention: tokens that a row's first document had before,
    positions: Int[Array, "b l"] | None = None  # and the place of each token in its document

    @property
    def marks(self) -> Array | None:
        """Segment ids, or the mask in their place, as the operators take them."""
        return self.mask if self.segment_ids is None else self.segment_ids


class LayerState(NamedTuple):
    """One layer's part of `Mamba2Cache`."""

    conv: ConvState | AttentionConvState | None  # None: attention without a convolution
    ssm: Float[Array, "b h p n"] | None  # None: attention
    attention: KeyValues | None


class Part(NamedTuple):
    """What a device must know of the others; by default there are none."""

    num_pieces: int = 1
    """That the tokens are cut into."""
    devices_per_group: int = 1
    """Neighbours on `tensor` whose heads share a group; 1 also when each has several groups."""

    def mean_over_group(self, mean_square: Array, num_groups: int) -> Array:
        """Average over the channels of a group that lie on other devices."""
        if self.devices_per_group == 1:
            return mean_square
        return mean_over_group(mean_square, num_groups, self.devices_per_group)
