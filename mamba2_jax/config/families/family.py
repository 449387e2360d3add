"""What a family is: a reader of its config file, and the names of its tensors in files."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from mamba2_jax.config.families.file import ConfigFile


class Family(NamedTuple):
    """A family of published models.

    Args:
        title: its name, for people.
        architecture: its class in transformers.
        read: converts its config file to keyword arguments of `Mamba2Config`.
        outside: our prefix of a tensor outside the layers -> theirs.
        layers: their prefix of the layers.
        inside: our prefix of a tensor inside a layer, which begins with `norm.`, `norm2.` or the kind of its
            module -> theirs. The longest prefix that fits is replaced.
        write: fields of `Mamba2Config` that may change after reading -> their keys in the config file.
        ignored: prefixes of tensors that the model does not need.
    """

    title: str
    architecture: str
    read: Callable[[ConfigFile], dict[str, Any]]
    outside: Mapping[str, str]
    layers: str
    inside: Mapping[str, str]
    write: Mapping[str, str]
    ignored: tuple[str, ...] = ()

    def name_outside(self, name: str) -> str:
        """Return the name in files of a tensor outside the layers."""
        return _replace_prefix(name, self.outside)

    def name_inside(self, index: int, name: str) -> str:
        """Return the name in files of a tensor inside a layer; `name` begins as the keys of `inside`."""
        return f"{self.layers}{index}.{_replace_prefix(name, self.inside)}"


EACH = "{each}"
"""In a name in files: the number of one of the equal tensors whose rows make up a tensor of ours."""

COMMON_KEYS = {
    "vocab_size": "vocab_size",
    "pad_token_id": "pad_token_id",
    "bos_token_id": "bos_token_id",
    "eos_token_id": "eos_token_id",
    "tie_word_embeddings": "tie_word_embeddings",
    "initializer_range": "initializer_range",
}


def _replace_prefix(name: str, prefixes: Mapping[str, str]) -> str:
    """Replace the longest prefix that fits; return the name as it is if none does."""
    prefix = max((one for one in prefixes if name.startswith(one)), key=len, default="")
    return prefixes.get(prefix, "") + name.removeprefix(prefix)
