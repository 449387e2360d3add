"""The files of a checkpoint by name, and small JSON files read with one error message.

Who downloads, reads, replaces or copies files takes their names from here.
"""

import json
import pathlib
from dataclasses import dataclass
from typing import Any

CONFIG_FILES = ("config.json", "params.json")
"""Model configs in the order of preference: transformers' and state-spaces', then Mistral's."""
GENERATION_CONFIG = "generation_config.json"
TOKENIZER_FILES = (
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "chat_template*"),
    *("vocab.json", "merges.txt"),
)
"""Patterns of what makes up a tokenizer."""


@dataclass(frozen=True)
class WeightFiles:
    """The names of a checkpoint's weight files: one for all tensors, or an index and shards.

    Args:
        stem: what every name begins with.
        suffix: what every weight file's name ends with.
    """

    stem: str
    suffix: str

    @property
    def single(self) -> str:
        """The file that holds all tensors."""
        return f"{self.stem}{self.suffix}"

    @property
    def index(self) -> str:
        """The file that says which shard holds which tensor."""
        return f"{self.single}.index.json"

    def shard(self, number: int, count: int) -> str:
        """The file of shard `number`, from 1, out of `count`."""
        return f"{self.stem}-{number:05}-of-{count:05}{self.suffix}"

    @property
    def patterns(self) -> tuple[str, str]:
        """What matches the single file and every shard."""
        return self.single, f"{self.stem}-*-of-*{self.suffix}"


WEIGHT_FILES = (
    WeightFiles("model", ".safetensors"),  # transformers
    WeightFiles("consolidated", ".safetensors"),  # Mistral
    WeightFiles("pytorch_model", ".bin"),  # state-spaces, and older transformers
)
"""The kinds of weight files in the order of preference. Codestral ships its weights in the first two."""


def read_json(file: pathlib.Path) -> Any:
    """Parse a JSON file of a few kilobytes.

    Raises:
        ValueError: broken JSON, bytes that are not UTF-8, or endless nesting; names the file.
    """
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file}: cannot be read as JSON ({error}); download it again") from error


def first_line(error: BaseException, limit: int = 300) -> str:
    """Return the first line of an error's message, or the name of its type where it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:limit]
