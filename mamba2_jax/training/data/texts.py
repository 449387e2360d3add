"""The texts of sources, for a tokenizer to be trained on."""

import pathlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, cast

from mamba2_jax.training.data.config import DataConfig
from mamba2_jax.training.data.records import Source, Text, Unusable
from mamba2_jax.training.data.sources import read_source

_NAMES = ("role", "from", "name", "id", "tool_call_id", "weight")  # fields of a message that hold no text


def iterate_texts(sources: Iterable[Source] | Source, config: DataConfig) -> Iterator[str]:
    """Yield all texts in the records of the sources, in order; records that hold none are skipped.

    Args:
        sources: as for `load_documents`.
        config: data options: the field of a text, and which part of a hub dataset.
    """
    if isinstance(sources, str | pathlib.Path | Mapping):
        sources = cast("list[Source]", [sources])
    for source in sources:
        for found in read_source(source, config):
            if isinstance(found, Text):
                yield found.text
            elif not isinstance(found, Unusable):
                fields = found.fields
                named = fields.get(config.text_field) if isinstance(fields, Mapping) else None
                yield from _strings(fields if named is None else named)


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value.encode(errors="ignore").decode()  # without halves of surrogate pairs
    elif isinstance(value, Mapping):
        for name, inner in value.items():
            if name not in _NAMES:
                yield from _strings(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _strings(inner)
