"""Convert between checkpoint files and named arrays; depends on the config and on shapes, not on the model.

Import: `load_weights` reads arrays, `open_checkpoint` reads headers only. Export: `outgoing_weights` and
`write_safetensors` write into a `new_folder`. Both use `checkpoint_table`, which maps stored tensors to
parameters.
"""

from mamba2_jax.weights.files import CheckpointError
from mamba2_jax.weights.folder import new_folder
from mamba2_jax.weights.header import TensorInfo
from mamba2_jax.weights.load import load_weights
from mamba2_jax.weights.outgoing import convertible_weights, outgoing_weights
from mamba2_jax.weights.plan import check_sizes
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
    "check_sizes",
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
