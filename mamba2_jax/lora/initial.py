"""Initial values of adapters, from which the model's output does not change."""

import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import nnx

from mamba2_jax.lora.targets import Target
from mamba2_jax.typing import Array, DTypeLike
from mamba2_jax.weights.table import Leaf


def initial_factors(
    target: Target, rank: int, rngs: nnx.Rngs, dtype: DTypeLike
) -> tuple[Array, dict[str, Array]]:
    """Initialize A and B as PEFT does: A uniform and B zero; for the embedding A zero and B normal."""
    shape_of_A = (target.in_size, rank)
    shapes = {leaf.name: target.shape_of_B(leaf, rank) for leaf in target.stored.leaves}
    if target.is_embedding:  # were A random, training B would change every token's row, trained or not
        A = jnp.zeros(shape_of_A, dtype)
        return A, {name: jax.random.normal(rngs.params(), shape, dtype) for name, shape in shapes.items()}
    bound = 1 / math.sqrt(target.in_size)
    A = jax.random.uniform(rngs.params(), shape_of_A, jnp.float32, -bound, bound).astype(dtype)
    return A, {name: jnp.zeros(shape, dtype) for name, shape in shapes.items()}


def initial_magnitude(target: Target, weights: Mapping[Leaf, Array], dtype: DTypeLike) -> dict[str, Array]:
    """Return DoRA's initial magnitudes, the norms of the weights of each output channel, by weight name."""
    if target.is_embedding or len(target.stored.shape) > 2:
        raise ValueError(
            f"add_lora: use_dora is for projections and lm_head, and {target.name} is neither; leave it out "
            "of targets"
        )
    return {
        leaf.name: jnp.linalg.norm(weight.astype(jnp.float32), axis=leaf.role.input_axis).astype(dtype)
        for leaf, weight in weights.items()
    }
