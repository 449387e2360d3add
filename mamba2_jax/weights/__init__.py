"""Checkpoint files <-> named arrays. Knows the config and the shapes, never the model.

`load_weights` is the way in; `open_checkpoint` looks into a checkpoint without loading it. `outgoing_weights`
and `write_safetensors` are the way out, into a `new_folder`. `checkpoint_table` says which stored tensor
holds which parameters, in both directions.
"""

from mamba2_jax.weights.files import CheckpointError
from mamba2_jax.weights.folder import new_folder
from mamba2_jax.weights.header import TensorInfo
from mamba2_jax.weights.load import load_weights
from mamba2_jax.weights.outgoing import convertible_weights, outgoing_weights
from mamba2_jax.weights.reader import Checkpoint, find_form, open_checkpoint
from mamba2_jax.weights.report import LoadReport, progress_bar
from mamba2_jax.weights.safetensors_file import (
    Outgoing,
    file_order,
    parse_size,
    write_json,
    write_safetensors,
)
from mamba2_jax.weights.table import Leaf, StoredTensor, checkpoint_table
from mamba2_jax.weights.torch_file import write_torch

__all__ = [
    "Checkpoint",
    "CheckpointError",
    "Leaf",
    "LoadReport",
    "Outgoing",
    "StoredTensor",
    "TensorInfo",
    "checkpoint_table",
    "convertible_weights",
    "find_form",
    "file_order",
    "load_weights",
    "new_folder",
    "open_checkpoint",
    "outgoing_weights",
    "parse_size",
    "progress_bar",
    "write_json",
    "write_safetensors",
    "write_torch",
]
