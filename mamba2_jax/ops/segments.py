"""Segment ids as every operator here understands them.

`segment_ids (b, l)`: 0 is padding; a value that differs from its left neighbour starts a document.
A row `1 1 1 2 2 0` holds two documents and one padding token, and so does `7 7 7 3 3 0`.
"""

import jax
import jax.numpy as jnp

from mamba2_jax.typing import Array, Bool, Int


def document_index(segment_ids: Int[Array, "b l"]) -> Int[Array, "b l"]:
    """Number the documents of each row 1, 2, 3, ... from left to right.

    Padding takes the number of the document before it; leading padding takes that of the first
    document, so that an initial state, which belongs to document 1, passes over it.
    """
    left = jnp.pad(segment_ids[:, :-1], ((0, 0), (1, 0)))
    starts = (segment_ids != 0) & (segment_ids != left)
    return jnp.maximum(jnp.cumsum(starts.astype(jnp.int32), axis=1), 1)


def document_starts(segment_ids: Int[Array, "b l"]) -> Bool[Array, "b l"]:
    """Mark the tokens at which the state is reset: the first of each document but the row's first."""
    documents = document_index(segment_ids)
    left = jnp.pad(documents[:, :-1], ((0, 0), (1, 0)), constant_values=1)
    return documents != left


def document_positions(segment_ids: Int[Array, "b l"], past: Int[Array, " b"]) -> Int[Array, "b l"]:
    """Each token's place in its document, from 0; the row's first document goes on from `past`.

    Padding takes the place of the token before it, or -1 where there is none.
    """
    documents = document_index(segment_ids)
    index = jnp.cumsum((segment_ids != 0).astype(jnp.int32), axis=1) - 1  # among the tokens that count
    begins = jnp.where(document_starts(segment_ids), index, 0)
    in_document = index - jax.lax.cummax(begins, axis=1)
    return in_document + jnp.where(documents == 1, past[:, None], 0)
