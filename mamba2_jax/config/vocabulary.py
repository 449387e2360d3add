"""Count the token ids of a tokenizer from its files, without loading it."""

import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

from mamba2_jax.files import read_json


def count_token_ids(folder: pathlib.Path) -> int | None:
    """Return the largest token id in a folder's tokenizer files plus 1; None without a readable vocabulary.

    Ids in between may be unused: some tokenizers have holes.

    Raises:
        ValueError: a file is not JSON; the message names it.
    """
    ids: list[int] = []
    for name in ("tokenizer.json", "vocab.json", "added_tokens.json"):
        if (folder / name).is_file():
            content = read_json(folder / name)
            try:
                ids += _ids(content) if name == "tokenizer.json" else content.values()
            except (KeyError, TypeError, ValueError, AttributeError):
                return None  # optional for a config; `load_tokenizer` reports the defect
    return max(ids) + 1 if ids and all(type(one) is int for one in ids) else None


def _ids(content: Any) -> Iterator[int]:
    """Yield the ids in a `tokenizer.json`, whose vocabulary is a map to ids or a list in their order."""
    vocab = content["model"]["vocab"]
    yield from vocab.values() if isinstance(vocab, Mapping) else range(len(vocab))
    yield from (token["id"] for token in content.get("added_tokens") or ())
