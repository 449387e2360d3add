"""Next-token cross entropy in slices of the sequence: the logits of a whole batch never exist at once.

With 50,000 tokens in the vocabulary, float32 logits are the largest array of a training step by far. Here a
slice's logits live for one turn of a loop. The same turn takes their gradient, if one is wanted: a sum's
gradient needs nothing that comes after it, and going back would have to compute them again.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from mamba2_jax.models.inputs import join_rows, next_token_targets
from mamba2_jax.models.mamba2 import Mamba2ForCausalLM
from mamba2_jax.ops.checks import check_choice
from mamba2_jax.ops.cross_entropy import IGNORED_LABEL, summed_cross_entropy
from mamba2_jax.training.on_cpu import recomputed
from mamba2_jax.typing import Array, Float, Int

TOKENS_PER_SLICE = 1024
"""Rows of one product with the head: they keep a device busy; 0.2 GB of logits for 50,000 tokens."""

REMAT: dict[str, Callable[[Callable], Callable] | None] = {
    "none": None,
    "dots": partial(jax.checkpoint, policy=jax.checkpoint_policies.dots_with_no_batch_dims_saveable),
    "block": recomputed,
}
"""What the backward pass finds of a block's forward pass: all, the products with weights, its input only."""


def loss_fn(
    model: Mamba2ForCausalLM,
    batch: Mapping[str, Array],
    *,
    remat: str = "none",
    tokens_per_slice: int = TOKENS_PER_SLICE,
) -> tuple[Float[Array, ""], Int[Array, ""]]:
    r"""Sum of the cross entropies of the tokens that count, and how many they are.

    $$\sum_t -\log p(\mathrm{label}_{t+1} \mid \mathrm{tokens}_{\le t})$$

    A sum, so that batches can be put together from unequal parts: divide once, at the end.

    Args:
        model: its parameters are what a gradient is taken by.
        batch: `input_ids (b, l)`; `segment_ids (b, l)`, 0 is padding and any change starts a document, or
            `attention_mask (b, l)`, or neither; `labels (b, l)` to score on, -100 where nothing is,
            `input_ids` when absent.
        remat: `"none"`, `"dots"` or `"block"`; what is kept for the backward pass, most first.
        tokens_per_slice: of the batch whose logits exist at once.

    Returns:
        nats: the sum, float32.
        tokens: how many labels it is over.

    >>> from mamba2_jax import Mamba2ForCausalLM
    >>> model = Mamba2ForCausalLM.from_pretrained()
    >>> nats, tokens = loss_fn(model, {"input_ids": jnp.array([[17, 300, 5, 9]])})
    >>> int(tokens)
    3
    """
    check_choice("loss_fn", "remat", remat, REMAT)
    input_ids = batch["input_ids"]
    attention_mask, segment_ids = batch.get("attention_mask"), batch.get("segment_ids")
    targets = next_token_targets(batch.get("labels", input_ids), join_rows(attention_mask, segment_ids))
    wrap = REMAT[remat]
    out = model.backbone.forward(input_ids, attention_mask, segment_ids, None, None, wrap_block=wrap)
    width = max(1, tokens_per_slice // input_ids.shape[0])

    def logits(weights, hidden):
        head, matrix = weights
        return head(hidden, matrix, dtype=model.dtype)

    weights = (model.head, model.output_weight)
    nats = sliced_cross_entropy(logits, weights, out.last_hidden_state, targets, positions_per_slice=width)
    return nats, (targets != IGNORED_LABEL).sum(dtype=jnp.int32)


def sliced_cross_entropy(
    logits: Callable[[Any, Array], Array],
    weights: Any,
    hidden: Float[Array, "b l d"],
    targets: Int[Array, "b l"],
    *,
    positions_per_slice: int,
) -> Float[Array, ""]:
    """Sum of `-log softmax(logits(hidden))[target]`, a few positions of every row at a time.

    Args:
        logits: of `weights` and `(b, s, d)`, `(b, s, v)` in float32.
        weights: any pytree of arrays; `logits` may not close over any that are differentiated.
        hidden: `(b, l, d)`.
        targets: `(b, l)`; -100 costs nothing.
        positions_per_slice: `s`; the last slice is filled up.

    Returns:
        The sum in nats, float32.
    """
    batch, length = targets.shape
    width = min(positions_per_slice, length)
    count = -(-length // width)
    padding = count * width - length

    def split(array, fill):
        """(b, l, ...) -> (slices, b, s, ...)."""
        pad = ((0, 0), (0, padding)) + ((0, 0),) * (array.ndim - 2)
        array = jnp.pad(array, pad, constant_values=fill).reshape(batch, count, width, *array.shape[2:])
        return jnp.moveaxis(array, 1, 0)

    leaves, structure = jax.tree.flatten(weights)

    def score(leaves, hidden):
        return logits(structure.unflatten(leaves), hidden)

    return _summed_nats(score, leaves, split(hidden, 0), split(targets, IGNORED_LABEL))


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _summed_nats(score: Callable, weights: list[Array], hidden: Array, targets: Array) -> Array:
    """Sum over slices `hidden (slices, b, s, d)` and `targets (slices, b, s)`; `score(weights, hidden)`."""

    def one_slice(total, inputs):
        return total + _nats_of_a_slice(score, weights, *inputs), None

    return jax.lax.scan(one_slice, jnp.zeros((), jnp.float32), (hidden, targets))[0]


@partial(_summed_nats.defjvp, symbolic_zeros=True)
def _summed_nats_jvp(score, primals, tangents):
    """The sum, and the product of its gradient with the tangent, which reverse mode transposes."""
    weights, hidden, targets = primals
    weights_dot, hidden_dot, _ = tangents
    moves = [not isinstance(dot, SymbolicZero) for dot in weights_dot]
    hidden_moves = not isinstance(hidden_dot, SymbolicZero)
    if not (hidden_moves or any(moves)):
        return _summed_nats(score, *primals), jnp.zeros((), jnp.float32)
    trained = [weight for weight, moving in zip(weights, moves, strict=True) if moving]

    def nats(trained, hidden, targets):
        of_trained = iter(trained)
        every = [
            next(of_trained) if moving else weight for weight, moving in zip(weights, moves, strict=True)
        ]
        return _nats_of_a_slice(score, every, hidden, targets)

    gradient = jax.value_and_grad(nats, argnums=(0, 1) if hidden_moves else (0,))

    def one_slice(totals, inputs):
        value, (d_trained, *d_hidden) = gradient(trained, *inputs)
        return jax.tree.map(jnp.add, totals, (value, d_trained)), d_hidden

    zeros = [jnp.zeros(weight.shape, jnp.promote_types(weight.dtype, jnp.float32)) for weight in trained]
    start = (jnp.zeros((), jnp.float32), zeros)
    (total, d_trained), d_hidden = jax.lax.scan(one_slice, start, (hidden, targets))
    moving_dots = [dot for dot in weights_dot if not isinstance(dot, SymbolicZero)]
    if hidden_moves:
        moving_dots.append(hidden_dot)
    parts = map(_inner_product, [*d_trained, *d_hidden], moving_dots)
    return total, jax.tree.reduce(jnp.add, list(parts))


def _inner_product(gradient: Array, tangent: Array) -> Array:
    """Sum of the products, float32; what reverse mode makes of it is rounded once, to the tangent's dtype."""
    full = jnp.promote_types(gradient.dtype, jnp.float32)
    return (gradient.astype(full) * tangent.astype(full)).sum().astype(jnp.float32)


def _nats_of_a_slice(score: Callable, weights: list[Array], hidden: Array, targets: Array) -> Array:
    """Sum over one slice `hidden (b, s, d)` and `targets (b, s)`."""
    return summed_cross_entropy(score(weights, hidden), targets).astype(jnp.float32)
