"""One vector per row of hidden states: of the last valid token, or the mean over valid tokens."""

from functools import partial
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, get_args

import jax
import jax.numpy as jnp

from mamba2_jax.models.inputs import check_inputs
from mamba2_jax.ops.checks import check_choice
from mamba2_jax.typing import Array, Float, Int

if TYPE_CHECKING:
    from mamba2_jax.models.mamba2 import Mamba2ForCausalLM, Mamba2Model

Pooling: TypeAlias = Literal["last", "mean"]


def embed(
    model: "Mamba2Model | Mamba2ForCausalLM",
    input_ids: Int[Array, "b l"] | None = None,
    attention_mask: Int[Array, "b l"] | None = None,
    *,
    pooling: Pooling = "last",
    normalize: bool = False,
    inputs_embeds: Float[Array, "b l d"] | None = None,
) -> Float[Array, "b d"]:
    """Compute one float32 vector `(b, d)` per row, from the outputs of the final norm.

    Args:
        model: any model of this package.
        input_ids: `(b, l)` token ids.
        attention_mask: `(b, l)` of 0/1; padding at either end does not change a row's vector.
        pooling: `"last"` takes the row's last valid token, which has seen all others; `"mean"` averages over
            the valid tokens.
        normalize: scale each vector to length 1, so that products of vectors are cosines.
        inputs_embeds: `(b, l, d)` instead of `input_ids`.

    Raises:
        ValueError: an invalid argument; the message names it.

    >>> from mamba2_jax import Mamba2Model
    >>> model = Mamba2Model.from_pretrained()
    >>> embed(model, jnp.array([[1, 2, 3]]), normalize=True).shape
    (1, 256)
    """
    check_choice("embed", "pooling", pooling, get_args(Pooling))
    backbone: Any = getattr(model, "backbone", model)
    inputs = check_inputs("embed", model.config, input_ids, attention_mask, None, None, inputs_embeds)
    with backbone.on_its_device():
        return _embed(backbone, *inputs, pooling=pooling, normalize=normalize)


@partial(jax.jit, static_argnames=("pooling", "normalize"))
def _embed(backbone: "Mamba2Model", *inputs, pooling: Pooling, normalize: bool) -> Float[Array, "b d"]:
    hidden = backbone.forward(*inputs).last_hidden_state
    mask = inputs[1]
    full = jnp.promote_types(hidden.dtype, jnp.float32)
    pooled = (last_valid(hidden, mask) if pooling == "last" else mean_valid(hidden, mask)).astype(full)
    return pooled / jnp.linalg.norm(pooled, axis=-1, keepdims=True) if normalize else pooled


def last_valid(hidden: Float[Array, "b l d"], mask: Array | None) -> Float[Array, "b d"]:
    """Take each row's last token that is not padding."""
    if mask is None:
        return hidden[:, -1]
    last = hidden.shape[1] - 1 - jnp.argmax(mask[:, ::-1] != 0, axis=1)  # (b,)
    return jnp.take_along_axis(hidden, last[:, None, None], axis=1)[:, 0]


def mean_valid(hidden: Float[Array, "b l d"], mask: Array | None) -> Float[Array, "b d"]:
    """Average each row's tokens that are not padding, in float32."""
    full = jnp.promote_types(hidden.dtype, jnp.float32)
    if mask is None:
        return hidden.astype(full).mean(axis=1)
    valid = (mask != 0)[..., None]
    total = jnp.where(valid, hidden.astype(full), 0).sum(axis=1)  # `where`: padding may hold anything
    return total / jnp.maximum(valid.sum(axis=1), 1)
