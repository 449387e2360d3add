"""Families of published models on the Mamba-2 mixer: how their config files and tensor names are read.

One module per family: a reader of its config file, and a table of names. The layers themselves are data
(`mamba2_jax.config.layers`); a family has no code of its own beyond these.
"""

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from mamba2_jax.config.families.bamba import BAMBA
from mamba2_jax.config.families.falcon_h1 import FALCON_H1
from mamba2_jax.config.families.family import Family
from mamba2_jax.config.families.file import ConfigFile
from mamba2_jax.config.families.granite import GRANITE
from mamba2_jax.config.families.nemotron_h import NEMOTRON_H

if TYPE_CHECKING:
    from mamba2_jax.config.mamba2 import Mamba2Config

FAMILIES: dict[str, Family] = {
    "bamba": BAMBA,
    "granitemoehybrid": GRANITE,
    "nemotron_h": NEMOTRON_H,
    "falcon_h1": FALCON_H1,
}
"""Families by `model_type`."""

REFUSED = {
    "mamba": "Mamba-1: another architecture",
    "falcon_mamba": "Mamba-1: another architecture",
    "jamba": "Mamba-1: another architecture",
    "zamba": "Mamba-1: another architecture",
    "zamba2": "its blocks are shared between layers and take the embeddings beside the stream",
    "plamo2": "its layers have norms after their modules too",
    "nemotron_h_puzzle": "its layers differ in size",
    "nemotron_h_omni": "a wrapper with vision and audio; take its language model",
    "nemotron3_5_transcribe": "a wrapper with audio; take its language model",
}
"""Relatives by `model_type`, with the reason why they are not read."""


def family_fields(config: Mapping[str, Any]) -> dict[str, Any]:
    """Convert a parsed config file of a family to keyword arguments of `Mamba2Config`.

    Raises:
        NotImplementedError: keys that may change numbers and are not supported; the message names them.
        ValueError: invalid values.
    """
    if config.get("quantization_config"):
        raise NotImplementedError(
            "config: the weights are quantized (quantization_config); use the unquantized checkpoint"
        )
    family = config["model_type"]
    fields = FAMILIES[family].read(ConfigFile(config))
    fields["unpadded_vocab_size"] = config.get("unpadded_vocab_size")
    return fields | {"family": family, "source": json.dumps(config)}


def ignored_prefixes(family: str) -> tuple[str, ...]:
    """Return the prefixes of a family's tensors that the model does not need."""
    return FAMILIES[family].ignored if family in FAMILIES else ()


def family_dict(config: "Mamba2Config") -> dict[str, Any]:
    """Return the content of a family's `config.json`: the file that was read, with what changed since.

    Raises:
        NotImplementedError: a change that is not written, or a config not read from such a file.
    """
    family = FAMILIES[config.family]
    if config.source is None:
        raise NotImplementedError(
            f"Mamba2Config.to_dict: a config of the family {config.family!r} is written from the file that "
            "it was read from; build it with Mamba2Config.from_dict"
        )
    content = json.loads(config.source)
    for name, key in family.write.items():
        value = getattr(config, name)
        content[key] = list(value) if isinstance(value, tuple) else value
    if config.unpadded_vocab_size is not None:
        content["unpadded_vocab_size"] = config.unpadded_vocab_size
    again = type(config).from_dict(content)
    if again != config:
        changed = [name for name in vars(again) if getattr(again, name) != getattr(config, name, None)]
        raise NotImplementedError(
            f"Mamba2Config.to_dict: {', '.join(sorted(changed))} differ from the file that the config was "
            f"read from, and are not written; change the file of {family.architecture} instead"
        )
    if "time_step_limit" in content:  # as a number also where transformers 5 had written `__float__`
        content["time_step_limit"] = list(config.time_step_limit)
    return content | {"architectures": [family.architecture], "model_type": config.family}
