"""Building blocks of the layers: embedding, norm, projection, MLP, and initializers."""

import math

import jax
import jax.numpy as jnp
from flax import nnx

from mamba2_jax.config import Mamba2Config, MLPConfig
from mamba2_jax.layers.adaptable import Adaptable
from mamba2_jax.ops import rms_norm, silu_gate
from mamba2_jax.ops.linear import linear
from mamba2_jax.ops.on_cpu.products import embedding_lookup
from mamba2_jax.typing import Array, Bool, DTypeLike, Float, Int


class Embedding(Adaptable):
    """Embedding table or output head `(v, d)`.

    Initialized from a normal distribution of standard deviation `std`; without one, as a linear layer of
    PyTorch, uniformly in `+-1 / sqrt(d)`.
    """

    def __init__(
        self, vocab_size: int, width: int, std: float | None, param_dtype: DTypeLike, rngs: nnx.Rngs
    ):
        shape = (vocab_size, width)
        if std is None:
            self.weight = uniform(rngs, shape, 1 / math.sqrt(width), param_dtype)
        else:
            self.weight = nnx.Param(std * jax.random.normal(rngs.params(), shape, param_dtype))

    def __call__(self, ids: Int[Array, "*b"], *, dtype: DTypeLike) -> Float[Array, "*b d"]:
        """Look up the embeddings of token ids, in `dtype`."""
        rows = embedding_lookup(self.weight[...], ids)
        for adapter in self.adapters_in_use():
            low = adapter.scale * embedding_lookup(adapter.A[...], ids)
            rows = rows + linear(low, adapter.B["weight"][...], dtype=dtype)
        return rows.astype(dtype)


class RMSNorm(nnx.Module):
    """Root-mean-square norm over the last axis with a weight `(d,)`."""

    def __init__(self, width: int, eps: float, param_dtype: DTypeLike):
        self.eps = eps
        self.weight = nnx.Param(jnp.ones((width,), param_dtype))

    def __call__(self, x: Float[Array, "b l d"]) -> Float[Array, "b l d"]:
        """Normalise over the last axis, in the dtype of `x`."""
        return rms_norm(x, self.weight[...], eps=self.eps)


class Projection(Adaptable):
    """Linear projection with one weight `(in, *out)`, initialized uniformly in `+-gain / sqrt(in)`."""

    def __init__(
        self,
        width: int,
        out: tuple[int, ...],
        *,
        bias: bool,
        gain: float = 1.0,
        dtype: DTypeLike,
        param_dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        self.dtype = dtype
        self.weight = uniform(rngs, (width, *out), gain / math.sqrt(width), param_dtype)
        self.bias = zeros(out, param_dtype) if bias else None

    def __call__(self, x: Float[Array, "b l in"]) -> Float[Array, "b l *out"]:
        """Compute `x @ weight + bias` in float32."""
        return self.project(x)


class MLP(nnx.Module):
    """MLP without biases: `silu(gate) * value` or `relu(value) ** 2` between two projections.

    The input projections are those of `config.mlp.names`: one `(d, 2, m)` for gate and value, one `(d, m)`
    for each, or one `(d, m)` without a gate. The output projection is `(m, d)`.
    """

    def __init__(
        self,
        config: Mamba2Config,
        *,
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        mlp = self.options_of(config)
        if mlp is None:
            raise ValueError(f"{type(self).__name__}: the config has no MLP; set mlp_cfg or d_intermediate")
        self.names, self.multipliers = mlp.names, (config.multipliers.mlp_gate, config.multipliers.mlp_out)
        options = {"bias": False, "dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        out = (2, mlp.width) if self.names.pair else (mlp.width,)
        for name in self.names.inputs:
            setattr(self, name, Projection(config.hidden_size, out, **options))
        output = Projection(mlp.width, (config.hidden_size,), gain=residual_gain(config), **options)
        setattr(self, self.names.output, output)

    @staticmethod
    def options_of(config: Mamba2Config) -> MLPConfig | None:
        """Return the options of this MLP in the config."""
        return config.mlp

    def __call__(self, hidden: Float[Array, "b l d"]) -> Float[Array, "b l d"]:
        """Compute the float32 update of the residual stream."""
        on_gate, on_output = self.multipliers
        inputs = [getattr(self, name)(hidden) for name in self.names.inputs]
        if self.names.pair:
            pair = dict(zip(self.names.pair, split_pair(inputs[0].astype(hidden.dtype)), strict=True))
            inputs = [pair["gate"], pair["value"]]
        if self.names.gated:
            gate, value = inputs
            inner = silu_gate(value.astype(hidden.dtype), scaled(gate, on_gate).astype(hidden.dtype))
        else:
            inner = jnp.square(jax.nn.relu(inputs[0])).astype(hidden.dtype)
        return scaled(getattr(self, self.names.output)(inner), on_output)


class SharedExpert(MLP):
    """MLP beside a mixture of experts that every token goes through."""

    @staticmethod
    def options_of(config: Mamba2Config) -> MLPConfig | None:
        """Return the options of this MLP in the config."""
        return config.shared_mlp_cfg


def scaled(x: Array, factor: float) -> Array:
    """Multiply by a constant of the config; 1 leaves the graph as it is."""
    return x if factor == 1 else x * factor


def scaled_pair(pair: Float[Array, "b l 2 e"], first: float, second: float) -> Float[Array, "b l 2 e"]:
    """Multiply the two halves of a leaf pair by constants of the config."""
    return pair if first == second == 1 else pair * jnp.array([[first], [second]], pair.dtype)


def residual_gain(config: Mamba2Config) -> float:
    """Return the init gain of residual output projections, which keeps the stream's variance (GPT-2)."""
    if not config.rescale_prenorm_residual:
        return 1.0
    return 1 / math.sqrt(sum(len(layer) for layer in config.layers))


def split_pair(pair: Float[Array, "b l 2 e"]) -> tuple[Float[Array, "b l e"], Float[Array, "b l e"]]:
    """Split a leaf pair along its axis of size 2; the gradient of `lax.split` is one concatenation."""
    first, second = jax.lax.split(pair, (1, 1), axis=pair.ndim - 2)
    return first.squeeze(-2), second.squeeze(-2)


def uniform(rngs: nnx.Rngs, shape: tuple[int, ...], bound: float, dtype: DTypeLike) -> nnx.Param:
    """Create a parameter initialized uniformly in `-bound .. bound`."""
    values = jax.random.uniform(rngs.params(), shape, jnp.float32, -bound, bound)
    return nnx.Param(values.astype(dtype))


def zeros(shape: tuple[int, ...], dtype: DTypeLike) -> nnx.Param:
    """Create a parameter of zeros."""
    return nnx.Param(jnp.zeros(shape, dtype))


def value_of(param: nnx.Param | None) -> Array | None:
    """Return the array of a parameter, or None for None."""
    return None if param is None else param[...]


def keep_rows(mask: Bool[Array, "b 1"] | None, new, old):
    """Select, after a one-token step, the new state in rows where the mask is true, else the old state."""
    if mask is None:
        return new
    return jax.tree.map(lambda n, o: jnp.where(mask.reshape(-1, *(1,) * (n.ndim - 1)), n, o), new, old)
