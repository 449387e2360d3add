"""Batches whose rows go on in the next batch, for training on a carried state.

Each row of a batch is a lane that reads one document after the other, piece by piece.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from mamba2_jax.ops.cross_entropy import IGNORED_LABEL
from mamba2_jax.training.data import Batch

Curriculum = tuple[tuple[int, int], ...]
"""Pairs of the tokens of a row and the number of steps that have rows of this length."""


def length_of_step(step: int, curriculum: Curriculum, final: int) -> int:
    """Return the tokens of a row in a step, from 0; `final` after the curriculum.

    >>> [length_of_step(step, ((64, 2), (128, 1)), 256) for step in range(5)]
    [64, 64, 128, 256, 256]
    """
    for length, steps in curriculum:
        if step < steps:
            return length
        step -= steps
    return final


def steps_left(step: int, steps: int, curriculum: Curriculum, final: int) -> float:
    """Return the steps after the first `step` ones, counted in steps of the length of the last of these.

    >>> steps_left(2, 5, ((64, 2), (128, 1)), 256)
    10.0
    """
    tokens = begin = 0
    for length, count in (*curriculum, (final, steps)):
        tokens += length * max(0, min(begin + count, steps) - max(begin, step))
        begin += count
    return tokens / length_of_step(step - 1, curriculum, final)


class Lanes(Iterator[Batch]):
    """Iterator of batches; deterministic given the documents and the seed, and resumable.

    A batch holds `input_ids`, `segment_ids` and `targets` (the label of the token after each), each
    `(rows, length)`, and `continues (rows,)`: whether the row's first document goes on from the batch before.
    A document's last token is only a target. With `pieces` above 1, that many consecutive batches are stacked
    to `(pieces, rows, length)`.

    Args:
        documents: sequence of dicts of `input_ids` and `labels`, each of any length.
        rows: lanes.
        length: tokens of a piece.
        curriculum: pairs of tokens of a piece and number of batches, before those of `length`.
        pieces: pieces per batch.
        pad: begin every document in a new piece; otherwise right after the document before.
        shuffle: read the documents of each epoch in another order.
        seed: seed of the order.
        epochs: passes over the documents; None: endless.
    """

    def __init__(
        self,
        documents: Sequence[Any],
        *,
        rows: int,
        length: int,
        curriculum: Curriculum = (),
        pieces: int = 1,
        pad: bool = False,
        shuffle: bool = False,
        seed: int = 0,
        epochs: int | None = 1,
    ):
        self._documents, self._pieces, self._pad = documents, pieces, pad
        self._final, self._curriculum, self._made = length, curriculum, 0  # batches
        self._shuffle, self._seed, self._epochs = shuffle, seed, epochs
        self._taken = 0  # documents given to a lane so far
        self._lanes: list[list[int] | None] = [None] * rows  # document and the next token in it
        self._order: tuple[int, np.ndarray] | None = None  # of one epoch
        self._opened: dict[int, Any] = {}  # documents that lanes are reading

    def __next__(self) -> Batch:
        """Return the next batch."""
        if all(lane is None for lane in self._lanes) and self._document() is None:
            raise StopIteration
        self._length = length_of_step(self._made, self._curriculum, self._final)
        parts = [self._batch() for _ in range(self._pieces)]
        self._made += 1
        return parts[0] if self._pieces == 1 else {k: np.stack([p[k] for p in parts]) for k in parts[0]}

    def get_state(self) -> dict[str, Any]:
        """Return the position in the documents as JSON values."""
        return {"taken": self._taken, "lanes": self._lanes, "made": self._made}

    def set_state(self, state: dict[str, Any]) -> None:
        """Go on from a position that `get_state` returned."""
        self._taken, self._made = state["taken"], state.get("made", 0)
        self._lanes = [None if lane is None else list(lane) for lane in state["lanes"]]

    def _document(self) -> int | None:
        """Return the index of the next document that no lane has yet; None after the last."""
        epoch, place = divmod(self._taken, len(self._documents))
        if self._epochs is not None and epoch >= self._epochs:
            return None
        if self._order is None or self._order[0] != epoch:
            count = len(self._documents)
            random = np.random.default_rng((self._seed, epoch))
            self._order = (epoch, random.permutation(count) if self._shuffle else np.arange(count))
        return int(self._order[1][place])

    def _batch(self) -> Batch:
        shape = (len(self._lanes), self._length)
        batch = {
            "input_ids": np.zeros(shape, np.int32),
            "segment_ids": np.zeros(shape, np.int32),
            "targets": np.full(shape, IGNORED_LABEL, np.int32),
            "continues": np.array([lane is not None for lane in self._lanes]),
        }
        for row in range(len(self._lanes)):
            self._fill(row, {name: array[row] for name, array in batch.items()})
        return batch

    def _fill(self, row: int, into: Batch) -> None:
        """Write one lane's next piece into the arrays `(length,)` of its row."""
        filled = segment = 0
        while filled < self._length and not (self._pad and segment):
            lane = self._lanes[row]
            if lane is None:
                document = self._document()
                if document is None:
                    return
                lane, self._taken = [document, 0], self._taken + 1
            document, begin = lane
            if document not in self._opened:
                self._opened[document] = self._documents[document]
            arrays = self._opened[document]
            inputs, targets = arrays["input_ids"][:-1], arrays["labels"][1:]
            end = min(len(inputs), begin + self._length - filled)
            here, segment = slice(filled, filled + end - begin), segment + 1
            into["input_ids"][here], into["targets"][here] = inputs[begin:end], targets[begin:end]
            into["segment_ids"][here] = segment
            filled += end - begin
            self._lanes[row] = None if end == len(inputs) else [document, end]
            if end == len(inputs):
                del self._opened[document]
