"""What a decoding loop carries: the model's state, the next token's logits, and what is written so far."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from mamba2_jax.models.cache import Mamba2Cache
from mamba2_jax.typing import Array, Bool, Float, Int


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class DecodeState:
    """Carry of the decode loop. All but `step` has one entry per row."""

    cache: Mamba2Cache
    """State after the prompt and every written token."""
    logits: Float[Array, "b v"]
    """Logits of the next token."""
    finished: Bool[Array, " b"]
    """Rows that have written an eos."""
    seen: Bool[Array, "b v"] | None
    """Ids that occur in the row so far, for the repetition penalty."""
    tokens: Int[Array, "b new"]
    """New tokens, the pad id after those written."""
    lengths: Int[Array, " b"]
    """Number of new tokens per row, the eos included."""
    logprobs: Float[Array, "b new"] | None
    """Log-probabilities of the new tokens, if requested."""
    step: Int[Array, ""]
    """Number of loop iterations so far."""

    def repeat(self, count: int) -> "DecodeState":
        """Fork each row `count` times: rows 0, 0, 1, 1, ... for a count of 2."""
        if count == 1:
            return self
        return self.take(jnp.repeat(jnp.arange(self.logits.shape[0]), count))

    def take(self, rows: Int[Array, " n"]) -> "DecodeState":
        """Select or reorder rows; a row may be taken several times."""
        return jax.tree.map(lambda leaf: leaf[rows] if leaf.ndim else leaf, self)


def start_state(
    cache: Mamba2Cache,
    logits: Float[Array, "b v"],
    *,
    size: int,
    pad: int,
    seen: Bool[Array, "b v"] | None = None,
    with_logprobs: bool = False,
) -> DecodeState:
    """Build the state before the first new token, with buffers for `size` tokens per row."""
    batch = logits.shape[0]
    return DecodeState(
        cache=cache,
        logits=logits,
        finished=jnp.zeros((batch,), bool),
        seen=seen,
        tokens=jnp.full((batch, size), pad, jnp.int32),
        lengths=jnp.zeros((batch,), jnp.int32),
        logprobs=jnp.zeros((batch, size), jnp.float32) if with_logprobs else None,
        step=jnp.zeros((), jnp.int32),
    )
