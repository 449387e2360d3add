"""Checkpoint files <-> named arrays. Knows the config and the shapes, never the model.

`load_weights` is the way in; `open_checkpoint` looks into a checkpoint without loading it; `checkpoint_table`
says which stored tensor holds which parameters.
"""

from mamba2_jax.weights.files import CheckpointError
from mamba2_jax.weights.header import TensorInfo
from mamba2_jax.weights.load import load_weights
from mamba2_jax.weights.names import Leaf, StoredTensor, checkpoint_table
from mamba2_jax.weights.reader import Checkpoint, open_checkpoint
from mamba2_jax.weights.report import LoadReport

__all__ = [
    "Checkpoint",
    "CheckpointError",
    "Leaf",
    "LoadReport",
    "StoredTensor",
    "TensorInfo",
    "checkpoint_table",
    "load_weights",
    "open_checkpoint",
]
