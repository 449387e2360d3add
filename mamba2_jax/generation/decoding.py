"""Batch generation: prefill and one decode loop, compiled as a single program.

The loop carries a fixed-size state, so the cost per token is constant. Prompts are padded to bucketed
lengths and the token budget is a traced operand, so a new prompt length or budget rarely recompiles.
"""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp

from mamba2_jax.generation.request import check_request
from mamba2_jax.generation.sampling import Sampler, choose_token
from mamba2_jax.models.cache import Mamba2Cache, bucket
from mamba2_jax.models.mamba2 import Mamba2ForCausalLM
from mamba2_jax.typing import Array, Bool, Float, Int


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class GenerateOutput:
    """Result of `generate`."""

    tokens: Int[Array, "b new"]
    """New tokens only; the pad id after the end of a row."""
    lengths: Int[Array, " b"]
    """Number of new tokens per row, the eos included."""
    logprobs: Float[Array, "b new"] | None
    """Natural-log probabilities before temperature and filters; 0 after the end. None unless requested."""
    cache: Mamba2Cache
    """State after the prompt and exactly the returned tokens of each row; pass it on to continue."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class DecodeState:
    """Carry of the decode loop: the cache and the logits of the next token."""

    cache: Mamba2Cache
    logits: Float[Array, "b v"]
    finished: Bool[Array, " b"]
    seen: Bool[Array, "b v"] | None  # ids that occur in the row so far, for the repetition penalty
    step: Int[Array, ""]


def generate(
    model: Mamba2ForCausalLM,
    input_ids: Int[Array, "b l"],
    attention_mask: Int[Array, "b l"] | None = None,
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float | None = None,
    eos_token_id: int | tuple[int, ...] | None = None,
    pad_token_id: int | None = None,
    vocab_size: int | None = None,
    key: Array | None = None,
    cache: Mamba2Cache | None = None,
    return_logprobs: bool = False,
) -> GenerateOutput:
    """Continue each prompt up to an eos token or `max_new_tokens`. Also works inside your own `jit`.

    Args:
        model: the model.
        input_ids: prompts `(b, l)`.
        attention_mask: `(b, l)` of 0/1 for prompts of unequal length, padded on the left or the right.
        max_new_tokens: maximum number of new tokens per row.
        temperature: 0 is greedy; above 0 samples and needs `key`.
        top_k: keep the k most likely tokens.
        top_p: keep the most likely tokens that together reach this probability, in (0, 1].
        min_p: keep tokens with at least this fraction of the highest probability, in [0, 1].
        repetition_penalty: above 1 discourages tokens of this call's prompt and of the new text.
        eos_token_id: one id or several that end a row; None: the config's; `()`: nothing ends a row.
        pad_token_id: fills a row after its end; None: the config's.
        vocab_size: ids from this one on pad the vocabulary and are never chosen, e.g.
            `len(tokenizer)`; None: the config's `unpadded_vocab_size`.
        key: `jax.random.key(...)`; the same key gives the same text, independent of the other rows.
        cache: state to continue from, with the same rows as `input_ids`; not donated, so still usable after.
        return_logprobs: also return the log-probability of each token.

    Returns:
        `GenerateOutput(tokens, lengths, logprobs, cache)`.

    Raises:
        ValueError: an invalid argument; the message names it.

    >>> from mamba2_jax import load_tokenizer
    >>> model, tokenizer = Mamba2ForCausalLM.from_pretrained(), load_tokenizer()
    >>> ids = jnp.array([tokenizer.encode("import os")])
    >>> generate(model, ids, max_new_tokens=5).tokens.shape
    (1, 5)
    """
    request = check_request(
        "generate",
        model,
        input_ids,
        attention_mask,
        cache,
        max_new_tokens=max_new_tokens,
        eos_token_id=eos_token_id,
        pad_token_id=pad_token_id,
        vocab_size=vocab_size,
        key=key,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
    )
    budget = request.budget
    tokens, lengths, logprobs, after = _generate(
        model,
        request.input_ids,
        request.attention_mask,
        request.cache,
        request.sampler,
        request.key,
        jnp.asarray(budget, jnp.int32),
        size=bucket(budget),
        capacity=request.capacity,
        eos=request.eos,
        pad=request.pad,
        return_logprobs=return_logprobs,
    )
    return GenerateOutput(
        tokens=tokens[:, :budget],
        lengths=lengths,
        logprobs=None if logprobs is None else logprobs[:, :budget],
        cache=after,
    )


@partial(jax.jit, static_argnames=("size", "capacity", "eos", "pad", "return_logprobs"))
def _generate(
    model,
    input_ids,
    attention_mask,
    cache,
    sampler,
    key,
    budget,
    *,
    size,
    capacity,
    eos,
    pad,
    return_logprobs,
) -> tuple[Array, Array, Array | None, Mamba2Cache]:
    state = prefill(model, input_ids, attention_mask, cache, sampler, capacity=capacity)
    state, tokens, lengths, logprobs = decode(
        model, state, sampler, key, budget, size=size, eos=eos, pad=pad, return_logprobs=return_logprobs
    )
    return tokens, lengths, logprobs, state.cache


def prefill(
    model: Mamba2ForCausalLM,
    input_ids: Int[Array, "b l"],
    attention_mask: Int[Array, "b l"] | None,
    cache: Mamba2Cache | None,
    sampler: Sampler,
    *,
    capacity: int = 0,
) -> DecodeState:
    """Run the model over the prompts; call inside `jit`. Logits are computed for each row's last token only.

    `capacity`: slots in the key/value buffers of attention layers, for prompt and new tokens together.
    """
    batch, length = input_ids.shape
    cache = None if cache is None else cache.reserve(capacity)
    out = model.backbone.forward(input_ids, attention_mask, None, cache, None)
    if attention_mask is None:
        last_hidden = out.last_hidden_state[:, -1]
    else:
        last = length - 1 - jnp.argmax(attention_mask[:, ::-1] != 0, axis=1)  # (b,)
        last_hidden = jnp.take_along_axis(out.last_hidden_state, last[:, None, None], axis=1)[:, 0]
    seen = None
    if sampler.repetition_penalty is not None:
        counts = jnp.ones((batch, length), bool) if attention_mask is None else attention_mask != 0
        rows = jnp.arange(batch)[:, None]
        seen = jnp.zeros((batch, model.config.vocab_size), bool).at[rows, input_ids].max(counts)
    return DecodeState(
        cache=out.cache.reserve(capacity),
        logits=model.logits(last_hidden),
        finished=jnp.zeros((batch,), bool),
        seen=seen,
        step=jnp.zeros((), jnp.int32),
    )


def decode(
    model: Mamba2ForCausalLM,
    state: DecodeState,
    sampler: Sampler,
    key: Array | None,
    budget: Int[Array, ""],
    *,
    size: int,
    eos: tuple[int, ...],
    pad: int,
    return_logprobs: bool = False,
) -> tuple[DecodeState, Int[Array, "b size"], Int[Array, " b"], Float[Array, "b size"] | None]:
    """Decode up to `budget <= size` tokens per row; call inside `jit`. Stops early once every row has ended.

    Returns:
        The state to continue from; tokens `(b, size)`; number of new tokens per row `(b,)`; log-probabilities
        `(b, size)`, or None without `return_logprobs`.
    """
    batch = state.logits.shape[0]
    freeze_rows = batch > 1 and bool(eos)  # with one row, its end stops the loop
    row_keys = None if key is None else jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(batch))

    def unfinished(carry):
        index, state, _, _, _ = carry
        return (index < budget) & ~jnp.all(state.finished)

    def one_token(carry):
        index, state, tokens, lengths, logprobs = carry
        keys = None if row_keys is None else jax.vmap(jax.random.fold_in, (0, None))(row_keys, state.step)
        alive = ~state.finished
        token = jnp.where(alive, choose_token(state.logits, sampler, state.seen, keys), pad)  # (b,)
        tokens = tokens.at[:, index].set(token)
        if logprobs is not None:
            nats = jnp.take_along_axis(jax.nn.log_softmax(state.logits), token[:, None], axis=1)[:, 0]
            logprobs = logprobs.at[:, index].set(jnp.where(alive, nats, 0.0).astype(jnp.float32))
        seen = None if state.seen is None else state.seen.at[jnp.arange(batch), token].max(alive)

        mask = alive[:, None] if freeze_rows else None  # an ended row keeps its state unchanged
        out = model.backbone.forward(token[:, None], mask, None, state.cache, None)
        ended = jnp.isin(token, jnp.asarray(eos, jnp.int32)) if eos else jnp.zeros((batch,), bool)
        state = DecodeState(
            cache=out.cache,
            logits=model.logits(out.last_hidden_state[:, 0]),
            finished=state.finished | ended,
            seen=seen,
            step=state.step + 1,
        )
        return index + 1, state, tokens, lengths + alive, logprobs

    start = (
        jnp.zeros((), jnp.int32),
        state,
        jnp.full((batch, size), pad, jnp.int32),
        jnp.zeros((batch,), jnp.int32),
        jnp.zeros((batch, size), jnp.float32) if return_logprobs else None,
    )
    _, state, tokens, lengths, logprobs = jax.lax.while_loop(unfinished, one_token, start)
    return state, tokens, lengths, logprobs
