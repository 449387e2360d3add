"""The short depthwise convolution before the scan: whole sequences, and one token at a time."""

from functools import partial

import jax
import jax.numpy as jnp

from mamba2_jax.ops.checks import check_choice, check_dtype, check_integer, check_shape
from mamba2_jax.ops.on_cpu.gradients import for_every
from mamba2_jax.ops.segments import document_index
from mamba2_jax.typing import Array, Bool, Float, Int


def causal_conv1d(
    x: Float[Array, "b l *c"],
    weight: Float[Array, "k *c"],
    bias: Float[Array, "*c"] | None = None,
    *,
    initial_state: Float[Array, "b k-1 *c"] | None = None,
    segment_ids: Int[Array, "b l"] | Bool[Array, "b l"] | None = None,
    activation: str | None = "silu",
) -> tuple[Float[Array, "b l *c"], Float[Array, "b k-1 *c"]]:
    r"""Apply a causal depthwise convolution over the tokens, then the activation.

    $$y_t = \mathrm{act}\Big(\mathrm{bias} + \sum_{j=0}^{k-1} \mathrm{weight}_j\, x_{t-(k-1)+j}\Big)$$

    A tap that would read another document reads zero. A 0/1 attention mask is a valid `segment_ids`.

    Args:
        x: `(b, l, *channels)`; any number of channel axes.
        weight: `(k, *channels)`; the last tap multiplies the current token.
        bias: `(*channels)`.
        initial_state: the `k - 1` inputs before the first token of the row's first document,
            `(b, k - 1, *channels)`; None: zeros.
        segment_ids: `(b, l)`; 0 is padding, any change starts a document. Booleans are a mask: the true ones
            are contiguous, one document, which takes half the operations. `y` is unspecified at padding.
        activation: `"silu"` or None.

    Returns:
        y: `(b, l, *channels)` in the dtype of `x`; accumulated in float32.
        final_state: `(b, k - 1, *channels)` in the dtype of `x`: the last inputs of the row's last
            document, the state from which `causal_conv1d` and `causal_conv1d_step` continue.

    Raises:
        ValueError: an invalid shape, dtype or option; the message names the argument.
    """
    batch, length, num_taps = check_arguments(
        "causal_conv1d", x, weight, bias, initial_state, segment_ids, activation
    )
    reach = num_taps - 1
    if initial_state is None:
        initial_state = jnp.zeros((batch, reach, *x.shape[2:]), x.dtype)
    initial_state = initial_state.astype(x.dtype)

    if segment_ids is None:
        extended = jnp.concatenate([initial_state, x], axis=1)  # (b, k-1+l, *c)
        return _convolve(extended, weight, bias, activation, length), extended[:, length:]

    valid = segment_ids != 0
    padding = jnp.zeros_like(initial_state)
    extended = jnp.concatenate([padding, _where(valid, x)], axis=1)
    # After left padding the initial state belongs right before the first valid token. Token t of the row is
    # at position t + k - 1 of `extended`, so the k - 1 positions before token `first` begin at `first`.
    first = jnp.argmax(valid, axis=1)  # (b,), 0 for an all-padding row
    extended = _insert(extended, initial_state, first)

    documents = None
    if segment_ids.dtype != jnp.bool_:
        documents = document_index(segment_ids.astype(jnp.int32))
        documents = jnp.pad(documents, ((0, 0), (reach, 0)), constant_values=1)  # (b, k-1+l)
    y = _convolve(extended, weight, bias, activation, length, documents)

    # The state after the last valid token; for an all-padding row this is the initial state.
    end = jnp.where(valid.any(axis=1), length - jnp.argmax(valid[:, ::-1], axis=1), 0)  # (b,)
    after = _window(extended, end, reach)
    if documents is None:
        return y, after
    return y, _where(_window(documents, end, reach) == documents[:, -1:], after)


def causal_conv1d_step(
    x: Float[Array, "b *c"],
    weight: Float[Array, "k *c"],
    bias: Float[Array, "*c"] | None,
    state: Float[Array, "b k-1 *c"],
    *,
    activation: str | None = "silu",
) -> tuple[Float[Array, "b *c"], Float[Array, "b k-1 *c"]]:
    """Apply `causal_conv1d` to one token per row.

    Args:
        x: `(b, *channels)`.
        weight: `(k, *channels)`; the last tap multiplies the current token.
        bias: `(*channels)`.
        state: the last `k - 1` inputs, oldest first, `(b, k - 1, *channels)`.
        activation: `"silu"` or None.

    Returns:
        y: `(b, *channels)` in the dtype of `x`.
        state: `(b, k - 1, *channels)` in the dtype of `state`, with `x` as its newest entry.

    Raises:
        ValueError: an invalid shape, dtype or option; the message names the argument.
    """
    _, _, num_taps = _check("causal_conv1d_step", x[:, None], weight, bias, activation)
    _check_state("causal_conv1d_step", "state", state, x[:, None], num_taps - 1)
    extended = jnp.concatenate([state, x[:, None].astype(state.dtype)], axis=1)  # (b, k, *c)
    y = _convolve(extended, weight, bias, activation, 1)[:, 0]
    return y.astype(x.dtype), extended[:, 1:]


def _insert(rows: Float[Array, "b l *c"], values: Float[Array, "b n *c"], start: Int[Array, " b"]) -> Array:
    """Overwrite `n` tokens of each row from `start` on."""
    if rows.shape[0] == 1:  # `vmap` makes a scatter of it, which takes XLA longer to compile
        return jax.lax.dynamic_update_slice_in_dim(rows, values, start[0], 1)
    return jax.vmap(lambda row, new, start: jax.lax.dynamic_update_slice_in_dim(row, new, start, 0))(
        rows, values, start
    )


def _window(rows: Array, start: Int[Array, " b"], size: int) -> Array:
    """Take `size` tokens of each row from `start` on."""
    if rows.shape[0] == 1:
        return jax.lax.dynamic_slice_in_dim(rows, start[0], size, 1)
    return jax.vmap(lambda row, start: jax.lax.dynamic_slice_in_dim(row, start, size, 0))(rows, start)


@partial(jax.checkpoint, static_argnums=(3, 4))  # saves the inputs, not one float32 copy per tap
def _convolve(extended, weight, bias, activation, length, documents=None):
    """Sum the shifted inputs tap by tap: elementwise operations, which XLA fuses with the next ones."""
    full = jnp.promote_types(extended.dtype, jnp.float32)
    reach = weight.shape[0] - 1
    tokens = (extended.shape[0], length)
    weight = weight.astype(full)
    wide = extended.astype(full)  # before the slices, so that their gradients are summed in float32
    y = jnp.zeros((), full) if bias is None else for_every(tokens, bias.astype(full))
    for tap in range(reach + 1):
        term = wide[:, tap : tap + length] * for_every(tokens, weight[tap])
        if documents is not None and tap < reach:
            same_document = documents[:, tap : tap + length] == documents[:, reach:]
            term = _where(same_document, term)
        y = y + term
    if activation is not None:
        y = jax.nn.silu(y)
    return y.astype(extended.dtype)


def _where(rows, x):
    """Return `x (b, l, ...)` with zeros where `rows (b, l)` is false."""
    return jnp.where(rows.reshape(*rows.shape, *(1,) * (x.ndim - 2)), x, jnp.zeros((), x.dtype))


def check_arguments(op, x, weight, bias, initial_state, segment_ids, activation) -> tuple[int, int, int]:
    """Raise ValueError unless the arguments of `causal_conv1d` are valid; return batch, length and taps."""
    batch, length, num_taps = _check(op, x, weight, bias, activation)
    if initial_state is not None:
        _check_state(op, "initial_state", initial_state, x, num_taps - 1)
    if segment_ids is not None:
        check_shape(op, "segment_ids", segment_ids, "b l", b=batch, l=length)
        check_integer(op, segment_ids=segment_ids)
    return batch, length, num_taps


def _check(op, x, weight, bias, activation) -> tuple[int, int, int]:
    if not hasattr(x, "ndim") or x.ndim < 3 or x.size == 0:
        raise ValueError(
            f"{op}: x wants a non-empty (b, l, *channels), got shape {getattr(x, 'shape', None)}"
        )
    if weight.ndim != x.ndim - 1 or weight.shape[1:] != x.shape[2:] or weight.shape[0] < 2:
        raise ValueError(f"{op}: weight has shape {weight.shape}, wants (k >= 2, *{x.shape[2:]})")
    if bias is not None and bias.shape != x.shape[2:]:
        raise ValueError(f"{op}: bias has shape {bias.shape}, wants {x.shape[2:]}")
    check_dtype(op, x=x, weight=weight, bias=bias)
    check_choice(op, "activation", activation, ("silu", None))
    return x.shape[0], x.shape[1], weight.shape[0]


def _check_state(op, name, state, x, reach) -> None:
    wanted = (x.shape[0], reach, *x.shape[2:])
    if state.shape != wanted:
        raise ValueError(f"{op}: {name} has shape {state.shape}, wants {wanted}")
    check_dtype(op, **{name: state})
