"""The kinds of layers, and the single table of all parameters of a model.

`Mamba2Config.layer_kinds` names a key of `KINDS` for each layer. A new kind declares its tensors here, and
its module with its empty state in `mamba2_jax.layers.kinds`.

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

import functools
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mamba2_jax.config.leaves import (
    DYNAMICS,
    EMBEDDING_TABLE,
    OUTPUT_HEAD,
    Leaf,
    Part,
    Role,
    StoredTensor,
    Tensor,
    convolution,
    projection,
    vector,
)

if TYPE_CHECKING:
    from mamba2_jax.config.mamba2 import Mamba2Config

BACKBONE = "backbone."
EMBEDDING = "backbone.embeddings.weight"
HEAD = "lm_head.weight"


def _mamba2_numbers(config: "Mamba2Config") -> Mapping[str, int]:
    return {
        "width": config.hidden_size,
        "heads": config.num_heads,
        "head_dim": config.head_dim,
        "groups": config.n_groups,
        "state": config.state_size,
        "taps": config.conv_kernel,
        "parallel_MLP": config.parallel_mlp_width,
        "mixed": config.intermediate_size,  # the MLP's channels, then the heads'
        "use_bias": config.use_bias,
        "use_conv_bias": config.use_conv_bias,
        "rmsnorm": config.rmsnorm,
        "D_has_hdim": config.D_has_hdim,
        "D_per_head": int(not config.D_has_hdim),
    }


# The stored rows of `in_proj.weight` are z, x, B, C and dt. Each meaning is its own leaf, so that heads and
# groups can be sharded over devices; likewise q, k and v of an attention layer.
_MAMBA2 = Part(
    (
        *projection(
            "mixer.in_proj",
            "width",
            {
                "_z0x0": ("2", "parallel_MLP"),  # gate, value
                "_zx": ("2", "heads head_dim"),
                "_BC": ("2", "groups state"),
                "_dt": ("heads",),
            },
            bias="use_bias",
        ),
        *convolution(
            "mixer.conv1d", {"_x": ("heads head_dim",), "_BC": ("2", "groups state")}, bias="use_conv_bias"
        ),
        vector("mixer.dt_bias", "heads", role=DYNAMICS),
        vector("mixer.A_log", "heads", role=DYNAMICS),
        vector("mixer.D", "heads", role=DYNAMICS, when="D_per_head"),
        vector("mixer.D", "heads", "head_dim", role=DYNAMICS, when="D_has_hdim"),
        vector("mixer.norm.weight", "heads head_dim", when="rmsnorm"),
        *projection("mixer.out_proj", "mixed", {"": ("width",)}, bias="use_bias"),
    ),
    _mamba2_numbers,
)


def _attention_numbers(config: "Mamba2Config") -> Mapping[str, int]:
    attention = config.attn_cfg
    if attention is None:
        raise ValueError("Mamba2Config: an attention layer without attn_cfg; say what it looks like")
    return {
        "width": config.hidden_size,
        "query_heads": attention.num_heads,
        "key_heads": attention.num_heads_kv or 0,
        "head_dim": attention.head_dim or 0,
        "taps": attention.d_conv,
        "attention_MLP": attention.mlp_width,
        "mixed": attention.query_width + attention.mlp_width,  # the heads' channels, then the MLP's
        "qkv_proj_bias": attention.qkv_proj_bias,
        "out_proj_bias": attention.out_proj_bias,
    }


_QKV = {"_q": ("query_heads head_dim",), "_k": ("key_heads head_dim",), "_v": ("key_heads head_dim",)}
_ATTENTION = Part(
    (
        *projection(
            "mixer.in_proj",
            "width",
            {**_QKV, "_mlp": ("2", "attention_MLP")},  # value, gate
            bias="qkv_proj_bias",
        ),
        *convolution("mixer.conv1d", _QKV, bias="taps"),
        *projection("mixer.out_proj", "mixed", {"": ("width",)}, bias="out_proj_bias"),
    ),
    _attention_numbers,
    options="attn_cfg",
)


@dataclass(frozen=True)
class LayerKind:
    """Declaration of the mixer of one kind of layer.

    Args:
        mixer: tensors of the mixer.
        attends: the mixer caches keys and values per token, and needs token positions.
    """

    mixer: Part
    attends: bool = False


KINDS = {"mamba2": LayerKind(_MAMBA2), "attention": LayerKind(_ATTENTION, attends=True)}

# The norm before every mixer, and the optional norm and MLP after it.
_NORM = Part((vector("norm.weight", "width"),), lambda config: {"width": config.hidden_size})
_MLP = Part(
    (
        vector("norm2.weight", "width", when="MLP"),
        *projection("mlp.fc1", "width", {"": ("2", "MLP")}),  # value, gate
        *projection("mlp.fc2", "MLP", {"": ("width",)}),
    ),
    lambda config: {"width": config.hidden_size, "MLP": config.mlp_width},
)
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
        The tensors under their canonical names, those of transformers. `lm_head.weight` is always last; it
        has no leaves when the head is tied or `head` is False.
    """
    embedding, norm, output = _MODEL.stored(config)
    if config.tie_word_embeddings or not head:
        output = StoredTensor(output.name, output.shape, ())
    layers = {kind: _layer(kind, config) for kind in set(config.layer_kinds)}
    table = [embedding.below(BACKBONE)]
    for index, kind in enumerate(config.layer_kinds):
        table += [stored.below(f"{BACKBONE}layers.{index}.") for stored in layers[kind]]
    return (*table, norm.below(BACKBONE), output)


def count_parameters(config: "Mamba2Config") -> int:
    """Sum the sizes of all leaves; a tied head adds none."""
    embedding, norm, output = _MODEL.stored(config)
    total = _count([embedding, norm] if config.tie_word_embeddings else [embedding, norm, output])
    for kind, layers in Counter(config.layer_kinds).items():
        total += layers * _count(_layer(kind, config))
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
    leaves = _leaves(config, _kind_at(config, path))
    return next((leaves[end] for end in _ends(path) if end in leaves), None)


def weight_at(config: "Mamba2Config", module: str) -> Leaf | None:
    """Find the first leaf of the weight of the module whose name is a suffix of a path."""
    leaves = _leaves(config, _kind_at(config, module)).values()
    found = (leaf for end in _ends(module) for leaf in leaves if leaf.path.startswith(f"{end}.weight"))
    return next(found, None)


def role_of(path: str) -> Role | None:
    """Return the role of the parameter at a path, for any config; None for an undeclared parameter."""
    return next((_ROLES[end] for end in _ends(path) if end in _ROLES), None)


_ROLES = {
    tensor.name + ending: tensor.role
    for part in (_MODEL, _NORM, _MLP, *(kind.mixer for kind in KINDS.values()))
    for tensor in part.tensors
    for ending in tensor.leaves
}


def _layer(kind: str, config: "Mamba2Config") -> list[StoredTensor]:
    """List the tensors of one block, with names below the layer."""
    parts = (_NORM, KINDS[kind].mixer, _MLP)
    return [stored for part in parts for stored in part.stored(config)]


def _kind_at(config: "Mamba2Config", path: str) -> str | None:
    """Return the kind of the layer whose number is in a path; None without a number of an existing layer."""
    number = re.search(r"\blayers\.(\d+)\.", path)
    if number is None or int(number[1]) >= config.num_hidden_layers:
        return None
    return config.layer_kinds[int(number[1])]


@functools.lru_cache(maxsize=64)
def _leaves(config: "Mamba2Config", kind: str | None) -> dict[str, Leaf]:
    """Map names to the leaves outside all layers and of one kind of layer (None: all kinds of the model).

    The head is included also when tied, because its adapters are separate from the embedding's.
    """
    tensors = list(_MODEL.stored(config))
    for one in dict.fromkeys(config.layer_kinds) if kind is None else [kind]:
        tensors += _layer(one, config)
    return {leaf.path: leaf for stored in tensors for leaf in stored.leaves}


def _count(tensors: list[StoredTensor]) -> int:
    return sum(leaf.size for stored in tensors for leaf in stored.leaves)


def _ends(path: str) -> Iterator[str]:
    """Yield the path and its suffix after each dot, the longest first."""
    while path:
        yield path
        path = path.partition(".")[2]
