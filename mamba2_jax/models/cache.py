"""What a Mamba-2 remembers of the tokens it has read: a fixed number of floats, however many they were.

A hybrid's attention layers remember every token of the document, in buffers of a stated capacity.
"""

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp

from mamba2_jax.config import Mamba2Config
from mamba2_jax.layers.kinds import MIXERS
from mamba2_jax.layers.state import AttentionConvState, ConvState, KeyValues
from mamba2_jax.typing import Array, DTypeLike, Float, Int


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Mamba2Cache:
    """The state of every layer, row by row: a pytree that `jit`, `vmap` and Orbax take as it is.

    Attention layers have buffers of a fixed `capacity`. `generate`, `stream` and a model called outside
    `jit` enlarge them as needed. Inside your own `jit` a shape cannot follow the text: `reserve` room before.
    There, a row that would overflow becomes NaN rather than wrong.

    >>> from mamba2_jax import Mamba2Config
    >>> cache = Mamba2Cache.zeros(Mamba2Config.preset("mamba2-130m"), batch=2)
    >>> cache.ssm[0].shape, cache[1:].position.shape
    ((2, 24, 64, 128), (1,))
    """

    conv: tuple[ConvState | AttentionConvState | None, ...]
    """Per layer, in the compute dtype; None for attention without a convolution."""
    ssm: tuple[Float[Array, "b h p n"] | None, ...]
    """Per layer, float32 unless asked otherwise; None for attention."""
    position: Int[Array, " b"]
    """How many tokens of its current document each row has read."""
    attention: tuple[KeyValues | None, ...]
    """Per layer, in the compute dtype; None for all but attention."""

    @classmethod
    def zeros(
        cls,
        config: Mamba2Config,
        batch: int,
        dtype: DTypeLike = jnp.float32,
        *,
        ssm_dtype: DTypeLike = jnp.float32,
        capacity: int = 0,
    ) -> "Mamba2Cache":
        """The state before any token.

        Args:
            config: of the model.
            batch: rows.
            dtype: of the convolution's inputs, keys and values; the model's compute dtype.
            ssm_dtype: of the SSM state.
            capacity: tokens that the buffers of attention layers hold; without such layers it means nothing.
                Empty buffers take the length of the first input.

        Raises:
            ValueError: `batch` is not positive, or `capacity` negative.
        """
        if batch < 1:
            raise ValueError(f"Mamba2Cache.zeros: batch={batch} must be at least 1")
        if capacity < 0:
            raise ValueError(f"Mamba2Cache.zeros: capacity={capacity} must be at least 0")

        states = [
            MIXERS[kind].empty_state(config, batch, dtype=dtype, ssm_dtype=ssm_dtype, capacity=capacity)
            for kind in config.layer_kinds
        ]
        conv, ssm, attention = zip(*states, strict=True)
        return cls(conv, ssm, jnp.zeros((batch,), jnp.int32), attention)

    def __getitem__(self, rows) -> "Mamba2Cache":
        """Pick rows by a slice, a list or an index array; a single integer keeps the batch axis."""
        if isinstance(rows, int):
            if not -self.batch <= rows < self.batch:
                raise IndexError(f"Mamba2Cache: row {rows} of a batch of {self.batch}")
            rows = [rows]
        rows = jnp.asarray(rows) if isinstance(rows, list) else rows
        return jax.tree.map(lambda a: a[rows], self)

    @classmethod
    def concatenate(cls, caches: "list[Mamba2Cache]") -> "Mamba2Cache":
        """Join the rows of several caches into one batch, with the largest capacity among them."""
        capacity = max(cache.capacity or 0 for cache in caches)
        caches = [cache.reserve(capacity) for cache in caches]
        return jax.tree.map(lambda *rows: jnp.concatenate(rows, axis=0), *caches)

    def reserve(self, capacity: int) -> "Mamba2Cache":
        """Enlarge the buffers of attention layers to hold `capacity` tokens a row; never smaller.

        Without attention layers, or with room enough, this is the cache itself.
        """
        if self.capacity is None or capacity <= self.capacity:
            return self
        missing = ((0, 0), (0, capacity - self.capacity), (0, 0), (0, 0))
        larger = jax.tree.map(lambda buffer: jnp.pad(buffer, missing), self.attention)
        return replace(self, attention=larger)

    @property
    def capacity(self) -> int | None:
        """Tokens of a document that the buffers of attention layers hold; None without such layers."""
        return next((kept.keys.shape[1] for kept in self.attention if kept is not None), None)

    @property
    def batch(self) -> int:
        """Rows."""
        return self.position.shape[0]

    @property
    def nbytes(self) -> int:
        """Bytes of all states together."""
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(self))


def bucket(length: int) -> int:
    """The next of 1, 16, 24, 32, 48, 64, 96, 128, ...: at most half as much again, few compilations."""
    if length == 1:
        return 1
    power = max(16, 1 << (length - 1).bit_length())
    return power * 3 // 4 if 16 < length <= power * 3 // 4 else power
