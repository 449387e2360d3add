"""Batch generation: prefill and one decode loop, compiled as a single program.

The loop carries a fixed-size state, so the cost per token is constant. Prompts are padded to bucketed
lengths and the token budget is a traced operand, so a new prompt length or budget rarely recompiles.
"""

from dataclasses import dataclass, replace
from functools import partial

import jax
import jax.numpy as jnp

from mamba2_jax.generation.prefill import read_prompts, tokens_seen
from mamba2_jax.generation.processors import Processor, bind
from mamba2_jax.generation.request import check_request
from mamba2_jax.generation.sampling import Sampler, choose_token
from mamba2_jax.generation.state import DecodeState, start_state
from mamba2_jax.models.cache import Mamba2Cache
from mamba2_jax.models.mamba2 import Mamba2ForCausalLM
from mamba2_jax.typing import Array, Float, Int


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
    with model.backbone.on_its_device():
        state = _generate(
            model,
            request.input_ids,
            request.attention_mask,
            request.cache,
            request.sampler,
            request.key,
            jnp.asarray(request.budget, jnp.int32),
            size=request.size,
            piece=request.piece,
            capacity=request.capacity,
            eos=request.eos,
            pad=request.pad,
            return_logprobs=return_logprobs,
        )
    return GenerateOutput(
        tokens=state.tokens[:, : request.budget],
        lengths=state.lengths,
        logprobs=None if state.logprobs is None else state.logprobs[:, : request.budget],
        cache=state.cache,
    )


@partial(jax.jit, static_argnames=("size", "piece", "capacity", "eos", "pad", "return_logprobs"))
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
    piece,
    capacity,
    eos,
    pad,
    return_logprobs,
) -> DecodeState:
    state = prefill(
        model,
        input_ids,
        attention_mask,
        cache,
        sampler,
        size=size,
        piece=piece,
        capacity=capacity,
        pad=pad,
        with_logprobs=return_logprobs,
    )
    return decode(model, state, sampler, key, budget, eos=eos, pad=pad)


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
    seen = tokens_seen(sampler, input_ids, attention_mask, hidden.shape[0], model.config.vocab_size)
    logits = model.logits(hidden)
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
    row_keys = None if key is None else jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(batch))

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
            nats = jnp.take_along_axis(jax.nn.log_softmax(state.logits), token[:, None], axis=1)[:, 0]
            logprobs = logprobs.at[:, index].set(jnp.where(alive, nats, 0.0).astype(jnp.float32))
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
