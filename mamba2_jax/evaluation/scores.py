"""Log-likelihoods of continuations: contexts are read once, and their states forked for the continuations."""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from mamba2_jax.evaluation.plan import Batch, Progress, Tokens, padded_length, padded_rows, plan_batches
from mamba2_jax.generation.prefill import PIECE, read_prompts
from mamba2_jax.models.cache import Mamba2Cache
from mamba2_jax.models.mamba2 import Mamba2ForCausalLM
from mamba2_jax.ops.cross_entropy import IGNORED_LABEL
from mamba2_jax.typing import Array, Bool, Float, Int

TOKENS_PER_SLICE = 1024
"""Tokens whose logits are in memory at a time; a power of two."""


class Score(NamedTuple):
    """Score of a continuation."""

    logprob: float
    """Sum of the natural-log probabilities of the tokens of the continuation."""
    greedy: bool
    """Whether each token is the most likely one."""


def loglikelihoods(
    model: Mamba2ForCausalLM,
    requests: Sequence[tuple[Sequence[int], Sequence[int]]],
    *,
    rows: int = 16,
    piece: int = PIECE,
    progress: Progress = lambda done, total: None,
) -> list[Score]:
    """Score continuations of contexts, as tokens.

    Equal contexts are read once, and so are long prefixes of several contexts. Longer rows are read in pieces
    from state to state, so that memory does not grow with their length (but for keys and values of attention
    layers).

    Args:
        model: the model, on one device or a mesh.
        requests: pairs of a context and its continuation, each of at least one token.
        rows: rows per pass; at most twice as many states are in memory.
        piece: most tokens of a row per pass.
        progress: called after each pass with the number of scored tokens, and of all.

    Returns:
        The scores, in the order of the requests.

    Raises:
        ValueError: an empty context or continuation.

    >>> model = Mamba2ForCausalLM.from_pretrained()
    >>> one, other = loglikelihoods(model, [([1, 2], [3]), ([1, 2], [4, 5])])
    >>> one.logprob < 0, one.greedy
    (True, False)
    """
    for index, request in enumerate(requests):
        if not all(len(tokens) for tokens in request):
            raise ValueError(f"loglikelihoods: request {index} has an empty context or continuation")
    scores: list[Score] = [Score(0.0, True)] * len(requests)
    done, total = 0, sum(len(cont) for _, cont in requests)

    def advance(count: int) -> None:
        nonlocal done
        done += count
        progress(done, total)

    reader = ContextReader(model, piece)
    with model.backbone.on_its_device():
        for batch in plan_batches([context for context, _ in requests], rows):
            conts = [[tuple(requests[i][1]) for i in indices] for indices in batch.members]
            found = _score_batch(model, reader, batch, conts, rows, piece, advance)
            for index, score in zip(itertools.chain(*batch.members), found, strict=True):
                scores[index] = score
    return scores


def _score_batch(
    model: Mamba2ForCausalLM,
    reader: "ContextReader",
    batch: Batch,
    conts: list[list[Tokens]],
    rows: int,
    piece: int,
    advance: Callable[[int], None],
) -> list[Score]:
    """Score the continuations `conts` of each context: first tokens from its own logits, then the rest."""
    cache, logprobs = reader.read(batch, new_tokens=max(len(cont) for own in conts for cont in own))
    pairs = [(row, cont) for row, own in enumerate(conts) for cont in own]
    scores = [
        Score(float(logprobs[row, cont[0]]), bool(logprobs[row].argmax() == cont[0])) for row, cont in pairs
    ]
    advance(len(pairs))
    longer = sorted(
        (i for i, (_, cont) in enumerate(pairs) if len(cont) > 1), key=lambda i: -len(pairs[i][1])
    )
    for chosen in chunks(longer, rows):
        parents, own = zip(*(pairs[i] for i in chosen), strict=True)
        for i, rest in zip(chosen, _continue(model, cache, parents, own, piece, advance), strict=True):
            scores[i] = Score(scores[i].logprob + rest.logprob, scores[i].greedy and rest.greedy)
    return scores


class ContextReader:
    """Reads the contexts of batches, and keeps the state of the last head for the next batch.

    Args:
        model: the model.
        piece: most tokens of a row per pass.
    """

    def __init__(self, model: Mamba2ForCausalLM, piece: int = PIECE):
        self._model, self._piece = model, piece
        self._head: Tokens = ()
        self._state: Mamba2Cache | None = None

    def head(self, tokens: Tokens) -> Mamba2Cache | None:
        """Return the state, of one row, after a head; None for an empty head."""
        if tokens != self._head:
            self._head, self._state = tokens, None
            if tokens:
                self._state, _ = self._read([tokens], None, 0)
        return self._state

    def read(self, batch: Batch, new_tokens: int) -> tuple[Mamba2Cache, np.ndarray]:
        """Read the contexts of a batch; states have room for `new_tokens` more.

        Returns:
            The states after the contexts, then rows of padding; and the log-probabilities `(rows, v)` of the
            next token.
        """
        state = self.head(batch.head)
        _, new = pieces_of(new_tokens, self._piece)
        return self._read(batch.contexts, state, len(batch.head) + new)

    def _read(self, contexts: list[Tokens], state, room: int) -> tuple[Mamba2Cache, np.ndarray]:
        longest = max(map(len, contexts))
        piece, length = pieces_of(longest, self._piece)
        # few buffers make few programs; pieces beyond the longest row are not read
        length = piece * padded_rows(length // piece)
        ids = pad_rows(contexts, padded_rows(len(contexts)), length, 0)
        lengths = np.array([*map(len, contexts)] + [1] * (len(ids) - len(contexts)), np.int32)
        capacity = padded_length(length + room) if self._model.config.attends else 0
        cache, logprobs = _read_contexts(self._model, ids, lengths, state, piece=piece, capacity=capacity)
        return cache, np.asarray(logprobs)


def pieces_of(length: int, piece: int) -> tuple[int, int]:
    """Return the tokens per pass and in all passes of rows of up to `length` tokens, padding included."""
    size = min(padded_length(length), piece)
    return size, -(-length // size) * size


def pad_rows(rows: Sequence[Sequence[int]], count: int, length: int, value: int) -> np.ndarray:
    """Pad token rows on the right, and with rows of padding, to an array `(count, length)`."""
    array = np.full((count, length), value, np.int32)
    for index, row in enumerate(rows):
        array[index, : len(row)] = row
    return array


def chunks(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    """Yield runs of up to `size` items."""
    return (items[start : start + size] for start in range(0, len(items), size))


def _continue(
    model: Mamba2ForCausalLM,
    cache: Mamba2Cache,
    parents: Sequence[int],
    conts: Sequence[Tokens],
    piece: int,
    advance: Callable[[int], None],
) -> list[Score]:
    """Score all but the first token of continuations, the longest first, of the rows `parents` of `cache`."""
    count, longest = padded_rows(len(conts)), len(conts[0]) - 1
    size, length = pieces_of(longest, piece)
    ids = pad_rows([cont[:-1] for cont in conts], count, length, 0)
    targets = pad_rows([cont[1:] for cont in conts], count, length, IGNORED_LABEL)
    rows = np.array([*parents, *[0] * (count - len(parents))], np.int32)
    logprobs, greedy = np.zeros(count), np.ones(count, bool)
    for start in range(0, length, size):
        now = slice(start, start + size)
        cache, sums, best = _score(model, cache, rows, ids[:, now], targets[:, now])
        rows = np.arange(count, dtype=np.int32)
        logprobs += np.asarray(sums)
        greedy &= np.asarray(best)
        advance(int((targets[:, now] != IGNORED_LABEL).sum()))
    return [Score(float(a), bool(b)) for a, b in zip(logprobs[: len(conts)], greedy, strict=False)]


@partial(jax.jit, static_argnames=("piece", "capacity"))
def _read_contexts(model, ids, lengths, state, *, piece: int, capacity: int) -> tuple[Mamba2Cache, Array]:
    """Read rows `ids (r, l)` of `lengths (r,)` after a state of one row; also return log-probabilities."""
    mask = jnp.arange(ids.shape[1]) < lengths[:, None]
    state = None if state is None else state.repeat(ids.shape[0])
    cache, hidden = read_prompts(model, ids, mask, state, piece=piece, capacity=capacity)
    return cache, on_every_device(model, jax.nn.log_softmax(model.logits(hidden)))


@jax.jit
def _score(model, cache: Mamba2Cache, parents, ids, targets) -> tuple[Mamba2Cache, Array, Array]:
    """Continue the rows `parents (r,)` of a cache by `ids (r, l)`, and score `targets (r, l)`."""
    cache = jax.tree.map(lambda leaf: leaf[parents], cache)
    out = model.backbone.forward(ids, targets != IGNORED_LABEL, None, cache, None)
    logprobs, greedy = _score_targets(model, out.last_hidden_state, targets)
    return out.cache, on_every_device(model, logprobs), on_every_device(model, greedy)


def _score_targets(
    model: Mamba2ForCausalLM, hidden: Float[Array, "b l d"], targets: Int[Array, "b l"]
) -> tuple[Float[Array, " b"], Bool[Array, " b"]]:
    """Sum the log-probabilities of the targets per row, and tell whether each is the most likely token."""
    batch, length = targets.shape
    width = math.gcd(length, max(1, TOKENS_PER_SLICE // batch))

    def one_slice(inputs):
        hidden, targets = inputs
        logits = model.logits(hidden)
        scored = targets != IGNORED_LABEL
        chosen = jnp.where(scored, targets, 0)
        logprobs = jnp.take_along_axis(jax.nn.log_softmax(logits), chosen[..., None], axis=-1)[..., 0]
        best = logits.argmax(axis=-1) == chosen
        return jnp.where(scored, logprobs, 0.0).sum(axis=1), (best | ~scored).all(axis=1)

    def split(array):
        """Cut `(b, l, ...)` into `(slices, b, width, ...)`."""
        array = array.reshape(batch, length // width, width, *array.shape[2:])
        return jnp.moveaxis(array, 1, 0)

    logprobs, greedy = jax.lax.map(one_slice, (split(hidden), split(targets)))
    return logprobs.sum(axis=0), greedy.all(axis=0)


def on_every_device(model: Mamba2ForCausalLM, array: Array) -> Array:
    """Inside `jit`, replicate an array over the model's mesh, so that every process can read it."""
    mesh = model.backbone.mesh
    if mesh is None:
        return array
    return jax.lax.with_sharding_constraint(array, NamedSharding(mesh, PartitionSpec()))
