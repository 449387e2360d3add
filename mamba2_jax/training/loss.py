"""Compute next-token cross entropy slice by slice along the sequence, without materializing all logits.

With a vocabulary of 50,000 tokens, the float32 logits are by far the largest array of a training step. A loop
over slices of the sequence keeps only one slice's logits alive. When differentiated, the same iteration also
computes the slice's gradient: the gradient of a sum does not depend on later slices, and a separate backward
pass would have to recompute the logits.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jax.typing import ArrayLike

from mamba2_jax.models.cache import Mamba2Cache
from mamba2_jax.models.inputs import join_rows, next_token_targets
from mamba2_jax.models.mamba2 import Mamba2ForCausalLM
from mamba2_jax.ops.checks import check_choice
from mamba2_jax.ops.cross_entropy import IGNORED_LABEL, summed_cross_entropy
from mamba2_jax.ops.routing import load_balancing_loss
from mamba2_jax.training.on_cpu import recomputed
from mamba2_jax.typing import Array, Float, Int

TOKENS_PER_SLICE = 1024
"""Tokens per matmul with the head: keeps a device busy; 0.2 GB of logits at a vocabulary of 50,000."""

REMAT: dict[str, Callable[[Callable], Callable] | None] = {
    "none": None,
    "dots": partial(jax.checkpoint, policy=jax.checkpoint_policies.dots_with_no_batch_dims_saveable),
    "block": recomputed,
}
"""Remat policy by name: per block, save all residuals, only the matmuls with weights, or only the input."""

_READ = ("input_ids", "labels", "targets", "attention_mask", "segment_ids")  # of a batch, by the loss


def loss_fn(
    model: Mamba2ForCausalLM,
    batch: Mapping[str, ArrayLike],
    *,
    cache: Mamba2Cache | None = None,
    remat: str = "none",
    tokens_per_slice: int = TOKENS_PER_SLICE,
    balance: float = 0.0,
) -> tuple[Float[Array, ""], Int[Array, ""]]:
    r"""Sum the next-token cross entropy over a batch, and count the scored tokens.

    $$\sum_t -\log p(\mathrm{label}_{t+1} \mid \mathrm{tokens}_{\le t})$$

    A sum, not a mean: sums over unequal microbatches can be added; divide by the total token count once.

    Args:
        model: the model to score; differentiate with respect to its parameters.
        batch: `input_ids (b, l)`; optionally `segment_ids (b, l)`, where 0 is padding and any change starts a
            document, or `attention_mask (b, l)`; optionally `labels (b, l)`, -100 for unscored tokens,
            `input_ids` when absent. Or, for pieces of longer rows, `targets (b, l)`: the label of the token
            after each, which for the last position is in the next piece.
        cache: the state that each row's first document goes on from; differentiable.
        remat: remat policy: `"none"`, `"dots"` or `"block"`, from most to least memory.
        tokens_per_slice: tokens of the batch whose logits are in memory at a time.
        balance: factor of `load_balancing_loss`, which is added for each scored label; 0 computes none. It
            is transformers' `router_aux_loss_coef`, with the loads of the layers averaged as there.

    Returns:
        nats: the sum, float32.
        tokens: the number of scored labels.

    Raises:
        ValueError: an unknown remat policy, or `balance` for a model without experts.

    >>> from mamba2_jax import Mamba2ForCausalLM
    >>> model = Mamba2ForCausalLM.from_pretrained()
    >>> nats, tokens = loss_fn(model, {"input_ids": jnp.array([[17, 300, 5, 9]])})
    >>> int(tokens)
    3
    """
    options = {"remat": remat, "tokens_per_slice": tokens_per_slice, "balance": balance}
    nats, (tokens, _) = loss_and_cache(model, batch, cache, **options)
    return nats, tokens


def loss_and_cache(
    model: Mamba2ForCausalLM,
    batch: Mapping[str, ArrayLike],
    cache: Mamba2Cache | None,
    *,
    remat: str = "none",
    tokens_per_slice: int = TOKENS_PER_SLICE,
    balance: float = 0.0,
    rolling: bool = False,
) -> tuple[Float[Array, ""], tuple[Int[Array, ""], Mamba2Cache]]:
    """Compute `loss_fn`, and the state after the batch, from which a next piece of the same rows goes on.

    The losses of the pieces of a row add up to that of the row. The gradient flows through the cache; cut it
    with `jax.lax.stop_gradient` (truncated backpropagation through time). The cache of a hybrid's attention
    layers must have room for all tokens, `cache.reserve(capacity)`, unless `rolling`: then they attend to
    the piece and to as many tokens before it as there is room for.

    Returns:
        nats: as for `loss_fn`.
        tokens: as for `loss_fn`.
        cache: the state after each row's last token.
    """
    check_choice("loss_fn", "remat", remat, REMAT)
    given = {name: jnp.asarray(batch[name]) for name in _READ if batch.get(name) is not None}
    input_ids, targets = given["input_ids"], given.get("targets")
    attention_mask, segment_ids = given.get("attention_mask"), given.get("segment_ids")
    if targets is None:
        labels = given.get("labels", input_ids)
        targets = next_token_targets(labels, join_rows(attention_mask, segment_ids))
    if balance and model.config.experts_cfg is None:
        raise ValueError(f"loss_fn: balance={balance}, but the model has no experts; leave it at 0")
    options = {"wrap_block": REMAT[remat], "output_expert_load": bool(balance), "rolling": rolling}
    out = model.backbone.forward(input_ids, attention_mask, segment_ids, cache, None, **options)
    width = max(1, tokens_per_slice // input_ids.shape[0])

    def logits(weights, hidden):
        head, matrix = weights
        return head(hidden, matrix, dtype=model.dtype)

    weights = (model.head, model.output_weight)
    nats = sliced_cross_entropy(logits, weights, out.last_hidden_state, targets, positions_per_slice=width)
    tokens = (targets != IGNORED_LABEL).sum(dtype=jnp.int32)
    if out.expert_load is not None:
        nats += balance * tokens * load_balancing_loss(out.expert_load)
    return nats, (tokens, out.cache)


def sliced_cross_entropy(
    logits: Callable[[Any, Array], Array],
    weights: Any,
    hidden: Float[Array, "b l d"],
    targets: Int[Array, "b l"],
    *,
    positions_per_slice: int,
) -> Float[Array, ""]:
    """Sum `-log softmax(logits(hidden))[target]` over all tokens, `positions_per_slice` positions at a time.

    Args:
        logits: function of `weights` and hidden states `(b, s, d)` that returns float32 logits `(b, s, v)`.
        weights: pytree of arrays; `logits` must not close over arrays that are differentiated.
        hidden: `(b, l, d)`.
        targets: `(b, l)`; -100 adds nothing.
        positions_per_slice: `s`, positions of each row per slice; the last slice is padded.

    Returns:
        The sum in nats, float32.
    """
    batch, length = targets.shape
    width = min(positions_per_slice, length)
    count = -(-length // width)
    padding = count * width - length

    def split(array, fill):
        """Cut `(b, l, ...)` into `(slices, b, s, ...)`, padded with `fill`."""
        pad = ((0, 0), (0, padding)) + ((0, 0),) * (array.ndim - 2)
        array = jnp.pad(array, pad, constant_values=fill).reshape(batch, count, width, *array.shape[2:])
        return jnp.moveaxis(array, 1, 0)

    leaves, structure = jax.tree.flatten(weights)

    def score(leaves, hidden):
        return logits(structure.unflatten(leaves), hidden)

    return _summed_nats(score, leaves, split(hidden, 0), split(targets, IGNORED_LABEL))


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _summed_nats(score: Callable, weights: list[Array], hidden: Array, targets: Array) -> Array:
    """Sum the cross entropy over `hidden (slices, b, s, d)` and `targets (slices, b, s)`."""

    def one_slice(total, inputs):
        return total + _nats_of_a_slice(score, weights, *inputs), None

    return jax.lax.scan(one_slice, jnp.zeros((), jnp.float32), (hidden, targets))[0]


@partial(_summed_nats.defjvp, symbolic_zeros=True)
def _summed_nats_jvp(score, primals, tangents):
    """Compute the sum, and its tangent as gradient times input tangent, which reverse mode transposes."""
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
    """Sum `gradient * tangent` in float32; its transpose rounds once, to the tangent's dtype."""
    full = jnp.promote_types(gradient.dtype, jnp.float32)
    return (gradient.astype(full) * tangent.astype(full)).sum().astype(jnp.float32)


def _nats_of_a_slice(score: Callable, weights: list[Array], hidden: Array, targets: Array) -> Array:
    """Sum the cross entropy over one slice: `hidden (b, s, d)`, `targets (b, s)`."""
    return summed_cross_entropy(score(weights, hidden), targets).astype(jnp.float32)
