"""File names of a checkpoint, and a reader of small JSON files with a clear error message.

All modules that download, read, replace or copy checkpoint files take the names from here.
"""

import json
import pathlib
import re
from dataclasses import dataclass
from typing import Any

CONFIG_FILES = ("config.json", "params.json")
"""Config files in the order of preference: that of transformers and state-spaces, then Mistral's."""
GENERATION_CONFIG = "generation_config.json"
TOKENIZER_FILES = (
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "chat_template*"),
    *("vocab.json", "merges.txt"),
)
"""Patterns of the names of tokenizer files."""


@dataclass(frozen=True)
class WeightFiles:
    """Names of a checkpoint's weight files: a single file, or an index file and checkpoint shards.

    Args:
        stem: common beginning of all names.
        suffix: common ending of the weight files' names.
    """

    stem: str
    suffix: str

    @property
    def single(self) -> str:
        """Return the name of the single file that holds all tensors."""
        return f"{self.stem}{self.suffix}"

    @property
    def index(self) -> str:
        """Return the name of the index file, which maps each tensor to its shard."""
        return f"{self.single}.index.json"

    def shard(self, number: int, count: int) -> str:
        """Return the file name of shard `number` of `count`, counted from 1."""
        return f"{self.stem}-{number:05}-of-{count:05}{self.suffix}"

    @property
    def patterns(self) -> tuple[str, str]:
        """Return glob patterns that match the single file and every shard."""
        return self.single, f"{self.stem}-*-of-*{self.suffix}"


WEIGHT_FILES = (
    WeightFiles("model", ".safetensors"),  # transformers
    WeightFiles("consolidated", ".safetensors"),  # Mistral
    WeightFiles("pytorch_model", ".bin"),  # state-spaces, and older transformers
)
"""Weight file names in the order of preference. Codestral ships its weights under the first two."""


def read_json(file: pathlib.Path) -> Any:
    """Parse a JSON file of a few kilobytes.

    Raises:
        ValueError: invalid JSON, bytes that are not UTF-8, or too deep nesting; the message names the file.
    """
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file}: cannot be read as JSON ({error}); download it again") from error


def first_line(error: BaseException, limit: int = 300) -> str:
    """Return the first line of an error's message, or the name of its type if the message is empty."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:limit]


def refuse_remote(path: object) -> None:
    """Refuse an address such as `gs://bucket/folder`, which `pathlib` would take for a local folder.

    Raises:
        ValueError: the address has a scheme.
    """
    # pathlib shortens // to /; a single letter is a drive of Windows
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]+:/", str(path)):
        raise ValueError(
            f"{path}: only folders and files of this machine are read and written; mount the bucket "
            "(gcsfuse, mountpoint-s3), or copy with gsutil or aws s3"
        )
