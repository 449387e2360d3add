"""The decoding cache of a Mamba-2: a state of fixed size, independent of the number of tokens read.

Attention layers of a hybrid store keys and values of every token of the document, up to a fixed capacity.
"""

import contextlib
import operator
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mamba2_jax.config import Mamba2Config
from mamba2_jax.layers.kinds import MIXERS
from mamba2_jax.layers.state import AttentionConvState, ConvState, KeyValues, LayerState
from mamba2_jax.models.cache_file import load_states, save_states
from mamba2_jax.ops.checks import is_concrete
from mamba2_jax.typing import Array, Bool, DTypeLike, Float, Int


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
        ssm_dtype: DTypeLike | None = None,
        capacity: int = 0,
    ) -> "Mamba2Cache":
        """Build the cache of `batch` rows before any token.

        Args:
            config: config of the model.
            batch: number of rows.
            dtype: dtype of convolution inputs, keys and values; the model's compute dtype.
            ssm_dtype: dtype of the SSM state; None: float32, or float64 when `dtype` is.
            capacity: tokens that the buffers of attention layers hold; ignored without such layers. Empty
                buffers take the length of the first input.

        Raises:
            ValueError: `batch` is not positive, or `capacity` is negative.
        """
        if batch < 1:
            raise ValueError(f"Mamba2Cache.zeros: batch={batch} must be at least 1")
        if capacity < 0:
            raise ValueError(f"Mamba2Cache.zeros: capacity={capacity} must be at least 0")

        if ssm_dtype is None:
            ssm_dtype = jnp.promote_types(dtype, jnp.float32)
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
        """Select rows by an integer, a slice, a list or an array; a single integer keeps the batch axis.

        Raises:
            IndexError: a row outside the batch; not checked for tracers.
        """
        if not isinstance(rows, slice):
            rows = _row_indices(rows, self.batch)
        return jax.tree.map(lambda a: a[rows], self)

    def repeat(self, count: int) -> "Mamba2Cache":
        """Fork each row `count` times: rows 0, 0, 1, 1, ... for a count of 2."""
        return jax.tree.map(lambda a: jnp.repeat(a, count, axis=0), self)

    def after_token(self, index: Int[Array, " b"]) -> "Mamba2Cache":
        """Take each row's state after token `index`, of those that `forward(every_state=True)` kept."""
        rows = jnp.arange(index.shape[0])
        kept = replace(self, attention=())
        return replace(jax.tree.map(lambda a: a[rows, index], kept), attention=self.attention)

    def where(self, rows: Bool[Array, " b"], other: "Mamba2Cache") -> "Mamba2Cache":
        """Take the rows where `rows` is true from this cache, the others from `other`."""

        def choose(mine, others):
            return jnp.where(rows.reshape(-1, *(1,) * (mine.ndim - 1)), mine, others)

        return jax.tree.map(choose, self, other)

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

    def save(
        self, file: str | os.PathLike[str], model: Any, *, notes: Mapping[str, str] | None = None
    ) -> None:
        """Write the states as one safetensors file, with the model's fingerprint; the write is atomic.

        Args:
            file: destination, replaced if it exists.
            model: the model that read the tokens; only a model with these weights loads the file.
            notes: texts to store in the file's metadata; `models.cache_file.read_notes` returns them.

        >>> import tempfile
        >>> from mamba2_jax import Mamba2ForCausalLM
        >>> model = Mamba2ForCausalLM.from_pretrained()
        >>> cache = model(jnp.array([[1, 2, 3]])).cache
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     cache.save(f"{folder}/state.safetensors", model)
        ...     Mamba2Cache.load(f"{folder}/state.safetensors", model).position.tolist()
        [3]
        """
        save_states(file, _by_name(self), model, notes or {})

    @classmethod
    def load(cls, file: str | os.PathLike[str], model: Any) -> "Mamba2Cache":
        """Read a file that `save` wrote.

        Raises:
            FileNotFoundError: no such file.
            ValueError: not such a file, or a state of another model.
        """
        empty = jax.eval_shape(lambda: cls.zeros(model.config, 1))
        states = load_states(file, _by_name(empty), model)
        return jax.tree.unflatten(jax.tree.structure(empty), states.values())

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
    """Round a length up to a bucket: 1, 16, then eight per octave (18, 20, ..., 32, 36, ...).

    Above 16, a bucket is less than an eighth longer than the length. Up to 16, padding costs nothing that
    shows: a pass is then as long as reading the weights takes, and each length of its own would compile.
    """
    length = operator.index(length)
    if length <= 1:
        return 1
    step = max(1 << (length - 1).bit_length(), 32) // 16
    return max(16, -(-length // step) * step)


def _row_indices(rows, batch: int) -> np.ndarray | Array:
    """Return row indices as an array, checked against the batch if concrete."""
    if isinstance(rows, jax.Array) and not is_concrete(rows):
        return rows.reshape(-1)
    with contextlib.suppress(TypeError):
        rows = [operator.index(rows)]  # of Python, of numpy, or an array without axes
    rows = np.asarray(rows)
    if rows.dtype == bool and rows.shape == (batch,):
        rows = np.flatnonzero(rows)
    if rows.ndim != 1 or not (rows.size == 0 or np.issubdtype(rows.dtype, np.integer)):
        raise IndexError(f"Mamba2Cache: rows want integers on one axis, got {rows.dtype}{list(rows.shape)}")
    outside = rows[(rows < -batch) | (rows >= batch)]
    if outside.size:
        raise IndexError(f"Mamba2Cache: row {outside[0]} of a batch of {batch}")
    return rows.astype(np.int32)


def _by_name(cache: Mamba2Cache) -> dict[str, Any]:
    """Return the leaves by names such as `conv.0.x`, in the order of the pytree."""
    leaves = jax.tree.leaves_with_path(cache)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}
