"""Batches of packed or padded rows, shuffled and resumable, by Grain's indexed access to documents.

The pipeline packs the positions of tokens, not the tokens: which documents share a row depends on lengths
only. Tokens are then read for the rows that this process needs, so the batches of a run do not depend on how
many processes share them.
"""

import contextlib
import dataclasses
import json
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np

from mamba2_jax.processes import is_first
from mamba2_jax.training.data.config import DataConfig
from mamba2_jax.training.data.documents import Documents

Batch = dict[str, np.ndarray]


class _Positions(Sequence[Batch]):
    """The documents as the positions of their tokens."""

    def __init__(self, documents: Documents):
        self._documents = documents

    def __len__(self) -> int:
        return len(self._documents)

    def __getitem__(self, index) -> Batch:
        return {"positions": np.arange(*self._documents.span(index))}


def make_pipeline(
    documents: Documents,
    config: DataConfig,
    batch_size: int,
    *,
    seed: int,
    epochs: int | None,
    own_rows: np.ndarray | None = None,
) -> Any:
    """Build the Grain pipeline of batches; deterministic given the documents and the seed.

    Args:
        documents: the tokenised documents.
        config: data options.
        batch_size: rows per batch; the last batch is padded with empty rows.
        seed: random seed of shuffling and packing.
        epochs: passes over the documents, each in a new order; None: endless.
        own_rows: rows of a batch to read, `(batch_size,)` bool; the tokens of the others are left 0, their
            labels ignored. None: all.

    Returns:
        A `grain.IterDataset` of dicts `input_ids`, `segment_ids`, `labels`, each `(batch_size, max_length)`.
        Its iterators have `get_state` and `set_state`.
    """
    batches = _batches(documents, config, batch_size, seed, epochs)
    return batches.map(partial(_read, documents=documents, own_rows=own_rows))


def count_batches(
    documents: Documents, config: DataConfig, batch_size: int, *, seed: int, epochs: int
) -> int:
    """Count the batches of `make_pipeline`: packing makes their number unpredictable.

    Reads no tokens, but packs their positions, about a minute per million documents. For documents in files,
    the count is kept beside them.
    """
    if config.rows == "pad":
        return -(-len(documents) * epochs // batch_size)
    kept = None if documents.folder is None else documents.folder / "batches.json"
    key = f"{documents.fingerprint()} {config.max_length} {config.shuffle} {batch_size} {seed} {epochs}"
    counts = {}
    if kept is not None and kept.is_file():
        with contextlib.suppress(ValueError):  # being written by another process
            counts = json.loads(kept.read_text())
    if key not in counts:
        counts[key] = sum(1 for _ in _batches(documents, config, batch_size, seed, epochs))
        if kept is not None and is_first():
            kept.write_text(json.dumps(counts))
    return counts[key]


def eval_batches(
    documents: Documents, config: DataConfig, batch_size: int, own_rows: np.ndarray | None = None
) -> Iterator[Batch]:
    """Return an iterator over packed batches of all documents, once and in order."""
    config = dataclasses.replace(config, shuffle=False, rows="pack")
    return iter(make_pipeline(documents, config, batch_size, seed=0, epochs=1, own_rows=own_rows))


def _batches(documents: Documents, config: DataConfig, batch_size: int, seed: int, epochs: int | None) -> Any:
    """Build the pipeline of dicts `positions` (-1 is padding) and `segment_ids`."""
    grain = _import_grain()
    dataset = grain.MapDataset.source(_Positions(documents)).seed(seed)
    if config.shuffle:
        dataset = dataset.shuffle()
    dataset = dataset.repeat(epochs)
    dataset = dataset.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0))
    if config.rows == "pack":
        dataset = grain.experimental.FirstFitPackIterDataset(
            dataset,
            length_struct={"positions": config.max_length},
            num_packing_bins=max(batch_size, 32),
            padding_struct={"positions": -1},
            seed=seed,
            shuffle_bins=config.shuffle,
        )
    else:
        dataset = dataset.map(partial(_padded_row, length=config.max_length))
    return dataset.batch(batch_size, drop_remainder=False, batch_fn=partial(_stack, batch_size=batch_size))


def _padded_row(document: Batch, length: int) -> Batch:
    positions = document["positions"]
    padding = (0, length - len(positions))
    return {
        "positions": np.pad(positions, padding, constant_values=-1),
        "positions_segment_ids": np.pad(np.ones(len(positions), np.int32), padding),
    }


def _stack(rows: Sequence[Batch], batch_size: int) -> Batch:
    missing = ((0, batch_size - len(rows)), (0, 0))
    positions = np.stack([row["positions"] for row in rows])
    segments = np.stack([row["positions_segment_ids"] for row in rows])
    return {
        "positions": np.pad(positions, missing, constant_values=-1),
        "segment_ids": np.pad(segments, missing),
    }


def _read(batch: Batch, documents: Documents, own_rows: np.ndarray | None) -> Batch:
    positions, segments = batch["positions"], batch["segment_ids"]
    if own_rows is not None:
        positions = np.where(own_rows[:, None], positions, -1)
    tokens = documents.read(positions)
    documents.forget()
    return {"input_ids": tokens["input_ids"], "segment_ids": segments, "labels": tokens["labels"]}


def _import_grain() -> Any:
    try:
        import grain
    except ImportError as error:
        raise ImportError("training needs the extra 'train': pip install 'mamba2-jax-flax[train]'") from error
    return grain
