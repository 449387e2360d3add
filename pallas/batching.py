"""JAX transformations of kernels: a `vmap` rule, and the check that refuses checked `shard_map`."""

from collections.abc import Callable, Collection

import jax
import jax.numpy as jnp


def fold_vmap(run: Callable, shared: Collection[int]) -> Callable:
    """Wrap a batched function with a `vmap` rule that folds the mapped axis into the batch axis.

    The function must treat batch rows independently, so that more rows do not change the result of any row.

    Args:
        run: takes arrays (or None) and returns a pytree of arrays whose first axis is the batch.
        shared: positions of the arguments that all rows share; the first axis of the others is the batch.
            If a shared argument is mapped, the function runs once per entry of the mapped axis instead.
    """
    run_with_rule = jax.custom_batching.custom_vmap(run)

    @run_with_rule.def_vmap
    def rule(axis_size, mapped, *arrays):
        def spread(array, is_mapped):
            return array if is_mapped else jnp.broadcast_to(array, (axis_size, *array.shape))

        def fold(array, is_mapped):
            array = spread(array, is_mapped)
            return array.reshape(-1, *array.shape[2:])

        if any(jax.tree.leaves([mapped[i] for i in shared])):
            everywhere = jax.tree.map(spread, arrays, tuple(mapped))
            outputs = jax.lax.map(lambda each: run_with_rule(*each), everywhere)
        else:
            folded = [
                array if i in shared else jax.tree.map(fold, array, is_mapped)
                for i, (array, is_mapped) in enumerate(zip(arrays, mapped, strict=True))
            ]
            outputs = jax.tree.map(
                lambda array: array.reshape(axis_size, -1, *array.shape[1:]), run_with_rule(*folded)
            )
        return outputs, jax.tree.map(lambda _: True, outputs)

    return run_with_rule


def refuse_checked_shard_map(name: str, *arrays: jax.Array | None) -> None:
    """Raise NotImplementedError inside a `jax.shard_map` with `check_vma=True`.

    Kernels do not declare how outputs vary over the mesh: the forward pass would run, the gradient fail.
    """
    if any(array is not None and jax.typeof(array).manual_axis_type.varying for array in arrays):
        raise NotImplementedError(
            f"ssd: implementation={name!r} does not tell jax.shard_map how its values vary over the mesh; "
            "pass check_vma=False to the jax.shard_map around it"
        )
