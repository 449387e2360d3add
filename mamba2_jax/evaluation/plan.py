"""Plan an evaluation: which contexts share a prefix, which are read in one pass, and their padded lengths.

A state is small, whatever it has read. So a context that several requests share is read once and its state
forked, and so is a long prefix that several contexts share, such as the few-shot examples of a task.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

Tokens: TypeAlias = tuple[int, ...]
Progress: TypeAlias = Callable[[int, int], Any]  # called with how much is done, and of how much

SHORTEST_HEAD = 32
"""Fewest shared tokens that are read in a pass of their own."""
SMALLEST_FAMILY = 4
"""Fewest contexts with a head of their own: a batch holds one family, and of a small one mostly padding."""


@dataclass(frozen=True)
class Batch:
    """Contexts that are read in one pass."""

    head: Tokens
    """Prefix of all contexts, read once and before them; may be empty."""
    contexts: list[Tokens]
    """Each context after the head; never empty."""
    members: list[list[int]]
    """Per context, the indices of the requests that have it."""


def plan_batches(contexts: Sequence[Sequence[int]], rows: int) -> list[Batch]:
    """Group requests by context, and contexts by a long common prefix, into batches of up to `rows` contexts.

    Args:
        contexts: tokens of each request's context, never empty; requests may have equal contexts.
        rows: contexts per batch.

    Returns:
        Batches that hold every request once; those of one head are neighbours, long contexts come first.

    >>> [batch.members for batch in plan_batches([[1, 2], [3], [1, 2]], rows=2)]
    [[[0, 2], [1]]]
    """
    requests: dict[Tokens, list[int]] = {}
    for index, context in enumerate(contexts):
        requests.setdefault(tuple(context), []).append(index)
    batches = []
    for family, shared in _families(sorted(requests)):
        family.sort(key=len, reverse=True)
        for start in range(0, len(family), rows):
            chosen = family[start : start + rows]
            rests = [context[shared:] for context in chosen]
            batches.append(Batch(chosen[0][:shared], rests, [requests[context] for context in chosen]))
    return batches


def padded_length(length: int) -> int:
    """Round a length up to 16, 24, 32, 48, 64, 96, ...: few programs; at most half is padding."""
    power = max(16, 1 << (length - 1).bit_length())
    return power * 3 // 4 if power > 16 and length <= power * 3 // 4 else power


def padded_rows(count: int) -> int:
    """Round a number of rows up to a power of two."""
    return 1 << (count - 1).bit_length()


def _families(contexts: list[Tokens]) -> Iterator[tuple[list[Tokens], int]]:
    """Yield lists of the sorted, different contexts, each with the number of first tokens to read once."""
    rest: list[Tokens] = []
    family: list[Tokens] = []
    shared = 0
    for context in contexts:
        common = _common(family[-1], context) if family else 0
        if len(family) > 1:
            # no much shorter prefix, such as the instructions before other examples
            common = min(common, shared) if 2 * common >= shared else 0
        if family and common < SHORTEST_HEAD:
            if len(family) < SMALLEST_FAMILY:
                rest += family
            else:
                yield family, shared
            family, common = [], 0
        family.append(context)
        shared = common
    if len(family) < SMALLEST_FAMILY:
        rest += family
    elif family:
        yield family, shared
    if rest:
        yield rest, 0


def _common(one: Tokens, other: Tokens) -> int:
    """Count the equal first tokens of two contexts, but leave each a token of its own."""
    limit = min(len(one), len(other)) - 1
    return next((index for index in range(limit) if one[index] != other[index]), limit)
