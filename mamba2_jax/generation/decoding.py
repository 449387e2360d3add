"""Batch generation: prefill and one decode loop, compiled as a single program.

The loop carries a fixed-size state, so the cost per token is constant. Prompts are padded to bucketed
lengths and the token budget is a traced operand, so a new prompt length or budget rarely recompiles.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp

from mamba2_jax.generation.beams import beam_search
from mamba2_jax.generation.drafts import Draft, DraftState, start_draft
from mamba2_jax.generation.loop import decode, prefill
from mamba2_jax.generation.options import Options
from mamba2_jax.generation.processors import Processor
from mamba2_jax.generation.request import check_request
from mamba2_jax.generation.sampling import Sampler
from mamba2_jax.generation.search import Search, best_rows
from mamba2_jax.generation.speculative import begin, finish, speculate
from mamba2_jax.generation.state import DecodeState
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
    scores: Float[Array, " b"] | None = None
    """Of beam search: sum of log-probabilities / length ** length_penalty; of `best_of`: their mean."""
    passes: Int[Array, " b"] | None = None
    """With a `draft`: calls of the model per row; tokens per call are `(lengths - 1) / passes`."""
    draft_cache: DraftState | None = None
    """With a `draft`: its state after the same tokens as `cache`; pass both on to continue."""


def generate(
    model: Mamba2ForCausalLM,
    input_ids: Int[Array, "b l"] | None = None,
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
    inputs_embeds: Float[Array, "b l d"] | None = None,
    logits_processors: Sequence[Processor] = (),
    num_return_sequences: int = 1,
    best_of: int | None = None,
    num_beams: int = 1,
    length_penalty: float = 1.0,
    early_stopping: bool | Literal["never"] = False,
    draft: Draft | None = None,
    num_draft_tokens: int = 4,
    draft_cache: DraftState | None = None,
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
        eos_token_id: one id or several that end a row, also ids in the padding of the vocabulary; None: the
            model's `end_ids`; `()`: nothing ends a row.
        pad_token_id: fills a row after its end; None: the config's.
        vocab_size: ids from this one on pad the vocabulary and are never chosen, e.g.
            `len(tokenizer)`; None: the config's `unpadded_vocab_size`.
        key: `jax.random.key(...)`; the same key gives the same text, independent of the other rows.
        cache: state to continue from, with the same rows as `input_ids`; not donated, so still usable after.
        return_logprobs: also return the log-probability of each token.
        inputs_embeds: prompts as embeddings `(b, l, d)` instead of `input_ids`.
        logits_processors: functions `(tokens, count, logits) -> logits`, run in this order in the compiled
            loop, after the repetition penalty; see `generation.processors`.
        num_return_sequences: rows returned per prompt, in the order 0, 0, 1, 1, ...
        best_of: sample this many per prompt, and return those with the highest mean log-probability.
        num_beams: above 1: beam search, with the sequences and scores of transformers.
        length_penalty: exponent of the length that divides a beam's log-probability.
        early_stopping: True ends a prompt's beam search once `num_beams` texts have ended; "never" only once
            no better one can come; False decides that by the current length.
        draft: a smaller model of the same vocabulary, or `PromptLookup()`, to guess tokens that the model
            checks several at a time: the same greedy text, or the same distribution of sampled ones.
        num_draft_tokens: tokens guessed per call of the model.
        draft_cache: state of the draft after what `cache` has read, from the same earlier call; of tokens
            read without a draft, `draft(tokens).cache`, or `TokenHistory(tokens, lengths)` for a lookup.

    Returns:
        `GenerateOutput(tokens, lengths, logprobs, cache, scores, passes, draft_cache)`.

    Raises:
        ValueError: an invalid argument; the message names it.

    >>> from mamba2_jax import load_tokenizer
    >>> model, tokenizer = Mamba2ForCausalLM.from_pretrained(), load_tokenizer()
    >>> ids = jnp.array([tokenizer.encode("import os")])
    >>> generate(model, ids, max_new_tokens=5).tokens.shape
    (1, 5)
    """
    options = Options(
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        eos_token_id=eos_token_id,
        pad_token_id=pad_token_id,
        vocab_size=vocab_size,
        key=key,
        cache=cache,
        return_logprobs=return_logprobs,
        inputs_embeds=inputs_embeds,
        logits_processors=logits_processors,
        num_return_sequences=num_return_sequences,
        best_of=best_of,
        num_beams=num_beams,
        length_penalty=length_penalty,
        early_stopping=early_stopping,
        draft=draft,
        num_draft_tokens=num_draft_tokens,
        draft_cache=draft_cache,
    )
    request = check_request("generate", model, input_ids, attention_mask, options)
    with model.backbone.on_its_device():
        out = _generate(
            model,
            request.draft,
            (request.input_ids, request.attention_mask, request.cache, request.inputs_embeds),
            request.draft_cache,
            request.sampler,
            request.processors,
            request.key,
            jnp.asarray(request.budget, jnp.int32),
            search=request.search,
            size=request.size,
            piece=request.piece,
            capacity=request.capacity,
            eos=request.eos,
            pad=request.pad,
        )
    return replace(
        out,
        tokens=out.tokens[:, : request.budget],
        logprobs=None if out.logprobs is None else out.logprobs[:, : request.budget],
    )


@partial(jax.jit, static_argnames=("search", "size", "piece", "capacity", "eos", "pad"))
def _generate(
    model,
    draft,
    prompts: tuple,
    draft_cache,
    sampler: Sampler,
    processors,
    key,
    budget,
    *,
    search: Search,
    size: int,
    piece: int,
    capacity: int,
    eos: tuple[int, ...],
    pad: int,
) -> GenerateOutput:
    input_ids, mask, cache, embeds = prompts
    state = prefill(
        model,
        input_ids,
        mask,
        cache,
        sampler,
        embeds,
        size=size,
        piece=piece,
        capacity=capacity,
        pad=pad,
        with_logprobs=search.needs_logprobs,
    )
    if draft is not None:
        draft_cache = start_draft(draft, input_ids, mask, draft_cache, piece=piece, capacity=capacity)
    return write_texts(
        model, draft, state, draft_cache, sampler, processors, key, budget, search=search, eos=eos, pad=pad
    )


def write_texts(
    model: Mamba2ForCausalLM,
    draft: Draft | None,
    state: DecodeState,
    draft_cache: DraftState | None,
    sampler: Sampler,
    processors: tuple[Processor, ...],
    key: Array | None,
    budget: Int[Array, ""],
    *,
    search: Search,
    eos: tuple[int, ...],
    pad: int,
) -> GenerateOutput:
    """Write the texts that `search` wants after prompts that model and draft have read; call inside `jit`."""
    if search.num_beams > 1:
        state, scores = beam_search(model, state, sampler, processors, budget, search, eos=eos, pad=pad)
        return GenerateOutput(state.tokens, state.lengths, None, state.cache, scores)
    passes = scores = None
    state = state.repeat(search.candidates)
    if draft is None or draft_cache is None:
        state = decode(model, state, sampler, key, budget, processors, eos=eos, pad=pad)
    else:
        forked = jax.tree.map(lambda leaf: jnp.repeat(leaf, search.candidates, axis=0), draft_cache)
        start = begin(state, forked, sampler, key, processors, eos=eos)
        number = search.num_draft_tokens
        done = speculate(
            model, draft, start, sampler, key, budget, budget, processors, num_draft=number, eos=eos
        )
        passes = done.passes
        state, draft_cache = finish(model, draft, done)
    if search.candidates > search.num_return_sequences:
        rows, scores = best_rows(state, search)
        state = state.take(rows)
        passes, draft_cache = jax.tree.map(lambda leaf: leaf[rows], (passes, draft_cache))
    logprobs = state.logprobs if search.return_logprobs else None
    return GenerateOutput(state.tokens, state.lengths, logprobs, state.cache, scores, passes, draft_cache)
