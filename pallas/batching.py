"""`vmap` for functions that have a batch axis already: the mapped axis is folded into it."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp


def fold_vmap(function: Callable, batched: Sequence[bool], num_results: int) -> Callable:
    """Give a function of arrays a `vmap` rule that folds the mapped axis into its batch axis.

    The function must treat the rows of the batch apart, so that a call on more rows is the same.

    Args:
        function: returns `num_results` arrays whose first axis is the batch.
        batched: for each argument, whether its first axis is the batch. Where one of the others is
            mapped, the function runs once per entry instead.
        num_results: how many arrays it returns.
    """
    mapped = jax.custom_batching.custom_vmap(function)

    @mapped.def_vmap
    def rule(size, is_mapped, *args):
        spread = [
            a if m or not b else jnp.broadcast_to(a, (size, *a.shape))
            for a, m, b in zip(args, is_mapped, batched, strict=True)
        ]
        if any(m and not b for m, b in zip(is_mapped, batched, strict=True)):
            rows = [
                a if m or b else jnp.broadcast_to(a, (size, *a.shape))
                for a, m, b in zip(spread, is_mapped, batched, strict=True)
            ]
            return jax.lax.map(lambda row: mapped(*row), rows), (True,) * num_results
        folded = [a.reshape(-1, *a.shape[2:]) if b else a for a, b in zip(spread, batched, strict=True)]
        results = mapped(*folded)
        return tuple(r.reshape(size, -1, *r.shape[1:]) for r in results), (True,) * num_results

    return mapped
