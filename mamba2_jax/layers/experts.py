"""Mixture of experts as a layer: router, experts, and the projections into and out of their latent width."""

import math

import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from mamba2_jax.config.experts import ExpertsConfig
from mamba2_jax.layers.parts import Projection, uniform, zeros
from mamba2_jax.ops.experts import experts, experts_sharded
from mamba2_jax.ops.routing import (
    Routing,
    expert_load,
    route_by_sigmoid,
    route_by_softmax,
    router_logits,
)
from mamba2_jax.typing import Array, Bool, DTypeLike, Float


class Router(nnx.Module):
    """Router with a weight `(d, e)` and, for sigmoid scores, a `correction (e,)` of the choice.

    The correction has no gradient: whoever trains the model changes it by rule, or leaves it.
    """

    def __init__(self, config: ExpertsConfig, width: int, param_dtype: DTypeLike, rngs: nnx.Rngs):
        self.config = config
        self.weight = uniform(rngs, (width, config.num_experts), 1 / math.sqrt(width), param_dtype)
        sigmoid = config.router == "sigmoid"
        full = jnp.promote_types(param_dtype, jnp.float32)
        self.correction = zeros((config.num_experts,), full) if sigmoid else None

    def __call__(self, hidden: Float[Array, "*b d"]) -> Routing:
        """Choose the experts of every token, in float32."""
        config = self.config
        logits = router_logits(hidden, self.weight[...])
        if self.correction is None:
            return route_by_softmax(logits, config.top_k)
        return route_by_sigmoid(
            logits,
            self.correction[...],
            config.top_k,
            num_groups=config.num_groups,
            groups_kept=config.groups_kept,
            normalised=config.normalised,
            scale=config.scale,
        )


class Experts(nnx.Module):
    """Mixture of experts without biases: each token goes to `top_k` of `num_experts` MLPs.

    Args:
        config: sizes and router.
        width: channels of the hidden states, `d`.
        gain: as for `Projection`, of the projection into the residual stream.
        dtype: compute dtype of the experts' products; the router computes in float32.
        param_dtype: dtype of the initial parameters; the router's correction is float32 at least.
        implementation: as for `ops.experts`.
        rngs: source of the initial values.

    >>> config = ExpertsConfig(num_experts=4, width=16, top_k=2, gated=True)
    >>> mixture = Experts(config, 8, rngs=nnx.Rngs(0))
    >>> mixture(jnp.ones((1, 3, 8))).shape
    (1, 3, 8)
    """

    def __init__(
        self,
        config: ExpertsConfig,
        width: int,
        *,
        gain: float = 1.0,
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike = jnp.float32,
        implementation: str | None = None,
        rngs: nnx.Rngs,
    ):
        self.config, self.implementation = config, implementation
        self.dtype = jnp.dtype(dtype)
        self.mesh: Mesh | None = None  # set by `to_mesh` of the model
        self.router = Router(config, width, param_dtype, rngs)
        inside, inner, count = config.latent_size or width, config.width, config.num_experts
        pair = (2,) if config.gated else ()
        self.up = uniform(rngs, (count, *pair, inner, inside), 1 / math.sqrt(inside), param_dtype)
        last = 1.0 if config.latent_size else gain
        self.down = uniform(rngs, (count, inside, inner), last / math.sqrt(inner), param_dtype)
        options = {"bias": False, "dtype": self.dtype, "param_dtype": param_dtype, "rngs": rngs}
        latent = bool(config.latent_size)
        self.fc1_latent = Projection(width, (inside,), **options) if latent else None
        self.fc2_latent = Projection(inside, (width,), gain=gain, **options) if latent else None

    def __call__(self, hidden: Float[Array, "b l d"]) -> Float[Array, "b l d"]:
        """Compute the float32 update of the residual stream. No token's update depends on another token."""
        return self.update(hidden, self.router(hidden))

    def with_load(
        self, hidden: Float[Array, "b l d"], mask: Bool[Array, "b l"] | None
    ) -> tuple[Float[Array, "b l d"], Float[Array, "2 e"]]:
        """Return the update of `__call__`, and the `expert_load` of the tokens in the mask."""
        routing = self.router(hidden)
        return self.update(hidden, routing), expert_load(routing, mask)

    def update(self, hidden: Float[Array, "b l d"], routing: Routing) -> Float[Array, "b l d"]:
        """Compute the update of tokens that are routed already."""
        x = hidden if self.fc1_latent is None else self.fc1_latent(hidden).astype(hidden.dtype)
        options = {
            "activation": self.config.activation,
            "dtype": self.dtype,
            "implementation": self.implementation,
        }
        arrays = x, self.up[...], self.down[...], routing.expert_ids, routing.gates
        if self.mesh is None:
            update = experts(*arrays, **options)
        else:
            update = experts_sharded(*arrays, mesh=self.mesh, **options)
        return update if self.fc2_latent is None else self.fc2_latent(update.astype(hidden.dtype))
