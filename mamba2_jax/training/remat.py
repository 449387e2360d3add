"""Compute a block again in the backward pass instead of keeping what it computed."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mamba2_jax.ops.device import platform


def recomputed(function: Callable) -> Callable:
    """Make a function whose backward pass keeps nothing but its arguments.

    What `jax.checkpoint` does, also on CPU: there XLA drops the barrier between the two computations, finds
    that they are the same, and keeps the results of the first after all. It does not look into a branch.
    """
    if platform() != "cpu":
        return jax.checkpoint(function)

    def wrapped(*arguments: Any) -> Any:
        leaves, treedef = jax.tree.flatten(arguments)
        moving = [jnp.issubdtype(leaf.dtype, jnp.inexact) for leaf in leaves]

        def call(floats: list, others: list) -> Any:
            merged = [(floats if moves else others).pop(0) for moves in moving]
            return function(*jax.tree.unflatten(treedef, merged))

        run = jax.custom_vjp(lambda floats, others: call(list(floats), list(others)))

        def backward(kept: tuple, cotangent: Any) -> tuple:
            def gradient(floats: list, others: list, cotangent: Any) -> Any:
                return jax.vjp(lambda floats: call(list(floats), list(others)), floats)[1](cotangent)[0]

            def nothing(floats: list, others: list, cotangent: Any) -> Any:
                return jax.tree.map(jnp.zeros_like, floats)

            floats, others = kept
            always = floats[0].ravel()[0] * 0 != 1  # also of NaN; the compiler does not know
            gradients = jax.lax.cond(always, gradient, nothing, floats, others, cotangent)
            return gradients, [np.zeros(leaf.shape, jax.dtypes.float0) for leaf in others]

        run.defvjp(lambda floats, others: (call(list(floats), list(others)), (floats, others)), backward)
        floats = [leaf for leaf, moves in zip(leaves, moving, strict=True) if moves]
        return run(floats, [leaf for leaf, moves in zip(leaves, moving, strict=True) if not moves])

    return wrapped
