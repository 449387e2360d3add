"""The decoding cache of a Mamba-2: a state of fixed size, independent of the number of tokens read.

Attention layers of a hybrid store keys and values of every token of the document, up to a fixed capacity.
"""

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp

from mamba2_jax.config import Mamba2Config
from mamba2_jax.layers.kinds import MIXERS
from mamba2_jax.layers.state import AttentionConvState, ConvState, KeyValues, LayerState
from mamba2_jax.typing import Array, DTypeLike, Float, Int


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Mamba2Cache:
    """State of every layer for each batch row: a pytree, usable with `jit`, `vmap` and Orbax.

    Attention layers have buffers of a fixed `capacity`. `generate`, `stream` and a model called outside `jit`
    enlarge the buffers as needed. Inside your own `jit` shapes are static: call `reserve` before. There, a
    row that overflows its buffer becomes NaN, not silently wrong.

    >>> from mamba2_jax import Mamba2Config
    >>> cache = Mamba2Cache.zeros(Mamba2Config.preset("mamba2-130m"), batch=2)
    >>> cache.ssm[0].shape, cache[1:].position.shape
    ((2, 24, 64, 128), (1,))
    """

    conv: tuple[ConvState | AttentionConvState | None, ...]
    """Convolution state per layer, in the compute dtype; None for attention without a convolution."""
    ssm: tuple[Float[Array, "b h p n"] | None, ...]
    """SSM state per layer, float32 by default; None for attention."""
    position: Int[Array, " b"]
    """Number of tokens that each row has read of its current document."""
    attention: tuple[KeyValues | None, ...]
    """Keys and values per layer, in the compute dtype; None for all layers but attention."""

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
        """Build the cache of `batch` rows before any token.

        Args:
            config: config of the model.
            batch: number of rows.
            dtype: dtype of convolution inputs, keys and values; the model's compute dtype.
            ssm_dtype: dtype of the SSM state.
            capacity: tokens that the buffers of attention layers hold; ignored without such layers. Empty
                buffers take the length of the first input.

        Raises:
            ValueError: `batch` is not positive, or `capacity` is negative.
        """
        if batch < 1:
            raise ValueError(f"Mamba2Cache.zeros: batch={batch} must be at least 1")
        if capacity < 0:
            raise ValueError(f"Mamba2Cache.zeros: capacity={capacity} must be at least 0")

        states = []
        for layer in config.layers:
            state = LayerState()
            for slot in (slot for branch in layer for slot in branch if slot.kind in MIXERS):
                state = state.updated(
                    MIXERS[slot.kind].empty_state(
                        config, batch, dtype=dtype, ssm_dtype=ssm_dtype, capacity=capacity
                    )
                )
            states.append(state)
        conv, ssm, attention = zip(*states, strict=True)
        return cls(conv, ssm, jnp.zeros((batch,), jnp.int32), attention)

    def __getitem__(self, rows) -> "Mamba2Cache":
        """Select rows by a slice, a list or an index array; a single integer keeps the batch axis."""
        if isinstance(rows, int):
            if not -self.batch <= rows < self.batch:
                raise IndexError(f"Mamba2Cache: row {rows} of a batch of {self.batch}")
            rows = [rows]
        rows = jnp.asarray(rows) if isinstance(rows, list) else rows
        return jax.tree.map(lambda a: a[rows], self)

    @classmethod
    def concatenate(cls, caches: "list[Mamba2Cache]") -> "Mamba2Cache":
        """Concatenate the rows of several caches to one batch, with the largest of their capacities."""
        capacity = max(cache.capacity or 0 for cache in caches)
        caches = [cache.reserve(capacity) for cache in caches]
        return jax.tree.map(lambda *rows: jnp.concatenate(rows, axis=0), *caches)

    def reserve(self, capacity: int) -> "Mamba2Cache":
        """Return a cache whose attention buffers hold at least `capacity` tokens per row.

        Without attention layers, or when the capacity suffices, returns the cache itself.
        """
        if self.capacity is None or capacity <= self.capacity:
            return self
        missing = ((0, 0), (0, capacity - self.capacity), (0, 0), (0, 0))
        larger = jax.tree.map(lambda buffer: jnp.pad(buffer, missing), self.attention)
        return replace(self, attention=larger)

    @property
    def capacity(self) -> int | None:
        """Return the tokens per row that the attention buffers hold; None without attention layers."""
        return next((kept.keys.shape[1] for kept in self.attention if kept is not None), None)

    @property
    def batch(self) -> int:
        """Return the number of rows."""
        return self.position.shape[0]

    @property
    def nbytes(self) -> int:
        """Return the total size of all states in bytes."""
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(self))


def bucket(length: int) -> int:
    """Round a length up to a bucket: 1, 16, 24, 32, 48, 64, 96, 128, ..., which keeps compilations few.

    Above 16, a bucket is at most half as long again as the length.
    """
    if length == 1:
        return 1
    power = max(16, 1 << (length - 1).bit_length())
    return power * 3 // 4 if 16 < length <= power * 3 // 4 else power
