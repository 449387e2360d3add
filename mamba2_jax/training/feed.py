"""The documents of a run, and the batches made of them."""

import dataclasses
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mamba2_jax.files import refuse_remote
from mamba2_jax.processes import is_first, place
from mamba2_jax.sharding import token_sharding
from mamba2_jax.training.config import TrainConfig
from mamba2_jax.training.data import (
    Batch,
    Documents,
    count_batches,
    eval_batches,
    load_documents,
    make_pipeline,
)
from mamba2_jax.training.lanes import Curriculum, Lanes

_MANY = 500_000  # documents; counting the steps then takes half a minute or more


class Feed:
    """Documents to train on and held out, and their batches.

    Args:
        config: the options.
        tokenizer: the model's tokenizer; None for `Documents`.
        vocab_size: of the model.
        mesh: mesh of the run, if any.
        report: called with each line of text for the user.
    """

    documents: Documents
    held_out: Documents | None

    def __init__(
        self,
        config: TrainConfig,
        tokenizer: Any,
        vocab_size: int,
        mesh: Mesh | None,
        report: Callable[[str], None],
    ):
        self._config, self._tokenizer, self._vocab_size = config, tokenizer, vocab_size
        self._mesh, self._report = mesh, report

    def load(self, data: Any, eval_data: Any, folder: pathlib.Path) -> None:
        """Read and tokenise the data, or take it from `folder` if it was tokenised there before."""
        config = self._config
        self.documents = self._load("data", data, folder)
        self.held_out = None if eval_data is None else self._load("evaluation data", eval_data, folder)
        if config.data.eval_share:
            self.documents, self.held_out = self.documents.hold_out(config.data.eval_share, config.seed)

    def batches(self) -> Any:
        """Return the batches of the run, whose iterator has `get_state` and `set_state`."""
        config = self._config
        epochs = (config.epochs or 1) if config.steps is None else None
        if config.carry_state:
            lengths = config.row_lengths
            return self._lanes(self.documents, config.accumulate, config.data.shuffle, epochs, lengths)
        own = self._own_rows()
        own = None if own is None else np.tile(own, config.accumulate)
        return make_pipeline(
            self.documents, config.data, self._rows, seed=config.seed, epochs=epochs, own_rows=own
        )

    def eval_batches(self) -> Iterator[Batch]:
        """Return an iterator over the batches of the held-out documents, once and in order."""
        if self.held_out is None:
            raise ValueError("evaluate: there is no evaluation data; give eval_data or data.eval_share")
        if self._config.carry_state:
            return self._lanes(self.held_out, 1, False, 1)
        return eval_batches(self.held_out, self._config.data, self._config.batch_size, self._own_rows())

    def count_steps(self) -> int:
        """Count the batches of all epochs: packing makes their number unpredictable."""
        config = self._config
        epochs = config.epochs or 1
        if config.carry_state:
            return sum(1 for _ in self.batches())
        if len(self.documents) * epochs > _MANY:
            self._report("counting the steps, about a minute per million documents; with steps set, none are")
        return count_batches(self.documents, config.data, self._rows, seed=config.seed, epochs=epochs)

    def tokens_of(self, batch: Batch) -> int:
        """Count the tokens of a batch in all processes, padding excluded: `segment_ids` has every row."""
        return int((batch["segment_ids"] != 0).sum())

    def placed(self, batch: Batch) -> dict[str, Any]:
        """Shard a batch `(b, l)` or `(a, b, l)`, and `continues` of its rows, over the mesh, if any."""
        if self._mesh is None:
            return batch
        *parts, rows, tokens = batch["input_ids"].shape
        spec = (*(None for _ in parts), *token_sharding(self._mesh, rows, tokens).spec)
        return {
            name: place(array, NamedSharding(self._mesh, PartitionSpec(*spec[: array.ndim])))
            for name, array in batch.items()
        }

    @property
    def _rows(self) -> int:
        return self._config.batch_size * self._config.accumulate

    def _load(self, what: str, data: Any, folder: pathlib.Path) -> Documents:
        if isinstance(data, Documents):
            return data
        for source in [data] if isinstance(data, str | pathlib.Path) else data:
            if isinstance(source, str | pathlib.Path):
                refuse_remote(source)
        if self._tokenizer is None:
            raise ValueError("Trainer: give the model's tokenizer, or Documents")
        config = self._config.data
        if self._config.carry_state:  # documents in one piece: the lanes cut them
            config = dataclasses.replace(config, max_length=2**31 - 1)
        documents = load_documents(
            data,
            self._tokenizer,
            config,
            folder=folder / what.replace(" ", "-"),
            progress=self._config.progress and is_first(),
            report=self._report,
        )
        highest = documents.highest
        if highest >= self._vocab_size:
            raise ValueError(
                f"Trainer: token {highest} lies outside the model's vocabulary of {self._vocab_size}; was "
                "another model's tokenizer used?"
            )
        self._report(f"{what}: {documents.report}")
        return documents

    def _own_rows(self) -> np.ndarray | None:
        """Return which rows of a batch have tokens on this process's devices, `(b,)` bool; None: all."""
        if self._mesh is None or jax.process_count() == 1:
            return None
        shape = (self._config.batch_size, self._config.data.max_length)
        own = np.zeros(shape[0], bool)
        sharding = token_sharding(self._mesh, *shape)
        for index in filter(None, sharding.addressable_devices_indices_map(shape).values()):
            own[index[0]] = True
        return own

    def _lanes(
        self,
        documents: Documents,
        pieces: int,
        shuffle: bool,
        epochs: int | None,
        curriculum: Curriculum = (),
    ) -> Lanes:
        config = self._config
        return Lanes(
            documents,
            rows=config.batch_size,
            length=config.data.max_length,
            curriculum=curriculum,
            pieces=pieces,
            pad=config.data.rows == "pad",
            shuffle=shuffle,
            seed=config.seed,
            epochs=epochs,
        )
