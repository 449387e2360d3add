"""What a module with adapters does: the hook in every projection, and the adapter itself.

`A` takes the weight's input axis to the rank, `(in, r)`. `B` is the weight with its input axis replaced by
the rank, so `(d, 2, e)` becomes `(r, 2, e)`: what splits heads and groups of a weight over devices splits its
`B` alike. A projection with several leaves (z with x, B with C, dt) has one `A`, and a `B` for each.
"""

import math

import jax
import jax.numpy as jnp
from flax import nnx

from mamba2_jax.ops.linear import linear, vocabulary_logits
from mamba2_jax.typing import Array, DTypeLike, Float


class BaseWeight(nnx.Variable):
    """A weight as it was before adapters were merged into it."""


class DropoutKey(nnx.Variable):
    """The random key of an adapter's dropout, for one training step."""


class Adapter(nnx.Module):
    """One low-rank change of one module's weights.

    Args:
        A: `(in, r)`.
        B: by the name of the weight: its shape with the input axis replaced by `r`.
        alpha: numerator of the scale.
        use_rslora: scale by `alpha / sqrt(r)` instead of `alpha / r`.
        dropout: share of the inputs dropped in training.
    """

    dropout_key: DropoutKey | None = None

    def __init__(self, A: Array, B: dict[str, Array], *, alpha: float, use_rslora: bool, dropout: float):
        self.A = nnx.LoRAParam(A)
        self.B = nnx.Dict({name: nnx.LoRAParam(value) for name, value in B.items()})
        self.alpha, self.use_rslora, self.dropout = float(alpha), use_rslora, float(dropout)
        self.share = 0.0  # how much of it counts; 0: not in use

    @property
    def rank(self) -> int:
        """The inner size of the product."""
        return self.A.shape[1]

    @property
    def scale(self) -> float:
        """What multiplies `A B`, the adapter's share included."""
        return self.share * self.alpha / (math.sqrt(self.rank) if self.use_rslora else self.rank)

    def shrink(self, x: Float[Array, "*b d"], *, dtype: DTypeLike) -> Float[Array, "*b r"]:
        """`scale * dropout(x) @ A`, float32."""
        if self.dropout_key is not None and self.dropout:
            kept = jax.random.bernoulli(self.dropout_key[...], 1 - self.dropout, x.shape)
            x = jnp.where(kept, x / (1 - self.dropout), 0)
        return self.scale * linear(x, self.A[...], dtype=dtype)

    def delta(self, name: str, input_axis: int = 0) -> Array:
        """`scale * A B` in the layout of the weight `name`, float32."""
        full = jnp.promote_types(self.A.dtype, jnp.float32)
        A, B = self.A[...].astype(full), self.B[name][...].astype(full)
        pair = (A, B) if input_axis == 0 else (B, A.T)
        return self.scale * jnp.tensordot(*pair, axes=1, precision=jax.lax.Precision.HIGHEST)


class Adaptable(nnx.Module):
    """A module whose weights can have adapters; without any, its numbers are those of the weights alone."""

    dtype: DTypeLike
    """The compute dtype of `project`."""
    lora: "nnx.Dict[Adapter] | None" = None
    """The adapters by name."""
    unmerged: "nnx.Dict[BaseWeight] | None" = None
    """While adapters are merged: the weights without them."""

    def adapters_in_use(self) -> list[Adapter]:
        """Those that count and are not merged into the weights."""
        if self.lora is None or self.unmerged is not None:
            return []
        return [adapter for adapter in self.lora.values() if adapter.share]

    def project(self, x: Float[Array, "*b d"], part: str = "") -> Array:
        """`x @ weight + bias` with the adapters, float32, operands in `self.dtype`.

        `part` is the end of the leaves' names: `_zx` of `weight_zx` and `bias_zx`.
        """
        name, bias = f"weight{part}", getattr(self, f"bias{part}")
        y = linear(x, getattr(self, name)[...], None if bias is None else bias[...], dtype=self.dtype)
        for adapter in self.adapters_in_use():
            y += linear(adapter.shrink(x, dtype=self.dtype), adapter.B[name][...], dtype=self.dtype)
        return y

    def taps(self, name: str = "weight") -> Float[Array, "k *c"]:
        """A convolution's weight with the adapters: so few numbers that they are added up each time."""
        weight = getattr(self, name)[...]
        for adapter in self.adapters_in_use():
            weight = weight + adapter.delta(name)
        return weight


class Head(Adaptable):
    """Scores of the vocabulary by a matrix that may also be the embedding's; holds the head's adapters."""

    untied_by_merge: bool = False
    """Whether `merge_lora` gave the model a matrix of its own for the head."""

    def __call__(
        self, hidden: Float[Array, "*b d"], weight: Float[Array, "v d"], *, dtype: DTypeLike
    ) -> Float[Array, "*b v"]:
        """`hidden @ weight.T`, float32."""
        logits = vocabulary_logits(hidden, weight, dtype=dtype)
        for adapter in self.adapters_in_use():
            low = adapter.shrink(hidden, dtype=dtype)
            logits += vocabulary_logits(low, adapter.B["weight"][...], dtype=dtype)
        return logits
