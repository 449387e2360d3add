"""What a Mamba-2 remembers of the tokens it has read: a fixed number of floats, however many they were."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from mamba2_jax.config import Mamba2Config
from mamba2_jax.typing import Array, DTypeLike, Float, Int


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class ConvState:
    """The last `k - 1` inputs of a layer's convolution, oldest first."""

    x: Float[Array, "b k-1 e"]
    BC: Float[Array, "b k-1 2 gn"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Mamba2Cache:
    """The state of every layer, row by row: a pytree that `jit`, `vmap` and Orbax take as it is.

    >>> from mamba2_jax import Mamba2Config
    >>> cache = Mamba2Cache.zeros(Mamba2Config.preset("mamba2-130m"), batch=2)
    >>> cache.ssm[0].shape, cache[1:].position.shape
    ((2, 24, 64, 128), (1,))
    """

    conv: tuple[ConvState, ...]
    """Per layer, in the compute dtype."""
    ssm: tuple[Float[Array, "b h p n"], ...]
    """Per layer, float32 unless asked otherwise."""
    position: Int[Array, " b"]
    """How many tokens of its current document each row has read."""

    @classmethod
    def zeros(
        cls,
        config: Mamba2Config,
        batch: int,
        dtype: DTypeLike = jnp.float32,
        *,
        ssm_dtype: DTypeLike = jnp.float32,
    ) -> "Mamba2Cache":
        """The state before any token.

        Args:
            config: of the model.
            batch: rows.
            dtype: of the convolution's inputs; the model's compute dtype.
            ssm_dtype: of the SSM state.

        Raises:
            ValueError: `batch` is not positive.
        """
        if batch < 1:
            raise ValueError(f"Mamba2Cache.zeros: batch={batch} must be at least 1")
        reach, group_width = config.conv_kernel - 1, config.n_groups * config.state_size
        conv = lambda: ConvState(  # noqa: E731
            x=jnp.zeros((batch, reach, config.d_ssm), dtype),
            BC=jnp.zeros((batch, reach, 2, group_width), dtype),
        )
        ssm = lambda: jnp.zeros((batch, config.num_heads, config.head_dim, config.state_size), ssm_dtype)  # noqa: E731
        layers = range(config.num_hidden_layers)
        return cls(
            conv=tuple(conv() for _ in layers),
            ssm=tuple(ssm() for _ in layers),
            position=jnp.zeros((batch,), jnp.int32),
        )

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
        """Join the rows of several caches into one batch."""
        return jax.tree.map(lambda *rows: jnp.concatenate(rows, axis=0), *caches)

    @property
    def batch(self) -> int:
        """Rows."""
        return self.position.shape[0]

    @property
    def nbytes(self) -> int:
        """Bytes of all states together."""
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(self))
