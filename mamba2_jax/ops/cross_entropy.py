"""Cross entropy of a distribution over the vocabulary, with labels that cost nothing."""

import jax
import jax.numpy as jnp

from mamba2_jax.typing import Array, Float, Int

IGNORED_LABEL = -100
"""Label of a position that is not scored; transformers' value."""


def summed_cross_entropy(logits: Float[Array, "*b v"], labels: Int[Array, "*b"]) -> Float[Array, ""]:
    r"""Sum $-\log \mathrm{softmax}(\mathrm{logits})_\mathrm{label}$ over the scored positions.

    Args:
        logits: `(..., v)`.
        labels: `(...)`; `IGNORED_LABEL` costs nothing.

    Returns:
        The sum in nats, in the dtype of `logits`.
    """
    scored = labels != IGNORED_LABEL
    chosen = jnp.take_along_axis(logits, jnp.where(scored, labels, 0)[..., None], axis=-1)[..., 0]
    return jnp.where(scored, jax.nn.logsumexp(logits, axis=-1) - chosen, 0.0).sum()
