"""Low-rank adapters (LoRA) inside layers: the adapter module and the base class of layers that accept it.

`A` maps the input axis of the weight to the rank, `(in, r)`. `B` has the weight's shape with the input axis
replaced by the rank, so `(d, 2, e)` becomes `(r, 2, e)`: a sharding of the weight's heads and groups applies
to `B` unchanged. A projection with several leaves (z with x, B with C, dt) has one `A` and a `B` per leaf.
"""

import math

import jax
import jax.numpy as jnp
from flax import nnx

from mamba2_jax.ops.linear import linear, vocabulary_logits
from mamba2_jax.ops.quantized import QuantizedWeight
from mamba2_jax.typing import Array, DTypeLike, Float


class BaseWeight(nnx.Variable):
    """Copy of a weight from before adapters were merged into it."""


class DropoutKey(nnx.Variable):
    """Random key of an adapter's dropout, for one training step."""


class Adapter(nnx.Module):
    """Low-rank update of one module's weights.

    Args:
        A: `(in, r)`.
        B: one array per weight name, of the weight's shape with the input axis replaced by `r`.
        alpha: numerator of the scale.
        use_rslora: scale by `alpha / sqrt(r)` instead of `alpha / r`.
        dropout: dropout rate on the inputs, in training only.
        magnitude: DoRA's norm of each output channel's weights, by weight name, of the weight's shape without
            the input axis; None: plain LoRA.

    Source of `magnitude`: Liu et al. 2024, arXiv:2402.09353.
    """

    dropout_key: DropoutKey | None = None
    magnitude: "nnx.Dict[nnx.LoRAParam] | None" = None

    def __init__(
        self,
        A: Array,
        B: dict[str, Array],
        *,
        alpha: float,
        use_rslora: bool,
        dropout: float,
        magnitude: dict[str, Array] | None = None,
    ):
        if magnitude is not None:
            self.magnitude = nnx.Dict({name: nnx.LoRAParam(value) for name, value in magnitude.items()})
        self.A = nnx.LoRAParam(A)
        self.B = nnx.Dict({name: nnx.LoRAParam(value) for name, value in B.items()})
        self.alpha, self.use_rslora, self.dropout = float(alpha), use_rslora, float(dropout)
        self.share = 0.0  # factor on the update; 0: not in use

    @property
    def rank(self) -> int:
        """Inner dimension `r` of `A B`."""
        return self.A.shape[1]

    @property
    def scale(self) -> float:
        """Factor on `A B`: share times `alpha / r` or `alpha / sqrt(r)`."""
        return self.share * self.alpha / (math.sqrt(self.rank) if self.use_rslora else self.rank)

    def shrink(self, x: Float[Array, "*b d"], *, dtype: DTypeLike) -> Float[Array, "*b r"]:
        """Compute `scale * dropout(x) @ A` in float32."""
        if self.dropout_key is not None and self.dropout:
            kept = jax.random.bernoulli(self.dropout_key[...], 1 - self.dropout, x.shape)
            x = jnp.where(kept, x / (1 - self.dropout), 0)
        return self.scale * linear(x, self.A[...], dtype=dtype)

    def delta(self, name: str, input_axis: int = 0) -> Array:
        """Compute `scale * A B` in float32, in the shape of the weight `name`."""
        full = jnp.promote_types(self.A.dtype, jnp.float32)
        A, B = self.A[...].astype(full), self.B[name][...].astype(full)
        pair = (A, B) if input_axis == 0 else (B, A.T)
        return self.scale * jnp.tensordot(*pair, axes=1, precision=jax.lax.Precision.HIGHEST)

    def stretch(self, name: str, weight: Array | QuantizedWeight, input_axis: int = 0) -> Array | None:
        """Compute DoRA's factor on each output channel of `weight + scale * A B`; None for plain LoRA.

        The norm in its denominator counts as a constant in the gradient, as in the paper and in PEFT.
        """
        if self.magnitude is None:
            return None
        delta = self.delta(name, input_axis)
        norm = jnp.linalg.norm(weight.astype(delta.dtype) + delta, axis=input_axis)
        return self.magnitude[name][...].astype(delta.dtype) / jax.lax.stop_gradient(norm)


class Adaptable(nnx.Module):
    """Base class of modules whose weights accept adapters; without adapters the weights apply alone."""

    dtype: DTypeLike
    """Compute dtype of `project`."""
    lora: "nnx.Dict[Adapter] | None" = None
    """Adapters by name."""
    unmerged: "nnx.Dict[BaseWeight] | None" = None
    """Original weights while adapters are merged, else None."""

    def adapters_in_use(self) -> list[Adapter]:
        """Return the adapters with a non-zero share, or none while adapters are merged into the weights."""
        if self.lora is None or self.unmerged is not None:
            return []
        return [adapter for adapter in self.lora.values() if adapter.share]

    def project(self, x: Float[Array, "*b d"], part: str = "") -> Array:
        """Compute `x @ weight + bias` plus adapters in float32, with operands in `self.dtype`.

        `part` is the suffix of the leaf names, e.g. `_zx` for `weight_zx` and `bias_zx`.
        """
        name, bias = f"weight{part}", getattr(self, f"bias{part}")
        weight = getattr(self, name)[...]
        y = linear(x, weight, None if bias is None else bias[...], dtype=self.dtype)
        for adapter in self.adapters_in_use():
            update = linear(adapter.shrink(x, dtype=self.dtype), adapter.B[name][...], dtype=self.dtype)
            stretch = adapter.stretch(name, weight)
            if stretch is not None:
                update = (stretch - 1) * linear(x, weight, None, dtype=self.dtype) + stretch * update
            y += update
        return y

    def taps(self, name: str = "weight") -> Float[Array, "k *c"]:
        """Return convolution taps `(k, ...)` plus adapters, added at each call because the taps are small."""
        weight = getattr(self, name)[...]
        for adapter in self.adapters_in_use():
            weight = weight + adapter.delta(name)
        return weight


class Head(Adaptable):
    """Output head; takes its weight, which may be the tied embedding, per call and holds its adapters."""

    untied_by_merge: bool = False
    """Whether `merge_lora` untied the head from the embedding."""
    multiplier: float = 1.0
    """Constant factor on the logits."""

    def __call__(
        self, hidden: Float[Array, "*b d"], weight: Float[Array, "v d"] | QuantizedWeight, *, dtype: DTypeLike
    ) -> Float[Array, "*b v"]:
        """Compute logits `hidden @ weight.T` plus adapters in float32."""
        logits = vocabulary_logits(hidden, weight, dtype=dtype)
        for adapter in self.adapters_in_use():
            low = adapter.shrink(hidden, dtype=dtype)
            update = vocabulary_logits(low, adapter.B["weight"][...], dtype=dtype)
            stretch = adapter.stretch("weight", weight, input_axis=1)
            if stretch is not None:
                update = (stretch - 1) * vocabulary_logits(hidden, weight, dtype=dtype) + stretch * update
            logits += update
        return logits if self.multiplier == 1 else logits * self.multiplier
