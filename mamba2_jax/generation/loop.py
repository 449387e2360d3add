"""The decode loop: one token per row and iteration, from a state of fixed size."""

from dataclasses import replace

import jax
import jax.numpy as jnp

from mamba2_jax.generation.prefill import read_prompts, tokens_seen
from mamba2_jax.generation.processors import Processor, bind
from mamba2_jax.generation.sampling import Sampler, choose_token
from mamba2_jax.generation.state import DecodeState, start_state
from mamba2_jax.models.cache import Mamba2Cache
from mamba2_jax.models.mamba2 import Mamba2ForCausalLM
from mamba2_jax.typing import Array, Float, Int


def prefill(
    model: Mamba2ForCausalLM,
    input_ids: Int[Array, "b l"] | None,
    attention_mask: Int[Array, "b l"] | None,
    cache: Mamba2Cache | None,
    sampler: Sampler,
    inputs_embeds: Float[Array, "b l d"] | None = None,
    *,
    size: int,
    piece: int,
    capacity: int,
    pad: int,
    with_logprobs: bool = False,
) -> DecodeState:
    """Read the prompts and return the state of the decode loop; call inside `jit`.

    Args as of `read_prompts`, `start_state` and `choose_token`. Logits are computed for each row's last token
    only.
    """
    cache, hidden = read_prompts(
        model, input_ids, attention_mask, cache, inputs_embeds, piece=piece, capacity=capacity
    )
    logits = model.logits(hidden)
    seen = tokens_seen(sampler, input_ids, attention_mask, logits)
    return start_state(cache, logits, size=size, pad=pad, seen=seen, with_logprobs=with_logprobs)


def decode(
    model: Mamba2ForCausalLM,
    state: DecodeState,
    sampler: Sampler,
    key: Array | None,
    budget: Int[Array, ""],
    processors: tuple[Processor, ...] = (),
    *,
    eos: tuple[int, ...],
    pad: int,
) -> DecodeState:
    """Decode until each row has ended or has `budget` new tokens; call inside `jit`."""
    batch = state.logits.shape[0]
    row_keys = keys_of_rows(key, batch)

    def unfinished(state):
        return (state.step < budget) & ~jnp.all(state.finished)

    def one_token(state):
        index = state.step
        keys = None if row_keys is None else jax.vmap(jax.random.fold_in, (0, None))(row_keys, index)
        process = bind(processors, state.tokens, index)
        alive = ~state.finished
        token = jnp.where(alive, choose_token(state.logits, sampler, state.seen, keys, process), pad)  # (b,)
        seen = None if state.seen is None else state.seen.at[jnp.arange(batch), token].max(alive)
        ended = jnp.isin(token, jnp.asarray(eos, jnp.int32)) if eos else jnp.zeros((batch,), bool)

        # an ended row keeps its state; without end ids no row ends, and of one row the end stops the loop
        mask = alive[:, None] if eos and not is_one(batch) else None
        out = model.backbone.forward(token[:, None], mask, None, state.cache, None)
        logprobs = state.logprobs
        if logprobs is not None:
            logprobs = logprobs.at[:, index].set(jnp.where(alive, logprob_of(state.logits, token), 0.0))
        return replace(
            state,
            cache=out.cache,
            logits=model.logits(out.last_hidden_state[:, 0]),
            finished=state.finished | ended,
            seen=seen,
            tokens=state.tokens.at[:, index].set(token),
            lengths=state.lengths + alive,
            logprobs=logprobs,
            step=index + 1,
        )

    return jax.lax.while_loop(unfinished, one_token, state)


def is_one(size: int) -> bool:
    """Return whether an axis has size 1; a symbolic size of `jax.export` may be larger."""
    return isinstance(size, int) and size == 1


def keys_of_rows(key: Array | None, batch: int) -> Array | None:
    """Derive a random key per row, so that a row's text does not depend on the other rows."""
    return None if key is None else jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(batch))


def logprob_of(logits: Float[Array, "*b v"], token: Int[Array, "*b"]) -> Float[Array, "*b"]:
    """Compute the log-probabilities of tokens, float32."""
    nats = jnp.take_along_axis(jax.nn.log_softmax(logits), token[..., None], axis=-1)[..., 0]
    return nats.astype(jnp.float32)
