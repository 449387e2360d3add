"""Segment ids `(b, l)`: document boundaries and padding within packed rows.

`segment_ids (b, l)`: 0 is padding; a value that differs from its left neighbour starts a document.
A row `1 1 1 2 2 0` holds two documents and one padding token, and so does `7 7 7 3 3 0`.
"""

import jax
import jax.numpy as jnp

from mamba2_jax.typing import Array, Bool, Int


def document_index(segment_ids: Int[Array, "b l"]) -> Int[Array, "b l"]:
    """Number the documents of each row 1, 2, 3, ... from left to right.

    Padding gets the number of the document before it; leading padding gets 1, so that an initial state,
    which belongs to document 1, passes over the padding.
    """
    left = jnp.pad(segment_ids[:, :-1], ((0, 0), (1, 0)))
    starts = (segment_ids != 0) & (segment_ids != left)
    return jnp.maximum(jnp.cumsum(starts.astype(jnp.int32), axis=1), 1)


def document_starts(segment_ids: Int[Array, "b l"]) -> Bool[Array, "b l"]:
    """Mark tokens that reset the state: the first token of each document except the row's first document."""
    documents = document_index(segment_ids)
    left = jnp.pad(documents[:, :-1], ((0, 0), (1, 0)), constant_values=1)
    return documents != left


def document_positions(segment_ids: Int[Array, "b l"], past: Int[Array, " b"]) -> Int[Array, "b l"]:
    """Return each token's position in its document, from 0; the row's first document starts at `past`.

    Padding gets the position of the token before it; without one, `past - 1`.
    """
    documents = document_index(segment_ids)
    index = jnp.cumsum((segment_ids != 0).astype(jnp.int32), axis=1) - 1  # index among the row's valid tokens
    begins = jnp.where(document_starts(segment_ids), index, 0)
    in_document = index - jax.lax.cummax(begins, axis=1)
    return in_document + jnp.where(documents == 1, past[:, None], 0)
