"""States in training: carried from batch to batch, and a trained one that documents begin with.

The trained state is a parameter `initial_state.<layer>` `(h, p, n)` per Mamba-2 layer, float32, beside the
model's; a row whose first document is new begins with it instead of zeros. Convolutions begin with zeros, and
attention layers without tokens.
"""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mamba2_jax.config import Mamba2Config
from mamba2_jax.mesh import TENSOR
from mamba2_jax.models.cache import Mamba2Cache
from mamba2_jax.processes import place
from mamba2_jax.sharding import state_spec
from mamba2_jax.typing import Array, DTypeLike

INITIAL_STATE = "initial_state."


def new_initial_state(config: Mamba2Config, mesh: Mesh | None = None) -> dict[str, Array]:
    """Return the parameters of a trainable initial state, zeros, to be added to those of `split_model`.

    On a mesh, the heads are sharded over `tensor` if it divides them.
    """
    zeros = {
        f"{INITIAL_STATE}{layer}": np.zeros(state.shape[1:], np.float32)
        for layer, state in enumerate(jax.eval_shape(lambda: Mamba2Cache.zeros(config, 1)).ssm)
        if state is not None
    }
    if mesh is None:
        return jax.tree.map(jnp.asarray, zeros)
    heads = None if config.num_heads % mesh.shape[TENSOR] else TENSOR
    return {name: place(array, NamedSharding(mesh, PartitionSpec(heads))) for name, array in zeros.items()}


def empty_cache(
    config: Mamba2Config, rows: int, dtype: DTypeLike, capacity: int = 0, mesh: Mesh | None = None
) -> Mamba2Cache:
    """Build the cache before any token, on a mesh as `state_spec` has it; as for `Mamba2Cache.zeros`."""
    if mesh is None:
        return Mamba2Cache.zeros(config, rows, dtype, capacity=capacity)

    def zeros(path: tuple, like: jax.ShapeDtypeStruct) -> Array:
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        return place(
            np.zeros(like.shape, like.dtype), NamedSharding(mesh, state_spec(name, rows, config, mesh))
        )

    wanted = jax.eval_shape(lambda: Mamba2Cache.zeros(config, rows, dtype, capacity=capacity))
    return jax.tree.map_with_path(zeros, wanted)


def initial_cache(
    params: Mapping[str, Array], config: Mamba2Config, rows: int, dtype: DTypeLike, capacity: int = 0
) -> Mamba2Cache | None:
    """Build the cache of `rows` new documents from a trained initial state; None if `params` has none.

    Args:
        params: trained arrays by path.
        config: config of the model.
        rows: number of rows, `b`.
        dtype: compute dtype of the model.
        capacity: tokens that the buffers of attention layers hold.
    """
    if not any(name.startswith(INITIAL_STATE) for name in params):
        return None
    zeros = Mamba2Cache.zeros(config, rows, dtype, capacity=capacity)
    ssm = (
        state
        if (trained := params.get(f"{INITIAL_STATE}{layer}")) is None
        else jnp.broadcast_to(trained, (rows, *trained.shape))
        for layer, state in enumerate(zeros.ssm)
    )
    return dataclasses.replace(zeros, ssm=tuple(ssm))


def begin_or_go_on(cache: Mamba2Cache, start: Mamba2Cache | None, continues: Array | None) -> Mamba2Cache:
    """Return the cache in rows that go on, and `start`, or zeros, in rows whose first document is new.

    Args:
        cache: the state after the batch before.
        start: the state of a new document; None: zeros.
        continues: `(b,)` bool; None: all rows go on.
    """
    if continues is None:
        return cache
    start = jax.tree.map(jnp.zeros_like, cache) if start is None else start

    def chosen(carried: Array, new: Array) -> Array:
        return jnp.where(continues.reshape(-1, *(1,) * (carried.ndim - 1)), carried, new)

    return jax.tree.map(chosen, cache, start)
