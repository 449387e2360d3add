"""Generate the continuations of many prompts in batches, with stop strings."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mamba2_jax.evaluation.plan import Progress, padded_length, padded_rows, plan_batches
from mamba2_jax.evaluation.scores import ContextReader, chunks, on_every_device, pad_rows
from mamba2_jax.generation.loop import decode, prefill
from mamba2_jax.generation.options import SAMPLING, Options
from mamba2_jax.generation.request import Request, check_request
from mamba2_jax.generation.state import DecodeState
from mamba2_jax.generation.streaming import end_ids
from mamba2_jax.generation.text import first_stop
from mamba2_jax.models.mamba2 import Mamba2ForCausalLM
from mamba2_jax.tokenizer import special_token_ids

TOKENS_PER_CALL = 16
"""New tokens between two searches for stop strings."""


def generate_texts(
    model: Mamba2ForCausalLM,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    stop: Sequence[str] = (),
    rows: int = 16,
    seed: int = 0,
    progress: Progress = lambda done, total: None,
    **sampling: Any,
) -> list[str]:
    """Continue prompts up to an end id, a stop string or `max_new_tokens`.

    Equal prompts, for several samples of each, are read once, and so are long common prefixes.

    Args:
        model: the model, on one device or a mesh.
        tokenizer: as `load_tokenizer` returns it.
        prompts: tokens of each prompt, at least one.
        max_new_tokens: maximum number of new tokens per prompt.
        stop: stop strings; a text ends before the first of them.
        rows: rows per pass.
        seed: random seed of sampling.
        progress: called with the number of written texts, and of all.
        **sampling: `temperature` and filters, as of `generate`; greedy without.

    Returns:
        The new texts, in the order of the prompts.

    Raises:
        TypeError: an unknown option.
        ValueError: an invalid argument; the message names it.
    """
    for name in sampling.keys() - SAMPLING:
        raise TypeError(f"generate_texts: there is no option {name!r}; those of sampling are {SAMPLING}")
    special = special_token_ids(tokenizer, model.config)
    options = {
        "max_new_tokens": max_new_tokens,
        "eos_token_id": end_ids(model, special),
        "pad_token_id": special.pad,
        "vocab_size": max(tokenizer.get_vocab().values()) + 1,
        **sampling,
    }
    texts = [""] * len(prompts)
    reader, key, done = ContextReader(model), jax.random.key(seed), 0
    for batch in plan_batches(prompts, rows):
        state, request = _read_prompts(model, reader, batch, options | {"key": key})
        members = [(row, i) for row, indices in enumerate(batch.members) for i in indices]
        for chosen in chunks(members, rows):
            own_key = None if request.key is None else jax.random.fold_in(request.key, chosen[0][1])
            parents = [row for row, _ in chosen]
            new = _decode_texts(model, tokenizer, state, replace(request, key=own_key), parents, tuple(stop))
            for (_, index), text in zip(chosen, new, strict=True):
                texts[index] = text
            done += len(chosen)
            progress(done, len(prompts))
    return texts


def _read_prompts(model, reader: ContextReader, batch, options: dict) -> tuple[DecodeState, Request]:
    """Read the prompts of a batch; return the state before the first new token, and the checked options."""
    count, length = padded_rows(len(batch.contexts)), padded_length(max(map(len, batch.contexts)))
    with model.backbone.on_its_device():
        head = reader.head(batch.head)
    ids = pad_rows(batch.contexts, count, length, options["pad_token_id"])
    mask = pad_rows([[1] * len(context) for context in batch.contexts], count, length, 0)
    mask[len(batch.contexts) :, 0] = 1  # a prompt has at least one token
    cache = None if head is None else head.repeat(count)
    request = check_request("generate_texts", model, ids, mask, Options(cache=cache, **options))
    with model.backbone.on_its_device():
        state = _prefill(
            model,
            request.input_ids,
            request.attention_mask,
            request.cache,
            request.sampler,
            size=request.size,
            piece=request.piece,
            capacity=request.capacity,
            pad=request.pad,
        )
    return state, request


def _decode_texts(
    model, tokenizer, state: DecodeState, request: Request, parents: list[int], stop: tuple[str, ...]
) -> list[str]:
    """Fork the rows `parents` of a state, and decode each until it ends or its text has a stop string."""
    count = padded_rows(len(parents))
    rows = np.array(parents + [0] * (count - len(parents)), np.int32)
    over = np.arange(count) >= len(parents)  # rows of padding
    texts = [""] * len(parents)
    with model.backbone.on_its_device():
        state = _fork(state, rows, over)
        for limit in range(TOKENS_PER_CALL, request.budget + TOKENS_PER_CALL, TOKENS_PER_CALL):
            state, *seen = _decode(
                model,
                state,
                request.sampler,
                request.key,
                jnp.asarray(min(limit, request.budget), jnp.int32),
                request.processors,
                eos=request.eos,
                pad=request.pad,
            )
            tokens, lengths, finished = map(np.asarray, seen)
            for row in np.flatnonzero(~over):
                new = tokens[row, : lengths[row] - finished[row]]  # without the end id
                text = tokenizer.decode(new, skip_special_tokens=True)
                cut = first_stop(text, stop)
                texts[row] = text[:cut]
                over[row] = finished[row] or cut is not None
            if over.all():
                break
            state = replace(state, finished=jnp.asarray(over))
    return texts


@jax.jit
def _fork(state: DecodeState, rows, finished) -> DecodeState:
    return replace(state.take(rows), finished=finished)


@partial(jax.jit, static_argnames=("eos", "pad"))
def _decode(model, state: DecodeState, *operands, eos: tuple[int, ...], pad: int) -> tuple:
    state = decode(model, state, *operands, eos=eos, pad=pad)
    seen = (state.tokens, state.lengths, state.finished)
    return state, *(on_every_device(model, array) for array in seen)


_prefill = jax.jit(prefill, static_argnames=("size", "piece", "capacity", "pad"))
