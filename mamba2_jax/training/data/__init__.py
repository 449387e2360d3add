"""Training data: from files, hub datasets and records to batches of packed rows of tokens.

    sources    files, folders, hub datasets -> records
    records    record -> text with the spans to train on; `chats` renders conversations
    encode     text -> token ids, special tokens, documents of at most a row
    token_files  documents as memory-mapped files, written once
    documents  `load_documents`: all of these, with a report
    pipeline   documents -> shuffled, packed, resumable batches (Grain)

A packed row holds several documents with different `segment_ids`; no state flows between documents.
"""

from mamba2_jax.training.data.config import DataConfig
from mamba2_jax.training.data.documents import Documents, Report, load_documents
from mamba2_jax.training.data.pipeline import Batch, count_batches, eval_batches, make_pipeline
from mamba2_jax.training.data.records import Source
from mamba2_jax.training.data.texts import iterate_texts

__all__ = [
    "Batch",
    "DataConfig",
    "Documents",
    "Report",
    "Source",
    "count_batches",
    "eval_batches",
    "iterate_texts",
    "load_documents",
    "make_pipeline",
]
