"""Generation: prefill and one decode loop, compiled together.

The loop carries a fixed-size state, so its cost per token does not grow. Prompts are padded to a few
lengths and the token budget is an operand, so that another prompt or budget does not compile again.
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
    """What `generate` returns."""

    tokens: Int[Array, "b new"]
    """The new tokens; the pad id after a row's end."""
    lengths: Int[Array, " b"]
    """How many of them count, the eos included."""
    logprobs: Float[Array, "b new"] | None
    """On request: natural-log probability of each token, untempered; 0 after the end."""
    cache: Mamba2Cache
    """Has read the prompt and exactly the tokens returned, row by row: go on from it."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class DecodeState:
    """Where decoding stands: what the model remembers, and what it says comes next."""

    cache: Mamba2Cache
    logits: Float[Array, "b v"]
    finished: Bool[Array, " b"]
    seen: Bool[Array, "b v"] | None  # tokens of the row so far, for the repetition penalty
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
    """Continue each row until it ends or `max_new_tokens` are made. Also works inside your own `jit`.

    Args:
        model: the model.
        input_ids: prompts `(b, l)`.
        attention_mask: `(b, l)` of 0/1 for prompts of unequal length, padded at the left or the right.
        max_new_tokens: how many tokens at most.
        temperature: 0 is greedy; above 0 draws and needs `key`.
        top_k: keep the k likeliest tokens.
        top_p: keep the likeliest tokens that together reach this probability, in (0, 1].
        min_p: keep tokens with at least this share of the likeliest one's probability, in [0, 1].
        repetition_penalty: above 1 discourages tokens of this call's prompt and text.
        eos_token_id: one id or several that end a row; None: the config's; `()`: nothing ends a row.
        pad_token_id: fills a row after its end; None: the config's.
        vocab_size: ids at or above it are padding of the vocabulary and never chosen, e.g.
            `len(tokenizer)`; None: the config's `unpadded_vocab_size`.
        key: `jax.random.key(...)`; the same key gives the same text, whatever the rest of the batch.
        cache: the state to go on from; it stays usable. Its rows are those of `input_ids`.
        return_logprobs: also return each token's log-probability.

    Returns:
        `GenerateOutput(tokens, lengths, logprobs, cache)`.

    Raises:
        ValueError: arguments that do not fit, named.

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
    with model.backbone.on_its_device():
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
    """Read the prompts; inside a `jit`. Logits are computed for each row's last token alone.

    `capacity`: tokens that the buffers of attention layers shall hold, prompt and answer together.
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
    """Make up to `budget` tokens, at most `size`; inside a `jit`. Stops when every row has ended.

    Returns:
        The state to go on from; tokens `(b, size)`; how many count per row `(b,)`; their
        log-probabilities `(b, size)` if asked for.
    """
    batch = state.logits.shape[0]
    freeze_rows = batch > 1 and bool(eos)  # a single row's end is the loop's end
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

        mask = alive[:, None] if freeze_rows else None  # an ended row keeps its state
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
