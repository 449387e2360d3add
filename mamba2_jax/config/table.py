"""The single table of all parameters of a model: stored tensors, their names in files, and their leaves.

Import and export, shardings, optimizer, adapters and the parameter count read it.

>>> from mamba2_jax.config import Mamba2Config
>>> config = Mamba2Config.preset("mamba2-130m")
>>> table = {stored.name: stored for stored in checkpoint_table(config)}
>>> stored = table["backbone.layers.0.mixer.in_proj.weight"]
>>> stored.shape
(3352, 768)
>>> for leaf in stored.leaves:
...     print(leaf.path, leaf.shape, leaf.axes, leaf.rows)
backbone.layers.0.mixer.in_proj.weight_zx (768, 2, 1536) ('width', '2', 'heads head_dim') (0, 3072)
backbone.layers.0.mixer.in_proj.weight_BC (768, 2, 128) ('width', '2', 'groups state') (3072, 3328)
backbone.layers.0.mixer.in_proj.weight_dt (768, 24) ('width', 'heads') (3328, 3352)
"""

import dataclasses
import functools
import math
import re
from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING

from mamba2_jax.config.families import FAMILIES
from mamba2_jax.config.kinds import KINDS
from mamba2_jax.config.layers import NORMS, Layer
from mamba2_jax.config.leaves import (
    EMBEDDING_TABLE,
    OUTPUT_HEAD,
    SCORES,
    Leaf,
    Part,
    Role,
    StoredTensor,
    Tensor,
    vector,
)
from mamba2_jax.config.quantization import quantized_tensors

if TYPE_CHECKING:
    from mamba2_jax.config.mamba2 import Mamba2Config

BACKBONE = "backbone."
EMBEDDING = "backbone.embeddings.weight"
HEAD = "lm_head.weight"
SCORE = "score.weight"

_NORM = Part((vector("weight", "width"),), lambda config: {"width": config.hidden_size})
_SCORE = (Tensor(SCORE, SCORES, {"": ("labels",)}, ("width",)),)
_MODEL = Part(
    (
        Tensor("embeddings.weight", EMBEDDING_TABLE, {"": ("vocabulary",)}, ("width",)),
        vector("norm_f.weight", "width"),
        Tensor(HEAD, OUTPUT_HEAD, {"": ("vocabulary",)}, ("width",)),
    ),
    lambda config: {"width": config.hidden_size, "vocabulary": config.vocab_size},
)


def checkpoint_table(config: "Mamba2Config", head: bool = True) -> tuple[StoredTensor, ...]:
    """List every tensor of a checkpoint with its shape and the model's leaves stored in it.

    Args:
        config: config of the model.
        head: whether the model has an output head (False: the bare Mamba2Model).

    Returns:
        The tensors under their canonical names, those of transformers' Mamba-2. `lm_head.weight` is always
        last; it has no leaves when the head is tied or `head` is False.
    """
    embedding, norm, output = _outside(config)
    if config.tie_word_embeddings or not head:
        output = dataclasses.replace(output, leaves=())
    table = [embedding]
    for index, layer in enumerate(config.layers):
        table += _at(config, index, layer)
    return (*table, norm, output)


def stored_table(config: "Mamba2Config", head: bool = True) -> tuple[StoredTensor, ...]:
    """List every tensor of a checkpoint as `checkpoint_table`, with those that make up a quantized one."""
    table = checkpoint_table(config, head)
    return tuple(one for stored in table for one in quantized_tensors(stored, config.quantization))


def score_tensor(config: "Mamba2Config", labels: int) -> StoredTensor:
    """Return the tensor of a classification head, in transformers' form for all of its classifiers."""
    numbers = {"width": config.hidden_size, "labels": labels}
    (stored,) = Part(_SCORE, lambda _: numbers).stored(config)
    return stored.below("")


def count_parameters(config: "Mamba2Config", active: bool = False) -> int:
    """Sum the sizes of all leaves; a tied head adds none. `active`: of the experts, only a token's own."""
    embedding, norm, output = _MODEL.stored(config)
    total = _count([embedding, norm] if config.tie_word_embeddings else [embedding, norm, output])
    for layer, layers in Counter(config.layers).items():
        tensors = [stored for _, stored in _layer(layer, config)]
        total += layers * _count(tensors)
        if active and (experts := config.experts_cfg) is not None:
            idle = experts.num_experts - experts.top_k
            total -= layers * sum(idle * math.prod(one.file_shape[1:]) for one in tensors if one.matrices)
    return total


def leaf_at(config: "Mamba2Config", path: str) -> Leaf | None:
    """Find the leaf whose name, below its layer or the model, is a suffix of a path.

    A path without a layer number, such as a path inside a mixer, may belong to any kind of layer in the
    model: leaves of one name have the same axes in all kinds.

    Returns:
        The leaf, with its path below the layer; None when no leaf matches, as for an adapter.

    >>> from mamba2_jax.config import Mamba2Config
    >>> leaf_at(Mamba2Config(), "moments.backbone.layers.3.mixer.A_log").axes
    ('heads',)
    """
    leaves = _leaves(config, _layer_at(config, path))
    return next((leaves[end] for end in _ends(path) if end in leaves), None)


def weight_at(config: "Mamba2Config", module: str) -> Leaf | None:
    """Find the first leaf of the weight of the module whose name is a suffix of a path."""
    leaves = _leaves(config, _layer_at(config, module)).values()
    found = (leaf for end in _ends(module) for leaf in leaves if leaf.path.startswith(f"{end}.weight"))
    return next(found, None)


def role_of(path: str) -> Role | None:
    """Return the role of the parameter at a path, for any config; None for an undeclared parameter."""
    return next((_ROLES[end] for end in _ends(path) if end in _ROLES), None)


_ROLES = {
    f"{at}.{tensor.name}{ending}" if at else f"{tensor.name}{ending}": tensor.role
    for at, part in [
        ("", _MODEL),
        ("", Part(_SCORE, lambda _: {})),
        *((norm, _NORM) for norm in NORMS),
        *((attribute, kind.tensors) for kind in KINDS.values() for attribute in kind.attributes),
    ]
    for tensor in part.tensors
    for ending in tensor.leaves
}


def _layer(layer: Layer, config: "Mamba2Config") -> list[tuple[str, StoredTensor]]:
    """List the tensors of one block, with names below it; each after the prefix that families rename."""
    tensors = []
    for norm, branch in zip(NORMS, layer, strict=False):
        modules = [
            (norm, norm, _NORM),
            *((slot.attribute, slot.kind, KINDS[slot.kind].tensors) for slot in branch),
        ]
        for attribute, kind, part in modules:
            tensors += [
                (f"{kind}.{stored.name}", stored.below(f"{attribute}.")) for stored in part.stored(config)
            ]
    return tensors


def _at(config: "Mamba2Config", index: int, layer: Layer) -> Iterator[StoredTensor]:
    """Yield the tensors of layer `index`, with the names that its family gives them in files."""
    family = FAMILIES.get(config.family)
    for name, stored in _layer(layer, config):
        file_name = family.name_inside(index, name) if family else ""
        yield stored.below(f"{BACKBONE}layers.{index}.", file_name)


def _outside(config: "Mamba2Config") -> Iterator[StoredTensor]:
    """Yield the tensors outside the layers: embedding, final norm and head."""
    family = FAMILIES.get(config.family)
    for stored in _MODEL.stored(config):
        at = "" if stored.name == HEAD else BACKBONE
        yield stored.below(at, family.name_outside(at + stored.name) if family else "")


def _layer_at(config: "Mamba2Config", path: str) -> Layer | None:
    """Return the layer whose number is in a path; None without a number of an existing layer."""
    number = re.search(r"\blayers\.(\d+)\.", path)
    if number is None or int(number[1]) >= config.num_hidden_layers:
        return None
    return config.layers[int(number[1])]


@functools.lru_cache(maxsize=64)
def _leaves(config: "Mamba2Config", layer: Layer | None) -> dict[str, Leaf]:
    """Map names to the leaves outside all layers and of one layer (None: all different layers of the model).

    The head is included also when tied, because its adapters are separate from the embedding's.
    """
    tensors = list(_MODEL.stored(config))
    for one in dict.fromkeys(config.layers) if layer is None else [layer]:
        tensors += [stored for _, stored in _layer(one, config)]
    stored_as = [one for stored in tensors for one in quantized_tensors(stored, config.quantization)]
    return {leaf.path: leaf for stored in (*tensors, *stored_as) for leaf in stored.leaves}


def _count(tensors: list[StoredTensor]) -> int:
    return sum(leaf.size for stored in tensors for leaf in stored.leaves)


def _ends(path: str) -> Iterator[str]:
    """Yield the path and its suffix after each dot, the longest first."""
    while path:
        yield path
        path = path.partition(".")[2]
