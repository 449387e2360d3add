"""Sum the loss and its gradients over a batch, or over the microbatches of one that may carry a state."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from mamba2_jax.models.cache import Mamba2Cache
from mamba2_jax.typing import Array

Params = dict[str, Array]


def summed_gradients(summed_loss, params: Params, batch: Mapping[str, Array], cache: Mamba2Cache | None):
    """Sum nats, tokens and gradients of a batch `(b, l)`, or over the microbatches of one `(a, b, l)`.

    Also returns the cache, carried through the microbatches without its gradient.
    """
    gradient = jax.value_and_grad(summed_loss, has_aux=True)
    if batch["input_ids"].ndim == 2:
        (nats, (tokens, cache)), grads = gradient(params, batch, 0, cache)
        return nats, tokens, grads, cache

    def add(carried, numbered):
        (total, cache), (index, part) = carried, numbered
        (nats, (tokens, cache)), grads = gradient(params, part, index, cache)
        return (jax.tree.map(jnp.add, total, (nats, tokens, grads)), cache), None

    zeros = (jnp.zeros((), jnp.float32), jnp.int32(0), jax.tree.map(jnp.zeros_like, params))
    numbers = jnp.arange(batch["input_ids"].shape[0])
    total, cache = jax.lax.scan(add, (zeros, cache), (numbers, batch))[0]
    return *total, cache


def gradients_through(summed_loss, params: Params, batch: Mapping[str, Array], cache: Mamba2Cache | None):
    """Compute `summed_gradients` of pieces `(a, b, l)` with the gradient of the cache between them."""

    @jax.checkpoint
    def piece(params: Params, carried, numbered):
        (nats, tokens, cache), (index, part) = carried, numbered
        more, (count, cache) = summed_loss(params, part, index, cache)
        return nats + more, tokens + count, cache

    def through(params: Params):
        start = (jnp.zeros((), jnp.float32), jnp.int32(0), cache)
        numbers = jnp.arange(batch["input_ids"].shape[0])
        run = lambda carried, numbered: (piece(params, carried, numbered), None)  # noqa: E731
        nats, tokens, after = jax.lax.scan(run, start, (numbers, batch))[0]
        return nats, (tokens, after)

    (nats, (tokens, after)), grads = jax.value_and_grad(through, has_aux=True)(params)
    return nats, tokens, grads, after
