"""Logits processors: pure functions that change the next token's logits, inside the compiled loop.

A processor maps `(tokens, count, logits)` to logits `(b, v)`. `tokens (b, n)` are the new tokens, without the
prompt, valid before position `count`, a scalar. Excluded tokens get -inf. A processor with arrays is a
pytree, such as `jax.tree_util.Partial(function, array)`: other values then compile nothing anew, whereas
another plain function compiles the loop again.

>>> import jax.numpy as jnp
>>> from mamba2_jax import Mamba2ForCausalLM, generate
>>> model = Mamba2ForCausalLM.from_pretrained()
>>> first = int(generate(model, [[5, 6]], max_new_tokens=1).tokens[0, 0])
>>> new = generate(model, [[5, 6]], max_new_tokens=4, logits_processors=[ban_tokens([first])])
>>> first in new.tokens[0].tolist()
False
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from mamba2_jax.typing import Array, Float, Int

Processor: TypeAlias = Callable[[Array, Array, Array], Array]


def ban_tokens(ids: Sequence[int]) -> Processor:
    """Never choose these token ids."""
    return Partial(_ban, _ids("ban_tokens", ids))


def penalize_repeats(*, presence: float = 0.0, frequency: float = 0.0) -> Processor:
    """Lower the logits of token ids that the new text contains: by `presence` once, by `frequency` each time.

    Negative values raise them. The prompt does not count.
    Source: the parameters of that name of OpenAI's API, and of vLLM.

    Raises:
        ValueError: a value that is not finite.
    """
    for name, value in {"presence": presence, "frequency": frequency}.items():
        if not math.isfinite(value):
            raise ValueError(f"penalize_repeats: {name}={value} must be a finite number")
    return Partial(_penalize, jnp.float32(presence), jnp.float32(frequency))


def force_tokens(ids: Sequence[int]) -> Processor:
    """Begin the new text with these token ids."""
    return Partial(_force, _ids("force_tokens", ids))


def end_after(words: Sequence[int], eos: int) -> Processor:
    """Choose `eos` once the text ends with the token ids `words`.

    Compares ids: the same text in other tokens goes on. `stream` has stop strings, which compare text.
    """
    return Partial(_end_after, _ids("end_after", words), jnp.asarray(eos, jnp.int32))


def follow_automaton(
    transitions: Mapping[int, Mapping[int, int]],
    start: int,
    final: Sequence[int],
    *,
    vocab_size: int,
    eos: int | Sequence[int],
) -> Processor:
    """Constrain the text to a finite automaton over token ids, such as a regular expression or JSON schema.

    The table has an entry per state and token id: 4 bytes each.

    Args:
        transitions: from state to token id to next state; `Index.get_transitions()` of outlines-core.
        start: state before the first token.
        final: states in which the text may end.
        vocab_size: width of the logits.
        eos: id or ids that end the text, allowed in final states only.
    """
    stops = [*eos] if isinstance(eos, Sequence) else [eos]
    states = sorted({start, *final, *transitions, *(s for to in transitions.values() for s in to.values())})
    number = {state: index for index, state in enumerate(states)}
    table = np.full((len(states), vocab_size), -1, np.int32)
    for state, tokens in transitions.items():
        table[number[state], [*tokens]] = [number[to] for to in tokens.values()]
    table[:, stops] = -1
    ends = np.array([number[state] for state in final])
    table[ends[:, None], stops] = ends[:, None]
    return follow_table(table, number[start])


def follow_table(table: Int[np.ndarray, "states v"], start: int) -> Processor:
    """Constrain the text to a finite automaton: next state by state and token id, -1: not allowed."""
    return Partial(_follow, jnp.asarray(table, jnp.int32), jnp.asarray(start, jnp.int32))


def as_pytrees(name: str, processors: Sequence[Any]) -> tuple[Any, ...]:
    """Wrap plain functions, so that all processors can be arguments of a jitted function.

    Raises:
        ValueError: something that cannot be called; the message names it.
    """
    if callable(processors):
        raise ValueError(f"{name}: logits_processors is one function; give a list of them")
    for processor in processors:
        if not callable(processor):
            raise ValueError(f"{name}: logits_processors holds {processor!r}, which cannot be called")
    return tuple(
        Partial(processor) if jax.tree_util.all_leaves([processor]) else processor for processor in processors
    )


def bind(
    processors: tuple[Processor, ...], tokens: Int[Array, "b n"], count: Int[Array, ""]
) -> Callable[[Array], Array] | None:
    """Return the function from logits to logits that runs all processors; None without any."""
    if not processors:
        return None

    def process(logits: Float[Array, "b v"]) -> Float[Array, "b v"]:
        for processor in processors:
            logits = processor(tokens, count, logits)
        return logits

    return process


def bind_rows(
    processors: tuple[Processor, ...], tokens: Int[Array, "b n"], counts: Int[Array, " b"]
) -> Callable[[Array], Array] | None:
    """Return the function that runs all processors, on rows with different numbers of tokens."""
    if not processors:
        return None

    def of_row(tokens, count, logits):
        process = bind(processors, tokens[None], count)
        return logits if process is None else process(logits[None])[0]

    return lambda logits: jax.vmap(of_row)(tokens, counts, logits)


def _ids(name: str, ids: Any) -> Int[Array, " n"]:
    array = np.asarray(ids)
    if array.ndim != 1 or not array.size or not np.issubdtype(array.dtype, np.integer) or array.min() < 0:
        raise ValueError(f"{name}: wants a list of token ids, at least one, got {ids!r}")
    return jnp.asarray(array, jnp.int32)


def _ban(ids, tokens, count, logits):
    return logits.at[..., ids].set(-jnp.inf)


def _penalize(presence, frequency, tokens, count, logits):
    rows = jnp.arange(len(tokens))[:, None]
    written = (jnp.arange(tokens.shape[1]) < count).astype(logits.dtype)
    counts = jnp.zeros_like(logits).at[rows, tokens].add(written)
    return logits - presence * (counts > 0) - frequency * counts


def _force(ids, tokens, count, logits):
    forced = jnp.arange(logits.shape[-1]) == ids[jnp.minimum(count, ids.size - 1)]
    return jnp.where((count < ids.size) & ~forced, -jnp.inf, logits)


def _end_after(words, eos, tokens, count, logits):
    position = count - words.size + jnp.arange(words.size)
    last = tokens[:, jnp.maximum(position, 0)]  # (b, words)
    ends = (count >= words.size) & jnp.all(last == words, axis=1)
    return jnp.where(ends[:, None] & (jnp.arange(logits.shape[-1]) != eos), -jnp.inf, logits)


def _follow(table, start, tokens, count, logits):
    def step(index, state):
        return jnp.where(state < 0, state, table[state, tokens[:, index]])

    states = jnp.broadcast_to(start, tokens.shape[:1])
    states = jax.lax.fori_loop(0, count, step, states)
    return jnp.where(table[states] < 0, -jnp.inf, logits)
